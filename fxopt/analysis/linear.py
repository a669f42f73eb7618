"""Integer expressions as sums, and what they lie between over a domain.

    Σ coefficient·atom + constant

where an atom is a symbol or anything that is not a sum: a captured integer, a quotient, a remainder.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from fxopt.analysis.domain import SK, SQ, Domain
from fxopt.ir.expression import Expr, I, J, call, const, symbol

#: Constants beyond this would not fit the 32 bits in which kernels compute with integers.
LARGEST: Final = 2**31 - 1
#: No sequence is longer than this: what a symbolic length is taken to be at most where it is asked what a dtype holds.
LONGEST: Final = 2**24
_B: Final = symbol("b")
_H: Final = symbol("h")


@dataclass(frozen=True)
class Sum:
    """``Σ coefficient·atom + constant``; no coefficient is 0."""

    terms: Mapping[Expr, int] = field(default_factory=dict)
    constant: int = 0

    def __add__(self, other: Sum) -> Sum:
        terms = dict(self.terms)
        for atom, factor in other.terms.items():
            terms[atom] = terms.get(atom, 0) + factor
        return Sum({a: f for a, f in terms.items() if f}, self.constant + other.constant)

    def __sub__(self, other: Sum) -> Sum:
        return self + other.times(-1)

    def __hash__(self) -> int:
        return hash((frozenset(self.terms.items()), self.constant))

    def times(self, factor: int) -> Sum:
        """Every coefficient multiplied."""
        return Sum({a: f * factor for a, f in self.terms.items()} if factor else {}, self.constant * factor)

    def plus(self, number: int) -> Sum:
        """The constant increased."""
        return Sum(self.terms, self.constant + number)

    def factor(self, atom: Expr) -> int:
        """The coefficient of ``atom``."""
        return self.terms.get(atom, 0)

    def without(self, *atoms: Expr) -> Sum:
        """The sum less the terms of ``atoms``."""
        return Sum({a: f for a, f in self.terms.items() if a not in atoms}, self.constant)


def as_sum(expr: Expr) -> Sum:
    """An integer expression as a sum; what is not one becomes an atom."""
    if expr.op == "const" and isinstance(expr.value, int):
        return Sum(constant=int(expr.value))
    if expr.op in ("add", "sub"):
        left, right = (as_sum(a) for a in expr.args)
        return left + right if expr.op == "add" else left - right
    if expr.op == "neg":
        return as_sum(expr.args[0]).times(-1)
    if expr.op == "mul":
        left, right = (as_sum(a) for a in expr.args)
        for known, other in ((left, right), (right, left)):
            if not known.terms:
                return other.times(known.constant)
    return Sum({expr: 1})


def as_expr(total: Sum) -> Expr:
    """A sum as an expression: indices first, then the rest in the order it came in, positive terms before negative."""
    order = {J: 0, I: 1, SK: 2, SQ: 3}
    terms = sorted(total.terms.items(), key=lambda term: (term[1] < 0, order.get(term[0], 4), str(term[0])))
    result: Expr | None = None
    for atom, factor in terms:
        if result is None:
            result = _term(atom, factor)
        else:
            result = call("add" if factor > 0 else "sub", result, _term(atom, abs(factor)))
    if result is None:
        return const(total.constant)
    return call("add", result, const(total.constant)) if total.constant else result


def _term(atom: Expr, factor: int) -> Expr:
    if factor == 1:
        return atom
    return call("neg", atom) if factor == -1 else call("mul", atom, const(factor))


class Bounds:
    """Bounds of integer expressions over one domain, where no symbolic size is larger than ``longest``."""

    def __init__(self, domain: Domain, longest: float = math.inf) -> None:
        self.domain = domain
        self.longest = longest
        self._ranges: dict[str, tuple[float, float]] = {}

    def lower(self, total: Sum) -> float:
        """A number that ``total`` is never below, −∞ when none is known."""
        total = self._at_end(self._at_end(total, J, self.domain.last_column), I, self.domain.last_row)
        sizes, low = Sum({a: f for a, f in total.terms.items() if a in (SQ, SK)}), float(total.constant)
        for atom, factor in total.without(SQ, SK).terms.items():
            reach = self.range(atom)
            low += factor * (reach[0] if factor > 0 else reach[1])
        return low + self._sizes(sizes.factor(SQ), sizes.factor(SK))

    def upper(self, total: Sum) -> float:
        """A number that ``total`` is never above, ∞ when none is known."""
        return -self.lower(total.times(-1))

    def between(self, expr: Expr) -> tuple[float, float]:
        """Both bounds of an integer expression."""
        total = as_sum(expr)
        return self.lower(total), self.upper(total)

    def range(self, atom: Expr) -> tuple[float, float]:
        """What an atom lies between."""
        key = str(atom)
        if key not in self._ranges:
            self._ranges[key] = self._range(atom)
        return self._ranges[key]

    def _range(self, atom: Expr) -> tuple[float, float]:
        if atom in (_B, _H):
            size = self.domain.batch if atom == _B else self.domain.heads
            return 0, (size - 1 if isinstance(size, int) else self.longest)
        if atom.op in ("mod", "floordiv"):
            return self._division(atom)
        if atom.op == "mul":
            return _product(*(self.between(a) for a in atom.args))
        if atom.op in ("minimum", "maximum"):
            first, second = (self.between(a) for a in atom.args)
            pick = min if atom.op == "minimum" else max
            return pick(first[0], second[0]), pick(first[1], second[1])
        if atom.op == "abs":
            low, high = self.between(atom.args[0])
            return max(low, -high, 0), max(abs(low), abs(high))
        if atom.op == "where":
            first, second = (self.between(a) for a in atom.args[1:])
            return min(first[0], second[0]), max(first[1], second[1])
        return -math.inf, math.inf

    def _division(self, atom: Expr) -> tuple[float, float]:
        low, high = self.between(atom.args[0])
        least, largest = self.between(atom.args[1])
        if least <= 0:
            return -math.inf, math.inf
        if atom.op == "mod":
            return 0, largest - 1
        return min(_floor(low, least), _floor(low, largest)), max(_floor(high, least), _floor(high, largest))

    @staticmethod
    def _at_end(total: Sum, index: Expr, last: Expr) -> Sum:
        """``total`` with ``index``, from 0 to ``last``, where it makes the sum least."""
        factor = total.factor(index)
        if not factor:
            return total
        rest = total.without(index)
        return rest if factor > 0 else rest + as_sum(last).times(factor)

    def _sizes(self, row: int, column: int) -> float:
        """The least of ``row·Sq + column·Sk``, by their own ranges or by that of their difference."""
        rows, columns, difference = (self._limited(reach) for reach in self.domain.ranges)
        return max(
            _least(row, rows) + _least(column, columns),
            _least(row + column, rows) + _least(column, difference),
            _least(row + column, columns) + _least(-row, difference),
        )

    def _limited(self, reach: tuple[float, float]) -> tuple[float, float]:
        return max(reach[0], -self.longest), min(reach[1], self.longest)


def _product(left: tuple[float, float], right: tuple[float, float]) -> tuple[float, float]:
    """What the product of two numbers lies between; 0 times what knows no bound is 0."""
    ends = [a * b if a and b else 0.0 for a in left for b in right]
    return min(ends), max(ends)


def _least(factor: int, reach: tuple[float, float]) -> float:
    return 0.0 if not factor else factor * (reach[0] if factor > 0 else reach[1])


def _floor(value: float, divisor: float) -> float:
    if math.isinf(value):
        return value
    return value // divisor if math.isfinite(divisor) else (-1.0 if value < 0 else 0.0)


def tidy(expr: Expr, bounds: Bounds) -> Expr:
    """An integer expression in one form: sums collected, quotients and remainders reduced as far as bounds allow."""
    return as_expr(_tidy(expr, bounds))


def _tidy(expr: Expr, bounds: Bounds) -> Sum:
    if expr.op in ("add", "sub", "neg", "mul"):
        parts = [as_expr(_tidy(a, bounds)) for a in expr.args]
        return as_sum(call(expr.op, *parts))
    if expr.op in ("floordiv", "mod"):
        total, divisor = (_tidy(a, bounds) for a in expr.args)
        return _divide(expr.op, total, divisor, bounds)
    if expr.op in ("minimum", "maximum"):
        left, right = (_tidy(a, bounds) for a in expr.args)
        return _choose(expr.op, left, right, bounds)
    if expr.op == "abs":
        inner = _tidy(expr.args[0], bounds)
        if bounds.lower(inner) >= 0:
            return inner
        return inner.times(-1) if bounds.upper(inner) <= 0 else Sum({call("abs", as_expr(inner)): 1})
    return as_sum(expr)


def _divide(op: str, total: Sum, divisor: Sum, bounds: Bounds) -> Sum:
    n = divisor.constant
    if divisor.terms or n <= 0:
        return Sum({call(op, as_expr(total), as_expr(divisor)): 1})
    whole = Sum({a: f // n for a, f in total.terms.items() if f % n == 0}, total.constant // n)
    rest = Sum({a: f for a, f in total.terms.items() if f % n}, total.constant % n)
    if bounds.lower(rest) >= 0 and bounds.upper(rest) < n:
        return whole if op == "floordiv" else rest
    if op == "mod":
        return Sum({call("mod", as_expr(rest), const(n)): 1})
    return whole + Sum({call("floordiv", as_expr(rest), const(n)): 1})


def _choose(op: str, left: Sum, right: Sum, bounds: Bounds) -> Sum:
    smaller, larger = (left, right) if op == "minimum" else (right, left)
    if bounds.lower(right - left) >= 0:
        return smaller
    if bounds.lower(left - right) >= 0:
        return larger
    return Sum({call(op, as_expr(left), as_expr(right)): 1})


def reads_any(expr: Expr, atoms: Iterable[Expr]) -> bool:
    """Whether ``expr`` reads one of ``atoms``, symbols or captures."""
    return not expr.leaves.isdisjoint(atoms)
