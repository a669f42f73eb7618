"""Biases that depend on the distance of key and row alone: proved, and planned as a computation over distances.

    table[bucket(j - i), h]      for all i, j        ->        table[bucket(d), h]      for -Sq < d < Sk

The walk follows one element ``[…, i, j]`` to where it comes from. Integers made of positions must read ``i`` and ``j``
as ``j - i``, pointwise operators are kept to be applied to a row of distances instead of to a plane, tables are read
where the distances say. What reads ``i`` or ``j`` in any other way ends the proof. A step may read no distance at all
(``exp`` of one number for each head): it `varies` over none, and what it computes has one element along them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.fx import Node

from fxopt.analysis.constants import Constants
from fxopt.analysis.domain import SK, SQ, Domain
from fxopt.analysis.index import IndexLifter
from fxopt.analysis.linear import Bounds, Sum, as_expr, as_sum, tidy
from fxopt.analysis.values import is_coarser, is_unrounded
from fxopt.analysis.views import Index, Unreadable, Views
from fxopt.ir.expression import Expr, I, J, call, const, symbol
from fxopt.ir.nodes import arguments, is_tensor, same_size, shape, tensor

aten = torch.ops.aten

_LEADING: Final = (symbol("b"), symbol("h"))
#: What an expression over distances may read.
_LINE: Final = frozenset({J, SQ, SK})
_DEEPEST: Final = 60
#: Operators that act on each element alone, and may be applied to other elements than those they stand for.
_POINTWISE: Final = frozenset({
    "add", "sub", "rsub", "mul", "div", "neg", "abs", "exp", "log", "log2", "sqrt", "rsqrt", "pow", "tanh", "sigmoid",
    "floor", "ceil", "round", "trunc", "floor_divide", "remainder", "clamp", "clamp_min", "clamp_max", "minimum",
    "maximum", "sign", "relu", "where", "masked_fill", "lt", "le", "gt", "ge", "eq", "ne", "__and__", "__or__",
    "bitwise_and", "bitwise_or", "bitwise_not", "logical_and", "logical_or", "logical_not", "to", "_to_copy",
    "log1p", "square", "reciprocal", "min.other", "max.other",
})  # fmt: skip


@dataclass(frozen=True)
class Positions:
    """An expression over the distance, called ``j``, and sizes; its dtype."""

    expr: Expr
    dtype: torch.dtype


@dataclass(frozen=True)
class Applied:
    """The operator of ``node`` applied to operands over distances, by argument position; other arguments stay."""

    node: Node
    operands: tuple[tuple[int, Step], ...]


@dataclass(frozen=True)
class Table:
    """A tensor read at ``b``, ``h``, fixed places, and on at most one axis where ``place`` says."""

    node: Node
    index: tuple[Expr | None, ...]
    place: Step | None = None


@dataclass(frozen=True)
class Diagonals:
    """A constant tensor that is the same along diagonals of the axes read at ``i`` and ``j``."""

    node: Node
    index: Index


Step = Positions | Applied | Table | Diagonals


def varies(step: Step) -> bool:
    """Whether what a step computes has an element for each distance; otherwise it has one for all."""
    if isinstance(step, Positions):
        return step.expr.reads(J)
    if isinstance(step, Applied):
        return any(varies(operand) for _, operand in step.operands)
    return isinstance(step, Diagonals) or (step.place is not None and varies(step.place))


def _is_line(step: Step) -> bool:
    """Whether a step computes the same for every ``b`` and ``h``."""
    if isinstance(step, Positions):
        return True
    if isinstance(step, Applied):
        return all(_is_line(operand) for _, operand in step.operands)
    line = not any(part in _LEADING for part in step.index)
    return line and (isinstance(step, Diagonals) or step.place is None or _is_line(step.place))


class BandPlanner:
    """Plans bands of one program."""

    def __init__(self, constants: Constants, lifter: IndexLifter) -> None:
        self._constants = constants
        self._lifter = lifter
        self._known: dict[tuple[Any, ...], Step | None] = {}

    def plan(self, node: Node, index: Index, domain: Domain) -> Step | None:
        """How to compute ``node`` at ``index`` over distances, or ``None`` where it isn't known to depend on them."""
        key = (node, index, *(str(s) for s in (domain.rows, domain.columns, domain.heads, domain.batch)))
        if key not in self._known:
            try:
                self._known[key] = _Plan(self._constants, self._lifter, domain).step(node, index)
            except Unreadable:
                self._known[key] = None
        return self._known[key]


