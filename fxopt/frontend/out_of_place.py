"""Dynamo's graph with ``x += y`` written as ``x = x + y`` wherever nobody else sees the memory of ``x``.

Making any edit functional takes a trace of every call; without edits, calls alike are traced once
(`fxopt.frontend.repeated`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

_OUT_OF_PLACE: Final[dict[Any, Callable[..., Any]]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}
_GRADIENT_SWITCHES: Final = (torch._C._set_grad_enabled, torch.autograd.grad_mode._enter_inference_mode)


def out_of_place(module: fx.GraphModule) -> fx.GraphModule:
    """``module``, or a copy in which arithmetic in place is out of place where that makes no difference.

    It makes none on a tensor that the graph computed, that only the edit reads, which shares its memory with no other
    tensor before, and whose dtype the result has anyway. Dynamo's metadata tell all of that.
    """
    if not any(node.target in _OUT_OF_PLACE for node in module.graph.nodes) or any(map(_prevents, module.graph.nodes)):
        return module
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    holders: dict[int, set[fx.Node]] = {}
    for node in graph.nodes:
        if node.target in _OUT_OF_PLACE and _is_private(node, holders):
            node.target = _OUT_OF_PLACE[node.target]
            holders[_memory(node)[0]] = {node}
            continue
        for address in _memory(node):
            holders.setdefault(address, set()).add(node)
    return fx.GraphModule(module, graph)


def _prevents(node: fx.Node) -> bool:
    """Memory that nothing tells of; and a gradient switch: an edit without gradients leaves those of what it edits."""
    unknown = node.op in ("placeholder", "get_attr", "call_module") and "example_value" not in node.meta
    return unknown or node.target in _GRADIENT_SWITCHES


def _is_private(edit: fx.Node, holders: dict[int, set[fx.Node]]) -> bool:
    edited, other = edit.args
    if not isinstance(edited, fx.Node) or set(edited.users) != {edit} or edited.op == "placeholder":
        return False
    value, added = (x.meta.get("example_value") if isinstance(x, fx.Node) else x for x in (edited, other))
    if type(value) is not FakeTensor or not isinstance(added, torch.Tensor | int | float):
        return False
    return holders[_memory(edited)[0]] == {edited} and torch.result_type(value, added) is value.dtype


def _memory(node: fx.Node) -> list[int]:
    """What tells the memory of each tensor that ``node`` gives."""
    leaves = pytree.tree_leaves(node.meta.get("example_value"))
    return [x.untyped_storage()._cdata for x in leaves if type(x) is FakeTensor]
