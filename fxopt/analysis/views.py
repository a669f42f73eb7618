"""Where an element of a view comes from: indices of the result as indices of the operand.

Indices are expressions, one for each axis. Sizes that a mapping depends on are proved equal or it is not made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch.fx import Node

from fxopt.analysis.domain import Domain
from fxopt.analysis.gradients import may_need_gradient
from fxopt.analysis.linear import Bounds, tidy
from fxopt.ir.expression import Expr, call, const
from fxopt.ir.nodes import Size, arguments, same_size, shape

aten = torch.ops.aten

Index = tuple[Expr, ...]
ZERO: Final = const(0)


class Unreadable(Exception):
    """An element can't be followed: the reason and the node."""

    def __init__(self, reason: str, node: Node) -> None:
        super().__init__(reason)
        self.node = node


class Views:
    """Follows indices through views of one program, over one domain."""

    def __init__(self, domain: Domain) -> None:
        self.domain = domain
        self.bounds = Bounds(domain)

    def source(self, node: Node, index: Index) -> tuple[Node, Index] | None:
        """The operand that ``node`` is a view or copy of, and the index there; ``None`` when it is no view.

        Raises:
            Unreadable: it is a view, but of a kind or with sizes that can't be followed.
        """
        follow = _VIEWS.get(node.target) if node.op == "call_function" else None
        if follow is None:
            return None
        operand = node.args[0]
        assert isinstance(operand, Node)
        if node.target is aten.detach.default and may_need_gradient(operand):
            raise Unreadable("no gradient may flow into what it is computed from", node)
        return operand, follow(self, node, index)

    def tidy(self, expr: Expr) -> Expr:
        """An index in one form."""
        return tidy(expr, self.bounds)

    def size(self, value: Any, node: Node) -> Expr:
        """A size, given as a number, a symbol or a node, as an expression."""
        if isinstance(value, Node):
            value = value.meta.get("val")
        found = self.domain.size(value) if isinstance(value, int | torch.SymInt) else None
        if found is None:
            raise Unreadable(f"{value} is not a size made of the lengths of queries and keys", node)
        return found

    def broadcast(self, operand: Node, index: Index, node: Node) -> Index:
        """The index into ``operand``, broadcast against a result of the shape of ``node``."""
        sizes, full = shape(operand), shape(node)[len(shape(node)) - len(shape(operand)) :]
        inner = index[len(index) - len(sizes) :]
        return tuple(self.aligned(s, f, i, node) for s, f, i in zip(sizes, full, inner, strict=True))

    @staticmethod
    def aligned(size: Size, full: Size, index: Expr, node: Node) -> Expr:
        """The index into one axis of ``size`` that is broadcast to ``full``."""
        if same_size(size, 1):
            return ZERO
        if not same_size(size, full):
            raise Unreadable(f"size {size} is not known to be {full}", node)
        return index


def _same(views: Views, node: Node, index: Index) -> Index:
    return index


def _unsqueeze(views: Views, node: Node, index: Index) -> Index:
    axis = int(arguments(node)["dim"]) % len(index)
    return (*index[:axis], *index[axis + 1 :])


def _transpose(views: Views, node: Node, index: Index) -> Index:
    given, order = arguments(node), list(index)
    a, b = (int(given[name]) % len(index) for name in ("dim0", "dim1"))
    order[a], order[b] = order[b], order[a]
    return tuple(order)


def _swap_last(views: Views, node: Node, index: Index) -> Index:
    return index if len(index) < 2 else (*index[:-2], index[-1], index[-2])


def _permute(views: Views, node: Node, index: Index) -> Index:
    axes = [int(a) % len(index) for a in arguments(node)["dims"]]
    return tuple(index[axes.index(axis)] for axis in range(len(axes)))


def _expand(views: Views, node: Node, index: Index) -> Index:
    operand = node.args[0]
    assert isinstance(operand, Node)
    return views.broadcast(operand, index, node)


def _select(views: Views, node: Node, index: Index) -> Index:
    given, operand = arguments(node), node.args[0]
    axis = int(given["dim"]) % len(shape(operand))
    place = views.size(given["index"], node)
    if place.op == "const" and int(place.value or 0) < 0:
        place = call("add", views.size(shape(operand)[axis], node), place)
    elif views.bounds.between(place)[0] < 0:
        raise Unreadable("the place may be counted from the end", node)
    return (*index[:axis], views.tidy(place), *index[axis:])


