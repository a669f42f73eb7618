"""What the backward of an attention computes, read off its specification: weights, slopes, gradients of captures.

With a weight ``p``, its gradient ``dp`` and one ``delta`` per row:

    p = exp(x − lse),  dx = p·(dp − delta),  delta = Σ_e dout·out − dlse,  ds = dx·∂x/∂s,  dc = dx·∂x/∂c
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch

from fxopt.codegen.attention import reference
from fxopt.codegen.attention.distance import sloped
from fxopt.codegen.attention.softmax import LOG2E, split_factor
from fxopt.codegen.expression import gradient
from fxopt.ir.attention import AttentionSpec, Capture
from fxopt.ir.expression import Expr, S, capture

#: From this size on, float32 holds the log-sum-exp of equal logits too coarsely to tell how many they are: below it,
#: rounding it changes weights by at most 2**-13 of themselves, a quarter of what rounding them to float16 does.
_FAR: Final = 4096.0
Side = Literal["rows", "keys", "table", "band"]


@dataclass(frozen=True, slots=True)
class Flow:
    """The gradient of the ``index``-th captured tensor.

    Attributes:
        index: which one.
        how: how it is read.
        slope: the derivative of the score by it.
    """

    index: int
    how: Capture
    slope: Expr

    @property
    def name(self) -> str:
        """Its name in the kernels."""
        return f"c{self.index}"

    @property
    def side(self) -> Side:
        """Which sums hold it: per row, per key, or, in kernels of their own, per row and key or by their distance."""
        if self.how.is_band:
            return "band"
        if {"i", "j"} <= set(self.how.dims):
            return "table"
        return "keys" if "j" in self.how.dims else "rows"

    @property
    def sums_rows(self) -> bool:
        """Whether all rows of a head add up to one element."""
        return self.how.dims[2:] == "--"


@dataclass(frozen=True, slots=True)
class Weights:
    """How a weight is computed anew.

    Attributes:
        inner: what the kernel computes as ``x``.
        text: the weight of ``x``; ``{0}`` stands for the axis along which a vector per row spreads.
        scale: what the kernel multiplies the log-sum-exp by when it is read.
        far: the size of a log-sum-exp from which on a row's maximum and number of keys are counted again; ``None``
            where no row is.
        count: what is kept of a counted ``total``.
        no_count: what stands there for other rows.
        exact: whether delta is summed over the keys too, rather than over the rounded result.
    """

    inner: Expr
    text: str
    scale: float = 1.0
    far: float | None = None
    count: str = ""
    no_count: str = ""
    exact: bool = False

    @property
    def recounted(self) -> bool:
        """Whether rows are counted again."""
        return self.far is not None


def weights(spec: AttentionSpec, dtype: torch.dtype) -> Weights:
    """Plan the weights of ``spec`` for inputs of this dtype."""
    if dtype is torch.float32:
        # The rounding of a log-sum-exp would be the largest error of a weight: every row is counted again.
        text = f"tl.exp2((x - shift{{0}}) * {LOG2E!r}) * count{{0}}"
        return Weights(spec.score, text, far=0.0, count="1.0 / total", no_count="1.0", exact=True)
    if may_be_far(spec):
        text = f"tl.exp2((x - shift{{0}}) * {LOG2E!r} - count{{0}})"
        return Weights(spec.score, text, far=_FAR, count="tl.log2(total)", no_count="0.0")
    inner, factor = split_factor(spec.score)
    return Weights(inner, f"tl.exp2(x * {factor * LOG2E!r} - shift{{0}})", LOG2E)


def may_be_far(spec: AttentionSpec) -> bool:
    """Whether all logits of a row may be one large number, such as a finite stand-in for −inf.

    A multiple of the distance is not one number: rows where it is large have few keys that count.
    """
    found = sloped(spec.score, spec.captures)
    for leaf in (spec.score if found is None else found[0]).walk():
        if leaf.op == "capture" and spec.captures[int(leaf.value or 0)].kind != "bool":
            return True
        if leaf.op == "const" and isinstance(leaf.value, (int, float)) and _FAR < abs(leaf.value) < math.inf:
            return True
    return False


def slope(spec: AttentionSpec) -> tuple[Expr | None, float]:
    """The derivative of the score by ``s`` as an expression (``None`` for 1) and a constant factor."""
    found = gradient(spec.score, S)
    if found.op == "const" and math.isfinite(float(found.value or 0)):
        return None, float(found.value or 0)
    inner, factor = split_factor(found)
    return inner, factor


def flows(spec: AttentionSpec, wanted: Sequence[bool]) -> tuple[Flow, ...]:
    """The gradients of the captured tensors that are ``wanted`` (none, where it is empty) and that the score reads."""
    needed = [(n, how) for n, (how, want) in enumerate(zip(spec.captures, wanted, strict=False)) if want]
    found = (Flow(n, how, gradient(spec.score, capture(n))) for n, how in needed)
    return tuple(flow for flow in found if flow.slope.op != "const" or flow.slope.value != 0)


def empties_without_weights(spec: AttentionSpec) -> bool:
    """Whether rows may have no key, and their weights then count as 0: those of a mean have gradients of their own."""
    return spec.empty_rows != "nan" and reference.may_be_empty(spec)


def averages(spec: AttentionSpec) -> bool:
    """Whether rows may have no key, and then give the mean of the values."""
    return spec.empty_rows == "uniform" and reference.may_be_empty(spec)
