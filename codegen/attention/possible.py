"""Which keys a block of query rows can possibly keep, told from captured vectors alone.

A conjunct of a mask that reads captured vectors (padding, document numbers, …) is weakened to a condition on the key
that holds wherever the conjunct holds for some row of a block. It compares with the least and the greatest value that
an integer expression takes over the rows:

    for some row i: a(i) == b(j)   =>   low <= b(j) <= high        with low = min a(i), high = max a(i)

The condition costs one evaluation per key and block of rows, not one per key and row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Final

from fxopt.codegen.attention.interval import key_range
from fxopt.codegen.expression import simplify
from fxopt.ir.attention import AttentionSpec, Capture
from fxopt.ir.expression import Expr, Kind, call, capture, conjunction, const, kind

_FLIPPED: Final = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le", "eq": "eq", "ne": "ne"}
_OPPOSITE: Final = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt", "eq": "ne", "ne": "eq"}


@dataclass(frozen=True, slots=True)
class Possible:
    """A condition on a key, necessary for any row of a block to keep it.

    Attributes:
        condition: reads captured tensors, the key and, as captures beyond those of the specification, the least and
            greatest value of each of ``rows``: ``c<n + 2m>`` and ``c<n + 2m + 1>`` of ``n`` captures for row ``m``.
        rows: integer expressions that read no key.
        sure: the same kind of condition, sufficient for every row of a block to keep the key as far as the mask sets
            no bounds (`fxopt.codegen.attention.interval`) and rows keep any; ``None`` where none was asked for or is
            known.
        whole: what tells of extremes alone that no row of a block is left out by a conjunct that reads no key (see
            `row_terms`); ``None`` where there are no such conjuncts beside others, or ``sure`` is ``None``.
    """

    condition: Expr
    rows: tuple[Expr, ...]
    sure: Expr | None = None
    whole: Expr | None = None

    def reads(self, index: int) -> bool:
        """Whether the capture ``index`` is read."""
        leaf = capture(index)
        known = [expr for expr in (self.sure, self.whole) if expr is not None]
        return any(leaf in expr.walk() for expr in (self.condition, *known, *self.rows))

    def names(self, captures: int) -> dict[str, str]:
        """The variables of the extremes, by the captures that stand for them."""
        sides = [(m, side) for m in range(len(self.rows)) for side in ("low", "high")]
        return {str(capture(captures + n)): f"{side}{m}" for n, (m, side) in enumerate(sides)}


def possible_keys(spec: AttentionSpec, sure: bool = False) -> Possible | None:
    """The condition that the mask of ``spec`` puts on keys through captured vectors; ``None`` where there is none.

    ``sure`` asks for the sufficient one too, of kernels that understand all bounds.

    Conjuncts that bound the keys already, and those whose captures vary with head, or with both row and key, add
    nothing.
    """
    weakening = _Weakening(spec.captures)
    read = (term for term in key_range(spec, further=sure).rest if any(leaf.op == "capture" for leaf in term.walk()))
    terms = [found for term in read if (found := weakening.of(term)) is not None]
    if not terms:
        return None
    condition = simplify(reduce(lambda a, b: call("and", a, b), terms))
    known, whole = _sure(weakening, spec) if sure else (None, None)
    return Possible(condition, tuple(weakening.rows), known, whole)


def row_terms(spec: AttentionSpec) -> tuple[Expr, ...]:
    """The conjuncts that leave out whole rows: they read these, and no key; none where there are no others."""
    weakening, rest = _Weakening(spec.captures), key_range(spec, further=True).rest
    found = tuple(term for term in rest if "i" in (reads := weakening.reads(term)) and not reads & {"h", "s", "j"})
    return found if len(found) < len(rest) else ()


def _sure(weakening: _Weakening, spec: AttentionSpec) -> tuple[Expr | None, Expr | None]:
    """Every row keeps a key where it is not possible that one does not; the same of what leaves out whole rows."""
    rows, rest = row_terms(spec), key_range(spec, further=True).rest
    opposite = {term: weakening.of(call("not", term)) for term in rest}
    known = {term: _negated(found) for term, found in opposite.items() if found is not None}
    if not known or len(known) < len(opposite):
        return None, None
    return _all(known[term] for term in rest if term not in rows), _all(map(known.__getitem__, rows))


def _all(terms: Iterable[Expr]) -> Expr | None:
    known = conjunction(tuple(terms))
    return None if known is None else simplify(known)


def _negated(term: Expr) -> Expr:
    return term.args[0] if term.op == "not" else call("not", term)


class _Weakening:
    """One walk: the extremes that it asked for, in order."""

    def __init__(self, captures: Sequence[Capture]) -> None:
        self.captures = captures
        self.rows: list[Expr] = []

    def of(self, term: Expr) -> Expr | None:
        """What ``term`` weakens to, or ``None`` where only "possible" can be said."""
        reads = self.reads(term)
        if reads & {"h", "s"}:
            return None
        if "i" not in reads:
            return term
        if term.op == "and":
            known = [found for part in term.args if (found := self.of(part)) is not None]
            return reduce(lambda a, b: call("and", a, b), known) if known else None
        if term.op == "or":
            first, second = (self.of(part) for part in term.args)
            return None if first is None or second is None else call("or", first, second)
        if term.op == "not" and term.args[0].op in _OPPOSITE:
            return self._comparison(_OPPOSITE[term.args[0].op], *term.args[0].args)
        if term.op in _FLIPPED:
            return self._comparison(term.op, *term.args)
        return None if "j" in reads else call("ne", self._extremes(call("mul", term, const(1)))[1], const(0))

    def _comparison(self, op: str, left: Expr, right: Expr) -> Expr | None:
        if "i" in self.reads(right):
            op, left, right = _FLIPPED[op], right, left
        if "j" in self.reads(left) or "i" in self.reads(right):
            return None
        if {kind(left, self._kinds), kind(right, self._kinds)} != {"int"}:
            return None
        low, high = self._extremes(left)
        if op == "eq":
            return call("and", call("le", low, right), call("ge", high, right))
        if op == "ne":
            return call("or", call("ne", low, right), call("ne", high, right))
        return call(op, low if op in ("lt", "le") else high, right)

    def _extremes(self, row: Expr) -> tuple[Expr, Expr]:
        if row not in self.rows:
            self.rows.append(row)
        index = len(self.captures) + 2 * self.rows.index(row)
        return capture(index), capture(index + 1)

    def reads(self, expr: Expr) -> set[str]:
        """The indices and ``s`` that ``expr`` reads, itself or through a captured tensor."""
        found: set[str] = set()
        for leaf in expr.walk():
            if leaf.op == "symbol":
                found.add(str(leaf.value))
            if leaf.op == "capture":
                dims = self.captures[int(leaf.value or 0)].dims
                found.update("bhij"[n] for n, letter in enumerate(dims) if letter != "-")
        return found

    @property
    def _kinds(self) -> tuple[Kind, ...]:
        return tuple(c.kind for c in self.captures)
