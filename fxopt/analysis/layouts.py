"""What other strides of one value mean for everything downstream."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fxopt.ir.nodes import same_shape
from fxopt.ir.program import Program

#: Operators of these namespaces read tensors by index, whatever their strides, apart from `_BY_ADDRESS`.
_BY_INDEX: Final = frozenset({"aten", "prims", "fxopt"})
_BY_ADDRESS: Final = frozenset(
    {
        "as_strided",
        "as_strided_copy",
        "as_strided_scatter",
        "resize",
        "set",
        "stride",
        "sym_stride",
        "sym_storage_offset",
    }
)


def relaid(program: Program, node: Node, value: Tensor) -> dict[Node, Any] | None:
    """What every node computes that changes when ``node`` gives ``value``: the same numbers with other strides.

    ``None`` if the program would not stay right: something downstream doesn't run on these strides (a ``view`` may not)
    or reads its operand by address, or an output of the program, whose strides the caller sees, would change.
    """
    changed: dict[Node, Any] = {} if same_strides(node.meta["val"], value) else {node: value}
    if not changed:
        return changed
    with program.fake_mode or torch.no_grad(), enable_python_dispatcher():
        accepted = all(_follow(reader, changed) for reader in _after(node))
    return changed if accepted else None


def same_strides(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape are laid out alike; the stride of an axis of size 1 says nothing."""
    axes = zip(a.shape, a.stride(), b.stride(), strict=True)
    return all(statically_known_true(size == 1) or statically_known_true(s == t) for size, s, t in axes)


def _after(node: Node) -> list[Node]:
    nodes = list(node.graph.nodes)
    return nodes[nodes.index(node) + 1 :]


def _follow(reader: Node, changed: dict[Node, Any]) -> bool:
    """Whether ``reader`` accepts its changed operands; what it then computes joins ``changed`` if its layout
    differs.
    """
    if not any(operand in changed for operand in reader.all_input_nodes):
        return True
    if reader.op != "call_function" or not _reads_by_index(reader.target):
        return False
    if isinstance(reader.target, torch._ops.OpOverload) and reader.target._schema.is_mutable:
        return reader.args[0] not in changed
    recorded, found = reader.meta.get("val"), _evaluate(reader, changed)
    if not _same_form(recorded, found):
        return False
    if not _same_layout(recorded, found):
        changed[reader] = found
    return True


def _evaluate(reader: Node, changed: dict[Node, Any]) -> Any:
    """What ``reader`` computes; ``None`` when it doesn't run on these strides."""
    assert callable(reader.target)
    args, kwargs = fx.node.map_arg((reader.args, reader.kwargs), lambda n: changed.get(n, n.meta.get("val")))
    try:
        return reader.target(*args, **kwargs)
    except (RuntimeError, ValueError):
        return None


def _reads_by_index(target: object) -> bool:
    if not isinstance(target, torch._ops.OpOverload):
        return getattr(target, "__module__", "") == "_operator"
    return target.namespace in _BY_INDEX and target._schema.name.partition("::")[2].rstrip("_") not in _BY_ADDRESS


def _same_form(recorded: Any, found: Any) -> bool:
    if isinstance(recorded, Tensor):
        return isinstance(found, Tensor) and same_shape(tuple(recorded.shape), tuple(found.shape))
    if isinstance(recorded, list | tuple):
        return isinstance(found, list | tuple) and all(map(_same_form, recorded, found))
    return found is not None


def _same_layout(recorded: Any, found: Any) -> bool:
    if isinstance(recorded, Tensor):
        return same_strides(recorded, found)
    return all(map(_same_layout, recorded, found)) if isinstance(recorded, list | tuple) else True
