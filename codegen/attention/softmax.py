"""The exponential of a generated kernel's softmax: one fused multiply-add per logit where that is safe.

A logit ``x`` enters the softmax as ``exp2(x·log2(e) − shift·log2(e))``. A positive constant factor of the score is
taken out and folded into log2(e), so that a plainly scaled score costs no extra multiplication.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from fxopt.ir.attention import AttentionSpec
from fxopt.ir.expression import Expr

LOG2E: Final = math.log2(math.e)
#: Constants of this size and captured tensors may be finite stand-ins for −inf. From here on neighbouring float32 are
#: 64 apart: rounding their product with log2(e) would move an exponent beyond what float32 holds.
_HUGE: Final = 2.0**30


@dataclass(frozen=True, slots=True)
class Exponent:
    """The pieces of text of a softmax over ``x = inner·factor``, kept in units of ``inner``.

    Attributes:
        inner: what the kernel computes as ``x``.
        factor: the positive constant taken out.
        unit: a line before the exponential, or nothing.
        text: the exponent of 2 of a weight.
        scale: what turns a difference of maxima into an exponent of 2.
    """

    inner: Expr
    factor: float
    unit: str
    text: str
    scale: str


def exponent(spec: AttentionSpec, exact: bool) -> Exponent:
    """Plan the softmax of ``spec``; ``exact`` subtracts before scaling (one instruction more, for float32 inputs)."""
    inner, factor = (spec.score, 1.0) if _may_be_huge(spec) else split_factor(spec.score)
    scale = repr(factor * LOG2E)
    if exact:
        return Exponent(inner, factor, "", f"(x - shift[:, None]) * {scale}", scale)
    if not _may_be_huge(spec):
        return Exponent(inner, factor, "", f"x * {scale} - (shift * {scale})[:, None]", scale)
    # Around a huge maximum weights are 0 or 1 in any base.
    unit = f"unit = tl.where(tl.abs(shift) < {_HUGE!r}, {scale}, 1.0)"
    return Exponent(inner, factor, unit, "x * unit[:, None] - (shift * unit)[:, None]", scale)


def row_maximum(logits: str, width: str, keys: int) -> str:
    """The largest of each row of ``logits``, ``keys`` wide (``width`` as text), by several chains of comparisons."""
    chains = min(4, keys // 8)
    return f"tl.max(tl.max(tl.reshape({logits}, [{logits}.shape[0], {chains}, {width} // {chains}]), 1), 1)"


def _may_be_huge(spec: AttentionSpec) -> bool:
    for leaf in spec.score.walk():
        if leaf.op == "capture" and spec.captures[int(leaf.value or 0)].kind == "float":
            return True
        if isinstance(leaf.value, (int, float)) and leaf.op == "const" and _HUGE < abs(leaf.value) < math.inf:
            return True
    return False


def split_factor(score: Expr) -> tuple[Expr, float]:
    """``score`` as the product of an expression and a positive constant, 1.0 where there is none."""
    if score.op not in ("mul", "div"):
        return score, 1.0
    first, second = score.args
    if score.op == "mul" and first.op == "const":
        first, second = second, first
    if second.op != "const" or not 1e-6 < float(second.value or 0) < 1e6:
        return score, 1.0
    inner, factor = split_factor(first)
    value = float(second.value or 0)
    return inner, factor * value if score.op == "mul" else factor / value
