"""Which weights of a block of rows the mask of a generated Hopper backward leaves out.

Bounds that follow the rows are asked of one number of a thread and constants, which take no registers:

    j <= i + c  <=>  near <= far + c,    near = j - i of a thread's first key and row,  far = what others add to it

So are distances in the score; one that reads row or key in any other way has these in registers anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from fxopt.codegen.attention.backward.hopper.listed import CUT
from fxopt.codegen.attention.distance import sloped
from fxopt.codegen.attention.interval import Bound, KeyRange
from fxopt.ir.attention import AttentionSpec
from fxopt.ir.expression import Expr, I, J, Kind, call, capture, const

Emit = Callable[[Expr], str]
_DISTANCE: Final = call("sub", J, I)
#: Where a block of rows does not need all keys.
_PARTIAL: Final = {"full_start": "(start < full_start)", "full_stop": "(start >= full_stop)", CUT: CUT}
_INSIDE: Final = "(columns < Sk)"
_NEAR: Final = """
n = gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))[:, None]
near = (columns - n // 8 % 2 * 8) - (start + m // 2 % 4 * 2)[None, :]
far = (m // 8 * 8 + m % 2)[None, :] - n // 8 % 2 * 8
"""


def distances(spec: AttentionSpec, found: KeyRange) -> str:
    """The lines before the score that say how far keys and rows of a thread are apart, where that is asked for."""
    read = spec.score.reads(J)
    return (_NEAR.strip() + "\ndistance = near - far" * read) if read or any(b.slope for b in found.bounds) else ""


def reads_places(spec: AttentionSpec) -> bool:
    """Whether the score reads row or key other than by their distance, or is sloped: `Sloped` reads the key."""
    score = spec.score.replace(lambda node: const(0) if node == _DISTANCE else node)
    return score.reads(I) or score.reads(J) or sloped(spec.score, spec.captures) is not None


def named(expr: Expr, spec: AttentionSpec) -> tuple[Expr, dict[str, str], tuple[Kind, ...]]:
    """``expr`` with its distances as a further captured tensor, what that is called, and the kinds of all."""
    further = capture(len(spec.captures))
    found = expr.replace(lambda node: further if node == _DISTANCE else node)
    return found, {str(further): "distance"}, (*spec.capture_kinds, "int")


def masks(found: KeyRange, full: Sequence[str], near: bool, emit: Emit) -> str:
    """The lines that leave out weights; blocks between ``full`` rows ask for what bounds no keys.

    Args:
        found: the mask, as bounds and the rest.
        full: what limits the rows that need all keys, or tells that a block of a list does not; others ask nothing.
        near: whether `distances` stand before them.
        emit: prints an expression.
    """
    terms = [_term(bound, near, emit) for bound in found.bounds]
    rest = [f"({emit(term)})" for term in found.rest]
    lines: list[str] = []
    if full:
        partial = " | ".join(_PARTIAL[name] for name in full)
        lines += [f"if {partial}:", f"    {_kept((*terms, *rest))}"]
        lines += ["else:", f"    {_kept(rest)}"] * (bool(rest) and CUT not in full)
        return "\n".join((*lines, "if not WHOLE:", f"    {_kept((_INSIDE,))}"))
    lines += ["if WHOLE:", f"    {_kept((*terms, *rest))}", "else:"] if terms or rest else ["if not WHOLE:"]
    # What is asked together, the end of the keys first, costs one instruction a weight for each bound.
    return "\n".join((*lines, f"    {_kept((_INSIDE, *terms, *rest))}"))


def _kept(terms: Sequence[str]) -> str:
    return f"p = gl.where({' & '.join(terms)}, p, 0.0)"


def _term(bound: Bound, near: bool, emit: Emit) -> str:
    compared = "<=" if bound.side == "upper" else ">="
    offset = "" if bound.offset == const(0) else f" + ({emit(bound.offset)})"
    if not bound.slope:
        return f"(columns {compared} {emit(bound.offset)})"
    return f"(near {compared} far{offset})" if near else f"(j {compared} i{offset})"
