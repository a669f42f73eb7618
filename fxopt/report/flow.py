"""Walking a graph from a site to what feeds it and what reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

import torch
from torch.fx import Node

from fxopt.ir.nodes import FOLDED, is_tensor, same_shape, shape
from fxopt.ir.program import Program

#: Operators that contract two operands (or a tensor with a weight), by packet name.
CONTRACTIONS: Final = frozenset({
    "matmul", "mm", "bmm", "addmm", "baddbmm", "addbmm", "einsum", "linear", "mv", "addmv", "tensordot", "inner",
    "_grouped_mm",
})  # fmt: skip
#: Operators that neither mix elements across a contraction nor select by value, and are not tagged pointwise.
_TRANSPARENT: Final = frozenset(
    {
        "to", "_to_copy", "type_as", "dropout", "native_dropout", "feature_dropout", "contiguous", "masked_fill", "cat",
        "tril", "triu", "repeat", "repeat_interleave", "index", "split", "split_with_sizes", "chunk", "unbind", "stack",
        "flatten", "unflatten", "reshape", "constant_pad_nd", "pad", "hardswish", "glu", "flip", "roll", "clamp",
        "where",
    }
)  # fmt: skip
#: Operators that overwrite some elements of a tensor, or pick some by value or position.
_EDITS: Final = frozenset(
    {
        "fill", "copy", "select_scatter", "slice_scatter", "diagonal_scatter", "scatter", "scatter_add",
        "masked_scatter", "index_put", "index_fill", "index_copy", "topk", "sort", "gather",
    }
)  # fmt: skip
_SHAPE_ONLY: Final = frozenset({"to", "_to_copy", "type_as", "contiguous", "clone", "detach", "alias", "reshape"})


def packet(node: Node) -> str:
    """The operator's name without namespace and overload (``softmax`` of ``aten.softmax.int``), or ``""``."""
    target = node.target
    if node.op != "call_function":
        return ""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.partition("::")[2]
    if isinstance(target, torch._ops.HigherOrderOperator):
        return str(target.name())
    return getattr(target, "__name__", "")


def namespace(node: Node) -> str:
    """The namespace of an operator call (``aten``, ``fxopt``, a library's own); empty for anything else."""
    return node.target.namespace if isinstance(node.target, torch._ops.OpOverload) else ""


def is_view_or_cast(node: Node) -> bool:
    """Whether ``node`` only shows the same elements in another shape, order, memory or dtype."""
    target = node.target
    view = isinstance(target, torch._ops.OpOverload) and target.is_view
    return view or packet(node) in _SHAPE_ONLY


def is_transparent(node: Node) -> bool:
    """Whether ``node`` is pointwise, a view, a cast, a dropout or a concatenation: a walk goes through it."""
    target = node.target
    if packet(node) == "getitem":
        return True
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return torch.Tag.pointwise in target.tags or target.is_view or packet(node) in _TRANSPARENT


def is_transparent_or_edit(node: Node) -> bool:
    """Whether a walk that follows edited tensors too (an overwritten column, the largest elements) goes through it.

    An operator of a library's own, of which nothing else is known, may be one if it keeps a shape.
    """
    return is_transparent(node) or packet(node) in _EDITS or _is_foreign(node)


def _is_foreign(node: Node) -> bool:
    if namespace(node) in ("", "aten", "prims", "fxopt") or not is_tensor(node):
        return False
    return any(is_tensor(source) and same_shape(shape(source), shape(node)) for source in node.all_input_nodes)


def is_contraction(node: Node) -> bool:
    """Whether ``node`` contracts two tensors."""
    return packet(node) in CONTRACTIONS


@dataclass(frozen=True)
class Reach:
    """What a walk found: the ``ends`` where it was to stop, and the nodes ``between``, in the order of discovery."""

    ends: tuple[Node, ...]
    between: tuple[Node, ...]


def upstream(node: Node, stop: Callable[[Node], bool], through: Callable[[Node], bool] = is_transparent) -> Reach:
    """Follow operands of ``node`` back to the nodes where ``stop`` holds, as long as ``through`` holds."""
    return _walk(node.all_input_nodes, stop, through, lambda n: n.all_input_nodes)


def downstream(node: Node, stop: Callable[[Node], bool], through: Callable[[Node], bool] = is_transparent) -> Reach:
    """Follow readers of ``node`` to the nodes where ``stop`` holds, as long as ``through`` holds."""
    return _walk(node.users, stop, through, lambda n: n.users)


def _walk(
    start: Iterable[Node],
    stop: Callable[[Node], bool],
    through: Callable[[Node], bool],
    following: Callable[[Node], Iterable[Node]],
) -> Reach:
    pending, seen = list(start), set[Node]()
    ends: list[Node] = []
    between: list[Node] = []
    while pending:
        current = pending.pop(0)
        if current in seen:
            continue
        seen.add(current)
        if stop(current):
            ends.append(current)
        elif through(current):
            between.append(current)
            pending.extend(following(current))
    return Reach(tuple(ends), tuple(between))


def origin(node: object) -> object:
    """The operand behind views and casts; a folded weight is one by itself."""
    while isinstance(node, Node) and is_view_or_cast(node) and node.all_input_nodes and FOLDED not in node.meta:
        node = node.all_input_nodes[0]
    return node


def is_parameter(program: Program, node: object) -> bool:
    """Whether ``node``, behind views and casts, is a parameter, buffer or constant of the model, not an input."""
    node = origin(node)
    if not isinstance(node, Node):
        return False
    if node.op == "get_attr" or FOLDED in node.meta:
        return True
    bound = program.signature is not None and node.name in program.signature.bound
    return bound or "_dynamo_static_input_type" in (node.meta.get("tensor_dict") or {})


def is_projection(program: Program, node: Node) -> bool:
    """Whether ``node`` contracts a tensor with a weight of the model.

    In a captured function weights are ordinary inputs; there a ``linear`` whose weight is an input counts as well.
    """
    if not is_contraction(node):
        return False
    weight = origin(node.args[1]) if packet(node) == "linear" and len(node.args) > 1 else None
    if isinstance(weight, Node) and weight.op == "placeholder":
        return True
    return contracts_parameter(program, node)


def contracts_parameter(program: Program, node: Node) -> bool:
    """Whether a contracted operand of ``node`` is provably a parameter (what ``addmm`` adds does not count)."""
    operands = node.all_input_nodes
    if packet(node) in ("addmm", "baddbmm", "addbmm", "addmv"):
        operands = [n for n in node.args[1:3] if isinstance(n, Node)]
    if packet(node) == "linear":
        operands = operands[1:2]
    return any(is_parameter(program, operand) for operand in operands)
