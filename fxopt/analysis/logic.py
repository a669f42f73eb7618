"""Boolean expressions over a domain, in the form in which kernels look for bounds.

Comparisons of integers become ``j <= i + c``, ``j >= i + c`` or, where no index stands alone, ``left <= right``; what
the domain decides becomes True or False; terms that others imply are dropped. Every step is an equivalence for all
``0 <= i < Sq, 0 <= j < Sk`` and all sizes that the domain allows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from math import gcd
from typing import Final

from fxopt.analysis.domain import Domain
from fxopt.analysis.linear import Bounds, Sum, as_expr, as_sum, reads_any, tidy
from fxopt.ir.expression import Expr, I, J, Kind, call, const, kind

TRUE: Final = const(True)
FALSE: Final = const(False)
_INFIX: Final = frozenset({"lt", "le", "gt", "ge", "eq", "ne", "and", "or"})
_NEGATED: Final = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt", "eq": "ne", "ne": "eq"}


class Logic:
    """Simplifies and proves over one domain; ``captures`` are the kinds of the captured tensors.

    What was simplified once is remembered, by its printed form: equal constants of different kinds differ there.
    """

    def __init__(self, domain: Domain, captures: tuple[Kind, ...] = ()) -> None:
        self.bounds = Bounds(domain)
        self.domain = domain
        self._captures = captures
        self._simple: dict[tuple[str, bool], Expr] = {}
        self._tidy: dict[str, Sum] = {}

    @property
    def captures(self) -> tuple[Kind, ...]:
        """The kinds of the captured tensors."""
        return self._captures

    @captures.setter
    def captures(self, kinds: tuple[Kind, ...]) -> None:
        if kinds != self._captures:
            self._captures = kinds
            self._simple.clear()

    def simplify(self, expr: Expr, negated: bool = False) -> Expr:
        """A boolean expression, or its negation, without ``not`` above a comparison."""
        key = str(expr), negated
        if key not in self._simple:
            self._simple[key] = self._simplify(expr, negated)
        return self._simple[key]

    def _simplify(self, expr: Expr, negated: bool) -> Expr:
        if expr.op == "const":
            return const(bool(expr.value) != negated)
        if expr.op == "not":
            return self.simplify(expr.args[0], not negated)
        if expr.op in ("and", "or"):
            op = expr.op if not negated else {"and": "or", "or": "and"}[expr.op]
            left, right = (self.simplify(a, negated) for a in expr.args)
            return self.both(left, right) if op == "and" else self.either(left, right)
        if expr.op == "where":
            return self._choice(expr, negated)
        if expr.op in _NEGATED:
            return self._comparison(_NEGATED[expr.op] if negated else expr.op, *expr.args)
        return call("not", expr) if negated else expr

    def both(self, left: Expr, right: Expr) -> Expr:
        """``left & right``."""
        return self._join("and", FALSE, TRUE, self.implies, left, right)

    def either(self, left: Expr, right: Expr) -> Expr:
        """``left | right``."""
        return self._join("or", TRUE, FALSE, lambda a, b: self.implies(b, a), left, right)

    def implies(self, premise: Expr, conclusion: Expr) -> bool:
        """Whether ``conclusion`` is known to hold wherever ``premise`` does."""
        if premise in (conclusion, FALSE) or conclusion == TRUE:
            return True
        if conclusion.op == "and":
            return all(self.implies(premise, part) for part in conclusion.args)
        if premise.op == "or":
            return all(self.implies(part, conclusion) for part in premise.args)
        if premise.op == "and" and any(self.implies(part, conclusion) for part in premise.args):
            return True
        if conclusion.op == "or":
            return any(self.implies(premise, part) for part in conclusion.args)
        known, wanted = _slack(premise), _slack(conclusion)
        return known is not None and wanted is not None and self.bounds.lower(wanted - known) >= 0

    def every_row_keeps_a_key(self, mask: Expr) -> bool:
        """Whether for each row some key is certain to satisfy ``mask``: a witness, a key that depends on the row."""
        if J not in mask.leaves:
            return self.simplify(mask) == TRUE and bool(self._witnesses)
        return any(self.simplify(mask.put(J, key)) == TRUE for key in self._witnesses)

    @cached_property
    def _witnesses(self) -> tuple[Expr, ...]:
        """Keys, as functions of the row, that there are for each row."""
        last = self.domain.last_column
        diagonal = call("sub", call("add", I, self.domain.columns_size), self.domain.rows_size)
        ends = [call("minimum", part, last) for part in (I, diagonal)]
        found = (I, diagonal, const(0), last, *ends, *(call("maximum", part, const(0)) for part in (diagonal,)))
        return tuple(key for key in found if self._is_key(key))

    def _is_key(self, key: Expr) -> bool:
        beyond = call("sub", self.domain.last_column, key)
        return all(self.bounds.lower(self._sum(end)) >= 0 for end in (key, beyond))

    def _sum(self, expr: Expr) -> Sum:
        """An integer expression in one form, as a sum."""
        key = str(expr)
        if key not in self._tidy:
            self._tidy[key] = as_sum(tidy(expr, self.bounds))
        return self._tidy[key]

    def _join(
        self, op: str, absorbing: Expr, neutral: Expr, implies: Callable[[Expr, Expr], bool], left: Expr, right: Expr
    ) -> Expr:
        kept: list[Expr] = []
        for term in (*parts(left, op), *parts(right, op)):
            if term == absorbing or (op == "and" and any(self._exclude(term, other) for other in kept)):
                return absorbing
            if term == neutral or any(implies(other, term) for other in kept):
                continue
            kept = [other for other in kept if not implies(term, other)]
            kept.append(term)
        result = neutral
        for term in kept:
            result = term if result == neutral else call(op, result, term)
        return result

    def _exclude(self, one: Expr, other: Expr) -> bool:
        first, second = _slack(one), _slack(other)
        return first is not None and second is not None and self.bounds.upper(first + second) < 0

    def _choice(self, expr: Expr, negated: bool) -> Expr:
        condition, kept, otherwise = expr.args
        chosen = self.both(self.simplify(condition), self.simplify(kept, negated))
        return self.either(chosen, self.both(self.simplify(condition, True), self.simplify(otherwise, negated)))

    def _comparison(self, op: str, left: Expr, right: Expr) -> Expr:
        kinds = {kind(a, self.captures) for a in (left, right)}
        if kinds == {"bool"} and op in ("eq", "ne"):
            return self._agree(left, right, op == "ne")
        if kinds != {"int"}:
            return call(op, left, right)
        sides = self._sum(left), self._sum(right)
        total = sides[1] - sides[0]
        if op in ("eq", "ne"):
            return self._equality(op, total)
        total = total.times(-1) if op in ("gt", "ge") else total
        strict = op in ("lt", "gt")
        decided = self._inequality(total.plus(-1) if strict else total)
        indexed = decided.op != "le" or decided.args[0] in (I, J) or len(total.terms) < 2
        if indexed or all(leaf.op != "capture" for leaf in decided.leaves):
            return decided
        # Captured integers may be as large as their dtype holds, as those that stand for no position are: a number
        # brought to the other side could overflow there.
        if not total.constant:
            return call("lt", *_sides(total.times(-1))) if strict else decided
        cancelled = len(total.terms) < sum(len(side.terms) for side in sides)
        return decided if cancelled else call(op, *map(as_expr, sides))

    def _agree(self, left: Expr, right: Expr, differ: bool) -> Expr:
        left, right = self.simplify(left), self.simplify(right)
        for known, other in ((left, right), (right, left)):
            if known.op == "const":
                return self.simplify(other, bool(known.value) == differ)
        return call("ne" if differ else "eq", left, right)

    def _equality(self, op: str, total: Sum) -> Expr:
        """``total == 0`` or ``!=``."""
        shared = gcd(*total.terms.values()) if total.terms else 0
        low, high = self.bounds.lower(total), self.bounds.upper(total)
        if low == high == 0:
            return const(op == "eq")
        if low > 0 or high < 0 or (shared and total.constant % shared):
            return const(op == "ne")
        if shared > 1:
            total = Sum({a: f // shared for a, f in total.terms.items()}, total.constant // shared)
        if total.factor(min(total.terms, key=str)) < 0:
            total = total.times(-1)
        if not total.constant and len(total.terms) == 1:
            (atom,) = total.terms
            if atom.op == "mul":
                # A product vanishes where a factor does.
                factors = [self._comparison(op, factor, const(0)) for factor in atom.args]
                return self.either(*factors) if op == "eq" else self.both(*factors)
        return call(op, *_sides(total))

    def _inequality(self, total: Sum) -> Expr:
        """``total >= 0``."""
        if self.bounds.lower(total) >= 0:
            return TRUE
        if self.bounds.upper(total) < 0:
            return FALSE
        for atom, factor in total.terms.items():
            if atom.op == "abs" and factor in (1, -1) and len([a for a in total.terms if a.op == "abs"]) == 1:
                return self._unfold_abs(total.without(atom), atom, factor)
        return self._print(_reduced(total))

    def _unfold_abs(self, rest: Sum, atom: Expr, factor: int) -> Expr:
        """``rest - |x| >= 0`` is ``rest - x >= 0 & rest + x >= 0``; ``rest + |x| >= 0`` has an or."""
        inner = as_sum(atom.args[0])
        sides = [self._inequality(rest + inner.times(sign)) for sign in (-1, 1)]
        return self.both(*sides) if factor == -1 else self.either(*sides)

    def _print(self, total: Sum) -> Expr:
        for index in (J, I):
            factor = total.factor(index)
            rest = total.without(index)
            if factor == -1 and not _reads_inside(rest, index):
                return call("le", index, as_expr(rest))
            if factor == 1 and not _reads_inside(rest, index):
                return call("ge", index, as_expr(rest.times(-1)))
            if factor:
                break
        return call("le", *_sides(total.times(-1)))


def parts(expr: Expr, op: str) -> tuple[Expr, ...]:
    """The operands of nested ``op``, or the expression itself."""
    return tuple(p for a in expr.args for p in parts(a, op)) if expr.op == op else (expr,)


def _sides(total: Sum) -> tuple[Expr, Expr]:
    """``total`` as left minus right: positive terms left; the constant goes where it is positive."""
    left = Sum({a: f for a, f in total.terms.items() if f > 0}, max(total.constant, 0) if total.terms else 0)
    return as_expr(left), as_expr(left - total)


def _slack(expr: Expr) -> Sum | None:
    """The sum that a comparison in the form that `Logic` prints says to be at least 0."""
    if expr.op not in ("le", "ge", "lt", "gt"):
        return None
    left, right = (as_sum(a) for a in expr.args)
    slack = right - left if expr.op in ("le", "lt") else left - right
    return slack if expr.op in ("le", "ge") else slack.plus(-1)


def _reduced(total: Sum) -> Sum:
    """``total >= 0`` divided by the common divisor of its coefficients."""
    shared = gcd(*total.terms.values()) if total.terms else 1
    return Sum({a: f // shared for a, f in total.terms.items()}, total.constant // shared)


def _reads_inside(total: Sum, index: Expr) -> bool:
    return any(reads_any(atom, (index,)) for atom in total.terms)


def readable(mask: Expr) -> str:
    """A mask as people write it: ``0 <= i - j < 1024``."""
    terms = parts(mask, "and")
    found = [bound for term in terms if (bound := _distance(term)) is not None]
    upper = [c for op, c in found if op == "le"]
    lower = [c for op, c in found if op == "ge"]
    if len(upper) == 1 and len(lower) == 1:
        others = [str(t) for t in terms if _distance(t) is None]
        window = f"{-upper[0]} <= i - j < {1 - lower[0]}"
        return " & ".join([f"({window})", *others]) if others else window
    return str(mask)[1:-1] if mask.op in _INFIX else str(mask)


def _distance(term: Expr) -> tuple[str, int] | None:
    """``j <= i + c`` or ``j >= i + c`` as its operation and ``c``."""
    total = _slack(term)
    if total is None or set(total.terms) != {I, J} or total.factor(J) * total.factor(I) != -1:
        return None
    return ("le", total.constant) if total.factor(J) == -1 else ("ge", -total.constant)
