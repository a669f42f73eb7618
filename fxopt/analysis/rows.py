"""The expressions of an attention for some of its rows, which still count them as the whole one does."""

from __future__ import annotations

from collections.abc import Callable

from fxopt.analysis.simplify import simplify
from fxopt.ir.attention import AttentionSpec
from fxopt.ir.expression import Expr, I, call, const, symbol

_QUERIES = symbol("Sq")


def of_rows(
    spec: AttentionSpec, step: int, first: Callable[[], Expr], count: Callable[[], Expr]
) -> tuple[Expr, Expr | None]:
    """Score and mask where row ``i`` is row ``step·i + first`` of all ``count``; both only asked for where read."""
    leaves = {leaf for e in (spec.score, spec.mask) if e is not None for leaf in e.walk() if not leaf.args}
    known: dict[Expr, Expr] = {}
    if I in leaves:
        moved = I if step == 1 else call("mul", I, const(step))
        known[I] = simplify(call("add", moved, first()))
    if _QUERIES in leaves:
        known[_QUERIES] = count()
    score, mask = (None if e is None else e.replace(lambda x: known.get(x, x)) for e in (spec.score, spec.mask))
    assert score is not None
    return score, mask
