"""Bands: a bias over distances, built by the operators that built its plane, on a row of distances instead."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch.fx import Node

from fxopt.analysis.bands import Applied, BandPlanner, Diagonals, Positions, Step, Table, varies
from fxopt.analysis.views import ZERO, Unreadable, Views
from fxopt.errors import VerificationError
from fxopt.ir.attention import Capture
from fxopt.ir.expression import Expr, I, J, symbol
from fxopt.ir.nodes import is_call, may_be_same_size, same_size, shape, tensor
from fxopt.passes.attention.masking import Masked
from fxopt.passes.attention.positions import Captured, domain_of, read_at
from fxopt.passes.attention.proofs import captures_of
from fxopt.passes.attention.space import Space, with_adjacent_keys
from fxopt.rewriter.builder import Builder

aten = torch.ops.aten

_OPERATORS: Final[dict[str, Any]] = {
    "add": aten.add.Tensor, "sub": aten.sub.Tensor, "mul": aten.mul.Tensor, "neg": aten.neg.default,
    "abs": aten.abs.default, "minimum": aten.minimum.default, "maximum": aten.maximum.default,
    "floordiv": aten.floor_divide.default, "mod": aten.remainder.Tensor, "lt": aten.lt.Tensor, "le": aten.le.Tensor,
    "gt": aten.gt.Tensor, "ge": aten.ge.Tensor, "eq": aten.eq.Tensor, "ne": aten.ne.Tensor,
    "and": aten.logical_and.default, "or": aten.logical_or.default, "not": aten.logical_not.default,
    "where": aten.where.self,
}  # fmt: skip
_TRUTH: Final = frozenset({"lt", "le", "gt", "ge", "eq", "ne", "and", "or", "not"})


def can_build(step: Step) -> bool:
    """Whether every expression over distances can be written with operators of the graph."""
    if isinstance(step, Positions):
        return all(not e.args or e.op in _OPERATORS or e.op == "float" for e in step.expr.walk())
    if isinstance(step, Applied):
        return all(can_build(operand) for _, operand in step.operands)
    return not isinstance(step, Table) or step.place is None or can_build(step.place)


@dataclass(frozen=True)
class Length:
    """The size of a site along its rows or its keys: a number, or an axis of a tensor that has it."""

    node: Node
    axis: int

    def size(self, builder: Builder) -> Any:
        """The size as a number or a node."""
        return builder.size(self.node, self.axis)


def length_of(node: Node, axis: int, space: Space) -> Length:
    """Where the size of an axis is read: at the tensor that ``node`` is a view or a repetition of."""
    views, wanted = Views(domain_of(space)), shape(node)[axis]
    axis %= len(shape(node))
    while True:
        found = _origin(views, node, axis)
        if found is None or not same_size(shape(found[0])[found[1]], wanted):
            return Length(node, axis)
        node, axis = found


def _origin(views: Views, node: Node, axis: int) -> tuple[Node, int] | None:
    if is_call(node, torch.ops.fxopt.repeat_heads.default):
        return node.args[0], axis  # type: ignore[return-value]
    index = tuple(J if n == axis else ZERO for n in range(len(shape(node))))
    try:
        source = views.source(node, index)
    except Unreadable:
        return None
    return None if source is None or J not in source[1] else (source[0], source[1].index(J))


def with_bands(
    masked: Masked, operands: Sequence[Captured], space: Space, planner: BandPlanner, lengths: tuple[Length, Length]
) -> tuple[Captured, ...]:
    """The operands, those planes that the expressions read and that depend on the distance alone as bands."""
    read = captures_of(masked.score, masked.mask)
    domain = domain_of(space)

    def changed(number: int, operand: Captured) -> Captured:
        found = read_at(operand, space) if number in read else None
        if found is None or not (I in found[1] and J in found[1]):
            return operand
        step = planner.plan(*found, domain)
        return operand if step is None or not can_build(step) else Band(operand.node, step, lengths)

    return tuple(changed(n, operand) for n, operand in enumerate(operands))


@dataclass(frozen=True)
class Band:
    """A captured tensor ``[B|1, H|1, 1, S + T - 1]`` in place of the plane ``node``; where that is the same for all
    distances, ``[B|1, H|1, 1, 1]``.
    """

    node: Node
    step: Step
    lengths: tuple[Length, Length]

    def obstacle(self, space: Space) -> str:
        """None: the plan was made for the space."""
        return ""

    def capture(self, builder: Builder, space: Space) -> tuple[Node, Capture]:
        """Build the band.

        Raises:
            VerificationError: it is not as long as it is read.
        """
        built = _Building(builder, self.lengths, tensor(self.node).device).node(self.step)
        batch, heads = ("-" if same_size(size, 1) else letter for size, letter in zip(shape(built), "bh", strict=False))
        band = with_adjacent_keys(builder, builder.call(aten.unsqueeze.default, built, 2))
        line = varies(self.step)
        length = shape(band)[3]
        expected = space.rows + space.columns - 1 if line else 1
        if not may_be_same_size(length, expected):
            raise VerificationError(f"the band of {self.node} is {length} long, but read as if it were {expected}")
        return band, Capture(f"{batch}{heads}-{'d' if line else '-'}", tensor(band).dtype)


@dataclass
class _Building:
    """Adds the nodes of one band. Every tensor is ``[B|1, H|1, S + T - 1|1]``."""

    builder: Builder
    lengths: tuple[Length, Length]
    device: torch.device
    _known: dict[Any, Node] = field(default_factory=dict)

    def node(self, step: Step) -> Node:
        """The tensor that a step computes."""
        if step not in self._known:
            self._known[step] = _BUILD[type(step)](self, step)
        return self._known[step]

    def positions(self, step: Positions) -> Node:
        """An expression over the distances."""
        return self.builder.cast(self.value(step.expr), step.dtype)

    def value(self, expr: Expr) -> Node:
        """One part of it."""
        if expr == J:
            return self.distances
        if expr.op == "symbol":
            size = self.size(0 if expr == symbol("Sq") else 1)
            return self._number(size, torch.int64)
        if expr.op == "const":
            dtypes = {bool: torch.bool, int: torch.int64, float: torch.float64}
            return self._number(expr.value, dtypes[type(expr.value)])
        parts = [self.value(a) for a in expr.args]
        return self.builder.call(_OPERATORS[expr.op], *parts) if expr.op != "float" else parts[0]

    def _number(self, value: Any, dtype: torch.dtype) -> Node:
        return self.builder.call(aten.full.default, [1, 1, 1], value, dtype=dtype, device=self.device)

    @property
    def distances(self) -> Node:
        """``-(S - 1) … T - 1`` as ``[1, 1, S + T - 1]``."""
        if J not in self._known:
            rows, columns = self.size(0), self.size(1)
            first = 1 - rows if isinstance(rows, int) else self.builder.call(operator.sub, 1, rows)
            line = self.builder.call(aten.arange.start, first, columns, dtype=torch.int64, device=self.device)
            self._known[J] = self._arranged(line, ["j"])
        return self._known[J]

    def size(self, which: int) -> Any:
        """``S`` or ``T``, a number or a node."""
        return self.lengths[which].size(self.builder)

    def applied(self, step: Applied) -> Node:
        """The operator on other operands."""
        args = list(step.node.args)
        for position, operand in step.operands:
            args[position] = self.node(operand)
        assert callable(step.node.target)
        return self.builder.call(step.node.target, *args, **step.node.kwargs)

    def table(self, step: Table) -> Node:
        """The table with its axes in the order ``b``, ``h``, distance."""
        node, letters = step.node, ["" for _ in step.index]
        for axis, part in enumerate(step.index):
            if part is None:
                assert step.place is not None
                place = self.builder.reshape(self.node(step.place), [-1])
                node = self.builder.call(aten.index_select.default, node, axis, place)
                letters[axis] = "j"
            elif part.op == "symbol":
                letters[axis] = str(part)
        for axis in reversed([n for n, letter in enumerate(letters) if not letter]):
            fixed = step.index[axis]
            assert fixed is not None
            node = self.builder.call(aten.select.int, node, axis, int(fixed.value or 0))
        return self._arranged(node, [letter for letter in letters if letter])

    def diagonals(self, step: Diagonals) -> Node:
        """The first column from the last row up, then the first row."""
        names = [str(part) if part.op == "symbol" else "" for part in step.index]
        column, row = step.node, step.node
        for axis in reversed(range(len(names))):
            part = step.index[axis]
            if part == I:
                column = self.builder.call(aten.slice.Tensor, column, axis, 1, 2**63 - 1)
                row = self.builder.call(aten.select.int, row, axis, 0)
            elif part == J:
                column = self.builder.call(aten.select.int, column, axis, 0)
            elif part.op == "const":
                row, column = (self.builder.call(aten.select.int, x, axis, int(part.value or 0)) for x in (row, column))
        column = self._arranged(column, [n if n != "i" else "j" for n in names if n not in ("", "j")])
        row = self._arranged(row, [n for n in names if n not in ("", "i")])
        return self.builder.call(aten.cat.default, [self.builder.call(aten.flip.default, column, [2]), row], 2)

    def _arranged(self, node: Node, letters: list[str]) -> Node:
        order = sorted(range(len(letters)), key=lambda axis: "bhj".index(letters[axis]))
        if order != sorted(order):
            node = self.builder.call(aten.permute.default, node, order)
        for axis, letter in enumerate("bhj"):
            if letter not in letters:
                node = self.builder.call(aten.unsqueeze.default, node, axis)
        return node


_BUILD: Final[dict[type, Callable[[_Building, Any], Node]]] = {
    Positions: _Building.positions, Applied: _Building.applied, Table: _Building.table,
    Diagonals: _Building.diagonals,
}  # fmt: skip
