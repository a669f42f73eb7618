"""Which keys a block of query rows needs, read off the mask.

Conjuncts that compare the key with the query row, or with something that is the same for every row and key, bound the
keys from above or below. Blocks outside all bounds are never visited, and in blocks inside all of them these conjuncts
need not be evaluated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from fxopt.codegen.expression import simplify
from fxopt.ir.attention import AttentionSpec, Capture
from fxopt.ir.expression import Expr, I, J, call, conjuncts, const, kind

_FLIPPED: Final = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le"}
_NEGATED: Final = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt"}
#: What brings a strict comparison of integers to the other kind: j < x is j <= x - 1.
_SHIFT: Final = {"lt": -1, "le": 0, "gt": 1, "ge": 0}


@dataclass(frozen=True, slots=True)
class Bound:
    """``j <= slope·r + offset`` (``side="upper"``) or ``j >= slope·r + offset`` (``"lower"``).

    ``r`` is the row, or the first row of its ``chunk``, ``i // chunk · chunk``; ``slope`` is 0 or 1; ``offset`` is an
    integer expression that reads neither ``i`` nor ``j``. Where there are ``others``, of the same side, it is enough
    that one of them all holds.
    """

    side: Literal["upper", "lower"]
    slope: int
    offset: Expr
    others: tuple[Bound, ...] = ()
    chunk: int = 1

    @property
    def all(self) -> tuple[Bound, ...]:
        """It and its alternatives, each without any."""
        return (replace(self, others=()), *self.others)

    @property
    def follows_rows(self) -> bool:
        """Whether late rows are bounded elsewhere than early ones."""
        return any(bound.slope for bound in self.all)


@dataclass(frozen=True, slots=True)
class KeyRange:
    """The bounds that a mask sets, and its conjuncts that set none."""

    bounds: tuple[Bound, ...]
    rest: tuple[Expr, ...]

    def side(self, name: Literal["upper", "lower"]) -> tuple[Bound, ...]:
        """The bounds from above or from below."""
        return tuple(b for b in self.bounds if b.side == name)


@dataclass(frozen=True, slots=True)
class Linear:
    """``row·i + key·j + rest``."""

    row: int
    key: int
    rest: Expr


def key_range(spec: AttentionSpec, further: bool = False) -> KeyRange:
    """Split the mask of ``spec`` into bounds and the rest.

    ``further`` asks for bounds with ``others`` (a causal mask with a prefix) and by ``chunk`` (block-diagonal,
    block-causal) as well.
    """
    terms = {term: _bounds(term, spec.captures, further) for term in conjuncts(spec.mask)}
    bounds = tuple(bound for found in terms.values() for bound in found)
    return KeyRange(bounds, tuple(term for term, found in terms.items() if not found))


def is_uniform(capture: Capture) -> bool:
    """Whether a captured tensor holds one value for all rows and keys of a head."""
    return capture.dims[2:] == "--"


def _bounds(term: Expr, captures: Sequence[Capture], further: bool) -> tuple[Bound, ...]:
    bound = _union(term, captures) if further else _bound(term, captures)
    if bound is not None:
        return (bound,)
    return _chunk(term) if further else ()


def _chunk(term: Expr) -> tuple[Bound, ...]:
    """The bounds that ``i // n == j // n`` sets."""
    if term.op != "eq" or any(side.op != "floordiv" for side in term.args):
        return ()
    (first, size), (second, other) = (side.args for side in term.args)
    n = size.value
    if {first, second} != {I, J} or size != other or size.op != "const" or not isinstance(n, int) or n < 1:
        return ()
    return Bound("lower", 1, const(0), chunk=n), Bound("upper", 1, const(n - 1), chunk=n)


def _union(term: Expr, captures: Sequence[Capture]) -> Bound | None:
    if term.op != "or":
        return _bound(term, captures) or _chunk_bound(term, captures)
    first, second = (_union(a, captures) for a in term.args)
    if first is None or second is None or first.side != second.side:
        return None
    return replace(first, others=(*first.others, *second.all))


def _chunk_bound(term: Expr, captures: Sequence[Capture]) -> Bound | None:
    """The bound that a comparison of ``j // n`` with ``i // n``, or with what is the same for all rows, sets."""
    chunks = {node for node in term.walk() if node.op == "floordiv" and node.args[0] in (I, J)}
    sizes = {node.args[1] for node in chunks}
    without = term.replace(lambda node: const(0) if node in chunks else node)
    n = sizes.pop().value if len(sizes) == 1 else None
    if type(n) is not int or n < 1 or without.reads(I) or without.reads(J):
        return None
    bound = _bound(term.replace(lambda node: node.args[0] if node in chunks else node), captures)
    if bound is None:
        return None
    # The last key of a chunk, or the first one.
    beyond = n - 1 if bound.side == "upper" else 0
    offset = simplify(call("add", simplify(call("mul", bound.offset, const(n))), const(beyond)))
    return replace(bound, offset=offset, chunk=n if bound.slope else 1)


def _bound(term: Expr, captures: Sequence[Capture]) -> Bound | None:
    negated = term.op == "not"
    comparison = term.args[0] if negated else term
    if comparison.op not in _FLIPPED:
        return None
    op = _NEGATED[comparison.op] if negated else comparison.op
    left, right = (linear(a, captures) for a in comparison.args)
    if left is None or right is None:
        return None
    row, key = left.row - right.row, left.key - right.key
    if key not in (1, -1) or -row * key not in (0, 1):
        return None
    op = op if key == 1 else _FLIPPED[op]
    offset = call("sub", right.rest, left.rest) if key == 1 else call("sub", left.rest, right.rest)
    side: Literal["upper", "lower"] = "upper" if op in ("lt", "le") else "lower"
    return Bound(side, -row * key, simplify(call("add", offset, const(_SHIFT[op]))))


def linear(expr: Expr, captures: Sequence[Capture]) -> Linear | None:
    """``expr`` as a sum of the row, the key and what is the same for all of both, or ``None`` where it is none."""
    if expr.op == "symbol" and expr.value in ("i", "j"):
        return Linear(int(expr.value == "i"), int(expr.value == "j"), const(0))
    if _is_integer_offset(expr, captures):
        return Linear(0, 0, expr)
    if expr.op not in ("add", "sub", "neg"):
        return None
    parts = [linear(a, captures) for a in expr.args]
    first, last = parts[0], parts[-1]
    if first is None or last is None:
        return None
    if expr.op == "neg":
        return Linear(-first.row, -first.key, simplify(call("neg", first.rest)))
    sign = 1 if expr.op == "add" else -1
    rest = simplify(call(expr.op, first.rest, last.rest))
    return Linear(first.row + sign * last.row, first.key + sign * last.key, rest)


def _is_integer_offset(expr: Expr, captures: Sequence[Capture]) -> bool:
    for leaf in expr.walk():
        if leaf.op == "symbol" and leaf.value in ("i", "j", "s"):
            return False
        if leaf.op == "capture" and not is_uniform(captures[int(leaf.value or 0)]):
            return False
    return kind(expr, tuple(c.kind for c in captures)) == "int"