class _Plan:
    def __init__(self, constants: Constants, lifter: IndexLifter, domain: Domain) -> None:
        self.constants, self.lifter, self.domain = constants, lifter, domain
        self.views = Views(domain)
        self.depth = 0

    def step(self, node: Node, index: Index) -> Step:
        """The plan of one element; raises `Unreadable`."""
        self.depth += 1
        if self.depth > _DEEPEST:
            raise Unreadable("it lies too deep", node)
        found = self._positions(node, index) or self._moved(node, index) or self._read(node, index)
        self.depth -= 1
        return found

    def _positions(self, node: Node, index: Index) -> Step | None:
        lifted = self.lifter.lift(node, index, self.domain)
        if isinstance(lifted, Unreadable) or any(e.op == "capture" for e in lifted.expr.walk()):
            return None
        found = over_distance(lifted.expr)
        if found is None or not found.leaves <= _LINE:
            return None
        dtype = tensor(node).dtype
        # What half precision rounds on the way is computed as it was written.
        return Positions(found, dtype) if not is_coarser(dtype, torch.float32) or is_unrounded(found) else None

    def _moved(self, node: Node, index: Index) -> Step | None:
        source = self.views.source(node, index)
        return None if source is None else self.step(*source)

    def _read(self, node: Node, index: Index) -> Step:
        looked_up = _LOOKUPS.get(node.target) if node.op == "call_function" else None
        if looked_up is not None:
            return looked_up(self, node, index)
        operands = _pointwise_operands(node)
        if operands is not None and _reads_positions(index):
            return Applied(node, tuple((n, self._operand(x, node, index)) for n, x in operands))
        return self._leaf(node, index)

    def _operand(self, value: Node, node: Node, index: Index) -> Step:
        return self.step(value, self.views.broadcast(value, index, node))

    def _leaf(self, node: Node, index: Index) -> Step:
        if not _reads_positions(index):
            return table(node, index)
        if self._same_along_diagonals(node, index):
            return Diagonals(node, index)
        raise Unreadable("it is run-time data that varies with rows or keys", node)

    def _same_along_diagonals(self, node: Node, index: Index) -> bool:
        plain = [p for p in index if p.op == "symbol"]
        if I not in index or J not in index or len(set(plain)) != len(plain) or any(p.op not in _PLAIN for p in index):
            return False
        row, column = index.index(I), index.index(J)
        sizes = shape(node)
        if not same_size(sizes[row], self.domain.rows) or not same_size(sizes[column], self.domain.columns):
            return False
        constants = self.constants.with_buffers
        values = constants.value(node)
        if not isinstance(values, torch.Tensor):
            return False
        plane = values.movedim((row, column), (-2, -1))
        if not bool((plane[..., 1:, 1:] == plane[..., :-1, :-1]).all()):
            return False
        constants.assume(node)
        return True


_PLAIN: Final = ("symbol", "const")


def table(node: Node, index: tuple[Expr | None, ...], place: Step | None = None) -> Table:
    """A tensor read at ``b``, ``h`` and fixed places."""
    named = [part for part in index if part is not None and part.op == "symbol"]
    fits = all(part is None or part in _LEADING or part.op == "const" for part in index)
    if not fits or len(set(named)) != len(named) or (place is not None and not _is_line(place)):
        raise Unreadable("a table that is not read at b, h and fixed places", node)
    return Table(node, index, place)


def _reads_positions(index: Index) -> bool:
    return any(part.reads(I) or part.reads(J) for part in index)


def _pointwise_operands(node: Node) -> tuple[tuple[int, Node], ...] | None:
    """The tensor operands of a pointwise ``node`` by argument position, or ``None`` when it is no such operator."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return None
    overload = str(target).removeprefix("aten.")
    known = overload in _POINTWISE or overload.partition(".")[0] in _POINTWISE
    if not known or overload == "to.other" or any(is_tensor(value) for value in node.kwargs.values()):
        return None
    return tuple((n, value) for n, value in enumerate(node.args) if isinstance(value, Node) and is_tensor(value))


def over_distance(expr: Expr) -> Expr | None:
    """``expr`` at row 0, if it reads row and key as their distance only: the same for ``(i, j)`` as for ``(0, j - i)``.

    Nothing is taken to be known of the indices, since distances go below 0.
    """
    moved = expr.replace(lambda e: call("add", J, I) if e == J else e)
    result = moved.replace(_tidy_node)
    return None if result.reads(I) else result


class _Unbounded(Bounds):
    """No bounds at all."""

    def lower(self, total: Sum) -> float:
        """None known, unless it is a number."""
        return -math.inf if total.terms else total.constant


_NOTHING: Final = _Unbounded(Domain(1, 1, 1, 1))


def _tidy_node(expr: Expr) -> Expr:
    if expr.op in ("add", "sub", "mul", "neg") and _is_whole(expr):
        return as_expr(as_sum(expr))
    if expr.op in ("minimum", "maximum", "floordiv", "mod", "abs") and _is_whole(expr):
        return tidy(expr, _NOTHING)
    if expr.op in ("lt", "le", "gt", "ge", "eq", "ne") and _is_whole(expr):
        return call(expr.op, as_expr(as_sum(expr.args[0]) - as_sum(expr.args[1])), const(0))
    return expr


def _is_whole(expr: Expr) -> bool:
    """Whether all constants are integers and nothing makes a real number."""
    return not any(
        (e.op == "const" and isinstance(e.value, float)) or e.op in ("float", "div", "exp", "log") for e in expr.walk()
    )


def _embedding(plan: _Plan, node: Node, index: Index) -> Step:
    given = arguments(node)
    return table(given["weight"], (None, index[-1]), plan.step(given["indices"], index[:-1]))


def _index(plan: _Plan, node: Node, index: Index) -> Step:
    """``x[…, t, …]`` with one tensor of positions."""
    source, given = node.args[0], list(node.args[1])  # type: ignore[arg-type]
    given += [None] * (len(shape(source)) - len(given))
    places = [n for n, t in enumerate(given) if t is not None]
    if len(places) != 1 or not is_tensor(given[places[0]]) or tensor(given[places[0]]).dtype is torch.bool:
        raise Unreadable("more than one tensor of positions", node)
    (axis,) = places
    rank = len(shape(given[axis]))
    place = plan.step(given[axis], index[axis : axis + rank])
    return table(source, (*index[:axis], None, *index[axis + rank :]), place)  # type: ignore[arg-type]


def _index_select(plan: _Plan, node: Node, index: Index) -> Step:
    given = arguments(node)
    axis = int(given["dim"]) % len(index)
    place = plan.step(given["index"], (index[axis],))
    return table(given["self"], (*index[:axis], None, *index[axis + 1 :]), place)


_LOOKUPS: Final[dict[Any, Callable[[_Plan, Node, Index], Step]]] = {
    aten.embedding.default: _embedding,
    aten.index.Tensor: _index,
    aten.index_select.default: _index_select,
}
