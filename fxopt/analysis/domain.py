"""The index space that an expression is read over, and what is known of its sizes.

A score is read at ``0 <= b < B, 0 <= h < H, 0 <= i < Sq, 0 <= j < Sk``. Sizes may be symbolic. Only what the shape
environment already knows is used (ranges of symbols, which Dynamo guards, and equalities that are already guarded), so
a proof over a domain never needs a guard of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

import torch

from fxopt.ir.expression import Expr, call, const, symbol
from fxopt.ir.nodes import Size, same_size

SQ: Final = symbol("Sq")
SK: Final = symbol("Sk")
#: Sizes at least this large stand for no limit at all.
_UNLIMITED: Final = 2**40

Range = tuple[float, float]


@dataclass(frozen=True)
class Domain:
    """Sizes of the indices ``b, h, i, j``; each an integer or a symbolic size of the graph."""

    batch: Size
    heads: Size
    rows: Size
    columns: Size
    _memo: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def key(self) -> tuple[str, ...]:
        """The sizes as text: equal for domains of the same sizes, symbolic ones too."""
        sizes = (self.batch, self.heads, self.rows, self.columns)
        return tuple(str(size) if isinstance(size, int) else str(size.node.expr) for size in sizes)

    def extent(self, index: str) -> Size:
        """The size along ``index``, one of ``b h i j``."""
        return {"b": self.batch, "h": self.heads, "i": self.rows, "j": self.columns}[index]

    @cached_property
    def last_row(self) -> Expr:
        """``Sq - 1``."""
        return const(self.rows - 1) if isinstance(self.rows, int) else call("add", SQ, const(-1))

    @cached_property
    def last_column(self) -> Expr:
        """``Sk - 1``."""
        if isinstance(self.columns, int):
            return const(self.columns - 1)
        return call("add", self.columns_size, const(-1))

    @cached_property
    def rows_size(self) -> Expr:
        """``Sq`` as an expression, a number where it is one."""
        return const(self.rows) if isinstance(self.rows, int) else SQ

    @cached_property
    def columns_size(self) -> Expr:
        """``Sk`` as an expression: a number where it is one, ``Sq`` where it is the same."""
        if isinstance(self.columns, int):
            return const(self.columns)
        return SQ if same_size(self.rows, self.columns) else SK

    @cached_property
    def ranges(self) -> tuple[Range, Range, Range]:
        """What is known of ``Sq``, ``Sk`` and ``Sk - Sq``."""
        return _range(self.rows), _range(self.columns), _range(self.columns - self.rows)

    def size(self, value: Size) -> Expr | None:
        """A size of the graph over ``Sq`` and ``Sk``, or ``None`` when it is neither constant nor made of those."""
        if isinstance(value, int):
            return const(value)
        key = str(value.node.expr)
        if key not in self._memo:
            self._memo[key] = self._express(value)
        found: Expr | None = self._memo[key]
        return found

    def _express(self, value: torch.SymInt) -> Expr | None:
        if same_size(value, self.rows):
            return self.rows_size
        if same_size(value, self.columns):
            return self.columns_size
        if _constant(value) is not None:
            return const(int(_constant(value) or 0))
        return _solve(value, self._symbols)

    @cached_property
    def _symbols(self) -> dict[Any, Expr]:
        """The symbols of the graph that the sizes determine."""
        known: dict[Any, Expr] = {}
        for size, name in ((self.rows, SQ), (self.columns, self.columns_size)):
            if isinstance(size, torch.SymInt):
                _determine(_expression(size), name, known)
        return known


def _expression(size: torch.SymInt) -> Any:
    """The sympy expression of a size, replacements of equal symbols done."""
    node = size.node
    return node.shape_env.replace(node.expr) if getattr(node, "shape_env", None) is not None else node.expr


def _constant(size: torch.SymInt) -> int | None:
    found: int | None = size.node.maybe_as_int()
    return found


def _determine(expr: Any, name: Expr, known: dict[Any, Expr]) -> None:
    """``expr = name`` solved for its one symbol that is not known yet, where that has the coefficient ±1."""
    free = [s for s in expr.free_symbols if s not in known]
    if len(free) != 1:
        return
    (unknown,) = free
    slope = expr.coeff(unknown)
    rest = expr - slope * unknown
    if slope not in (1, -1) or unknown in rest.free_symbols:
        return
    others = _print(rest, known)
    if others is not None:
        known[unknown] = call("sub", name, others) if slope == 1 else call("sub", others, name)


def _solve(size: torch.SymInt, known: dict[Any, Expr]) -> Expr | None:
    return _print(_expression(size), known)


def _print(expr: Any, known: dict[Any, Expr]) -> Expr | None:
    """A sympy expression of sums, products and symbols as an `Expr`."""
    if expr.is_Integer:
        return const(int(expr))
    if expr in known:
        return known[expr]
    op = "add" if expr.is_Add else "mul" if expr.is_Mul else None
    if op is None:
        return None
    result: Expr | None = None
    for part in expr.args:
        term = _print(part, known)
        if term is None:
            return None
        result = term if result is None else call(op, result, term)
    return result


def _range(size: Size) -> Range:
    """The least and the largest value that a size is known to have."""
    if isinstance(size, int):
        return size, size
    node = size.node
    if node.maybe_as_int() is not None:
        return node.maybe_as_int(), node.maybe_as_int()
    bounds = node.shape_env.bound_sympy(_expression(size))
    return _number(bounds.lower, -math.inf), _number(bounds.upper, math.inf)


def _number(value: Any, unlimited: float) -> float:
    try:
        number = int(value)
    except (OverflowError, TypeError, ValueError, AttributeError):
        return unlimited
    return unlimited if abs(number) >= _UNLIMITED else number
