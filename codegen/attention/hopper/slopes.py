"""Scores that are linear in the key, such as ALiBi's, in one instruction each.

A thread holds columns n = 8·e + m, with all e and two of the m. Of ``s·f + c·n`` it computes ``x = s + (c/f)·8·e``
alone, by a constant for each e; what is the same for all e is added where there is one number for them all:

    max_n (s·f + c·n) = max_m (f·(max_e x + (c/f)·m)),        exponent = x·(u·f) − (shift·u − (c/f)·m·(u·f)).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Final

from fxopt.codegen.attention.distance import split_distances
from fxopt.codegen.attention.softmax import split_factor
from fxopt.ir.attention import Capture
from fxopt.ir.expression import Expr, J, S, call, capture

SLOPES: Final = '''
@gluon.jit
def along(x, slope, BLOCK_N: gl.constexpr):
    """``x`` and the ``slope`` times the column that each eight columns begin with."""
    PARTS: gl.constexpr = by_thread(x, BLOCK_N).type.layout
    LIKE: gl.constexpr = x.type.layout
    eights = 8 * gl.arange(0, BLOCK_N // 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, PARTS)))
    slopes = slope + gl.zeros([1, BLOCK_N // 8, 1], gl.float32, layout=PARTS)
    sums = gl.fma(slopes, eights[None, :, None].to(gl.float32), by_thread(x, BLOCK_N))
    return gl.convert_layout(gl.reshape(sums, [64, BLOCK_N]), LIKE)


@gluon.jit
def within(x, slope, BLOCK_N: gl.constexpr):
    """The ``slope`` times the column among eight."""
    PARTS: gl.constexpr = by_thread(x, BLOCK_N).type.layout
    n = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, PARTS)))
    return (slope * n.to(gl.float32))[None, :]


@gluon.jit
def powers(x, far, scale, shift, BLOCK_N: gl.constexpr):
    """``exp2((x + far) * scale - shift)``, of which ``far`` is what `within` gives, and the others are by row."""
    y = by_thread(x, BLOCK_N)
    LIKE: gl.constexpr = x.type.layout
    ROWS: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(1, y.type.layout))
    scales = gl.convert_layout(scale, ROWS)[:, None]
    rest = far * scales - gl.convert_layout(shift, ROWS)[:, None]
    return gl.convert_layout(gl.reshape(gl.exp2(y * scales[:, None, :] + rest[:, None, :]), [64, BLOCK_N]), LIKE)

'''


@dataclass(frozen=True, slots=True)
class Sloped:
    """A score as ``factor·(rest + Σ signs·slopes·column / factor)``.

    Attributes:
        rest: what is left, in units of the factor.
        factor: the positive constant taken out.
        signs: the slopes, each with its sign.
    """

    rest: Expr
    factor: float
    signs: tuple[tuple[Expr, int], ...]


def parts(score: Expr, is_slope: Callable[[Expr], bool]) -> Sloped | None:
    """``score`` as a sum whose terms ``is_slope`` are apart; ``None`` without such terms."""
    terms = list(_terms(score, 1))
    slopes = tuple(term for term in terms if is_slope(term[0]))
    others = [term for term in terms if not is_slope(term[0])]
    if not slopes or not others:
        return None
    inner, factor = split_factor(_sum(others))
    return Sloped(inner, factor, slopes) if inner == S else Sloped(_sum(others), 1.0, slopes)


def is_linear(score: Expr, captures: Sequence[Capture]) -> bool:
    """Whether ``score`` reads the key in whole terms that are linear in it, if at all."""
    column, start = capture(len(captures)), capture(len(captures) + 1)
    terms = _terms(split_distances(score, captures, column, start), 1)
    sloped = (column, call("neg", column))
    others = [term for term, _ in terms if term.op != "mul" or term.args[1] not in sloped]
    return not any(leaf in (J, column) for term in others for leaf in term.walk())


def _terms(score: Expr, sign: int) -> list[tuple[Expr, int]]:
    if score.op == "neg":
        return _terms(score.args[0], -sign)
    if score.op not in ("add", "sub"):
        return [(score, sign)]
    first, second = score.args
    return [*_terms(first, sign), *_terms(second, sign if score.op == "add" else -sign)]


def _sum(terms: Sequence[tuple[Expr, int]]) -> Expr:
    (first, sign), *rest = sorted(terms, key=lambda term: -term[1])
    begin = first if sign > 0 else call("neg", first)
    return reduce(lambda a, term: call("add" if term[1] > 0 else "sub", a, term[0]), rest, begin)
