"""Additive masks written as arithmetic on a boolean one: ``(1 - m.to(dtype)) * lowest`` is ``where(m, 0, lowest)``."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch.fx import Node

from fxopt.analysis.constants import Constants
from fxopt.analysis.fills import FILLS
from fxopt.ir.expression import const
from fxopt.ir.nodes import is_call, is_tensor, same_shape, shape, tensor

aten = torch.ops.aten

#: Pointwise operators that such arithmetic is made of.
_ARITHMETIC: Final = (
    aten.to.dtype, aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar,
    aten.rsub.Tensor, aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.neg.default, aten.masked_fill.Scalar,
    aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.logical_not.default, aten.bitwise_not.default,
)  # fmt: skip


def two_values(node: Node, constants: Constants) -> tuple[Node, float, float] | None:
    """The boolean tensor that a real ``node`` of its shape is computed from by arithmetic with numbers alone, and what
    true and false become, if that is 0 for one and a number that hides keys for the other.

    Both are computed by the operators themselves, in their dtypes. Integers are not looked through: a mask of integers
    may hold more than 0 and 1.
    """
    if not tensor(node).dtype.is_floating_point or constants.is_constant(node):
        return None
    found: dict[Node, torch.Tensor] = {}
    source = _source(node, constants)
    if source is None:
        return None
    found[source] = torch.tensor([True, False])
    true, false = (float(value) + 0.0 for value in _value(node, found, constants).tolist())
    hides = {const(true), const(false)} & {*FILLS}
    return (source, true, false) if 0.0 in (true, false) and hides else None


def _source(node: Node, constants: Constants) -> Node | None:
    """The one boolean tensor that ``node`` is computed from, element by element."""
    sources: set[Node] = set()
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        if not is_tensor(current) or not same_shape(shape(current), shape(node)):
            return None
        if tensor(current).dtype is torch.bool and not _is_cast_of_real(current):
            sources.add(current)
            continue
        if not is_call(current, *_ARITHMETIC):
            return None
        fresh = [n for n in current.all_input_nodes if n not in seen and constants.number(n) is None]
        seen.update(fresh)
        pending.extend(fresh)
    return sources.pop() if len(sources) == 1 else None


def _is_cast_of_real(node: Node) -> bool:
    """Whether ``node`` is a real tensor made boolean: arithmetic like any other."""
    return is_call(node, aten.to.dtype) and tensor(node.all_input_nodes[0]).dtype.is_floating_point


def _value(node: Node, known: dict[Node, torch.Tensor], constants: Constants) -> torch.Tensor:
    def operand(argument: Node) -> Any:
        if argument in known:
            return known[argument]
        number = constants.number(argument)
        if number is None:
            return _value(argument, known, constants)
        return torch.tensor(number, dtype=tensor(argument).dtype)

    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), operand)
    assert callable(node.target)
    value: torch.Tensor = node.target(*args, **kwargs)
    known[node] = value
    return value