def _slice(views: Views, node: Node, index: Index) -> Index:
    given, operand = arguments(node), node.args[0]
    axis = int(given["dim"]) % len(index)
    step, start = given["step"], given["start"]
    if not isinstance(step, int):
        raise Unreadable("the step of the slice is symbolic", node)
    place = index[axis] if step == 1 else call("mul", index[axis], const(step))
    if start is not None and not (isinstance(start, int) and start == 0):
        place = call("add", place, _start(views, node, shape(operand)[axis], shape(node)[axis]))
    return (*index[:axis], views.tidy(place), *index[axis + 1 :])


def _start(views: Views, node: Node, before: Size, after: Size) -> Expr:
    """Where a slice starts, counted from the front. It is clamped to the axis, but an empty slice is never read."""
    given = arguments(node)
    end = given["end"]
    if given["step"] == 1 and (end is None or (isinstance(end, int) and end >= 2**62)):
        # What runs to the end starts at the difference of the sizes, however the start is written.
        return call("sub", views.size(before, node), views.size(after, node))
    place = views.size(given["start"], node)
    if views.bounds.between(place)[1] < 0:
        place = views.tidy(call("add", place, views.size(before, node)))
    if views.bounds.between(place)[0] < 0:
        raise Unreadable("the start of the slice may lie before the axis", node)
    return place


def _flip(views: Views, node: Node, index: Index) -> Index:
    axes = {int(a) % len(index) for a in arguments(node)["dims"]}
    sizes = shape(node)
    last = {a: call("sub", views.size(sizes[a], node), const(1)) for a in axes}
    return tuple(views.tidy(call("sub", last[a], part)) if a in axes else part for a, part in enumerate(index))


def _reshape(views: Views, node: Node, index: Index) -> Index:
    """Row-major order is kept: axes are matched in groups of equal product."""
    before, after = list(shape(node.args[0])), list(shape(node))
    result: list[Expr] = []
    position = 0
    while before or position < len(after):
        group, taken = _group(before, after[position:], node)
        places = index[position : position + taken]
        result.extend(_regroup(views, before[:group], after[position : position + taken], places, node))
        before, position = before[group:], position + taken
    return tuple(result)


def _group(before: list[Size], after: list[Size], node: Node) -> tuple[int, int]:
    """How many leading axes of each hold the same number of elements, at least one in all."""
    if before and same_size(before[0], 1):
        return 1, 0
    if after and same_size(after[0], 1):
        return 0, 1
    left: Size = 1
    for a, size in enumerate(before, 1):
        left = left * size
        right: Size = 1
        for b, other in enumerate(after, 1):
            right = right * other
            if same_size(left, right):
                return a, b
    raise Unreadable(f"the view from {tuple(before)} to {tuple(after)} can't be followed", node)


def _regroup(views: Views, before: list[Size], after: list[Size], index: Index, node: Node) -> list[Expr]:
    """The indices of one group: the position in row-major order, divided by the operand's strides."""
    if len(before) == len(after) == 1:
        return list(index)
    if not before or not after:
        return [ZERO] * len(before)
    flat: Expr = index[0]
    for size, place in zip(after[1:], index[1:], strict=True):
        flat = call("add", call("mul", flat, views.size(size, node)), place)
    result: list[Expr] = []
    for size in reversed(before[1:]):
        extent = views.size(size, node)
        if extent.op != "const":
            raise Unreadable(f"the view divides by the symbolic size {size}", node)
        result.append(views.tidy(call("mod", flat, extent)))
        flat = call("floordiv", flat, extent)
    return [views.tidy(flat), *reversed(result)]


_VIEWS: Final[dict[Any, Callable[[Views, Node, Index], Index]]] = {
    aten.alias.default: _same,
    aten.clone.default: _same,
    aten.contiguous.default: _same,
    aten.detach.default: _same,
    aten.lift_fresh_copy.default: _same,
    aten.unsqueeze.default: _unsqueeze,
    aten.transpose.int: _transpose,
    aten.t.default: _swap_last,
    aten.mT.default: _swap_last,
    aten.permute.default: _permute,
    aten.expand.default: _expand,
    aten.expand_as.default: _expand,
    aten.broadcast_to.default: _expand,
    aten.select.int: _select,
    aten.slice.Tensor: _slice,
    aten.flip.default: _flip,
    aten.view.default: _reshape,
    aten.reshape.default: _reshape,
    aten._unsafe_view.default: _reshape,
    aten.view_as.default: _reshape,
    aten.flatten.using_ints: _reshape,
    aten.unflatten.int: _reshape,
    aten.squeeze.default: _reshape,
    aten.squeeze.dim: _reshape,
    aten.squeeze.dims: _reshape,
}
