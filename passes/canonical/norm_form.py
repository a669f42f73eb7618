"""What norms are spelled with: a mean, an inverse root, and a tail that rounds, scales and shifts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fxopt.ir.nodes import is_tensor, same_shape, shape, tensor
from fxopt.rewriter.arithmetic import Sum
from fxopt.rewriter.operands import Cast
from fxopt.rewriter.pattern import Const, Literal, Match, Miss, Op, Optional, Pattern
from fxopt.rewriter.rule import Rejection

aten = torch.ops.aten


@dataclass(frozen=True)
class Trailing(Pattern):
    """A tensor bound to ``name``, of the shape of the ``axes`` trailing axes of ``x``, both matched before."""

    name: str

    def match(self, value: Any, so_far: Match) -> Match | Miss:
        """See `Pattern.match`."""
        wanted = shape(so_far["x"])[-len(so_far["axes"]) :]
        if not is_tensor(value) or not same_shape(shape(value), wanted):
            return Miss(len(so_far.nodes), f"{self.name} = {value} has not the shape {list(wanted)}", so_far.root)
        return so_far.bind(self.name, value)


@dataclass(frozen=True)
class NormForm:
    """A norm over the ``axes`` trailing axes of ``x``, computed in ``dtype``; see the meaning of ``fxopt.rms_norm``."""

    x: Node
    axes: int
    weight: Node | None
    bias: Node | None
    eps: float
    dtype: torch.dtype
    widened: bool
    scale_after_cast: bool


def mean(of: Pattern) -> Pattern:
    """The mean over ``axes``, kept with size 1 or put back."""
    kept = Op(aten.mean.dim, of, Const("axes"), Const("keepdim"))
    return kept | Op(aten.unsqueeze.default, kept, Const("restored"))


def over_root(numerator: Pattern, mean_of_squares: Pattern) -> Pattern:
    """``numerator / sqrt(mean_of_squares + eps)``; the node that computes it is ``normal``."""
    radicand = Sum(mean_of_squares, constant="eps")
    root = Op(aten.sqrt.default, radicand) | Op(aten.pow.Tensor_Scalar, radicand, Literal(0.5))
    reciprocal = Optional(lambda p: Op(aten.mul.Tensor, p, Literal(1)), Op(aten.reciprocal.default, root))
    inverse = Op(aten.rsqrt.default, radicand) | Op(aten.pow.Tensor_Scalar, radicand, Literal(-0.5)) | reciprocal
    return Op(aten.mul.Tensor, numerator, inverse, commutative=True, name="normal") | Op(
        aten.div.Tensor, numerator, root, name="normal"
    )


def over_shifted_root(numerator: Pattern, root: Pattern) -> Pattern:
    """``numerator / (root + eps)``, which is no norm that we know; it is matched in order to say so."""
    return Op(aten.div.Tensor, numerator, Sum(root, constant="eps"))


def reject_shifted_root(match: Match) -> Rejection:
    """Why ``x / (root + eps)`` stays."""
    return Rejection(f"{match['eps']} is added to the root, not to the variance inside of it", (match.root,))


def tails(normal: Pattern, formula: str, *, with_bias: bool) -> dict[str, Pattern]:
    """``normal`` with every tail: scaled or not, shifted or not, rounded before or after that, or not at all."""
    affine: dict[str, Callable[[Pattern], Pattern]] = {" * weight": _scaled, "": lambda n: n}
    if with_bias:
        affine = {" * weight + bias": lambda n: _shifted(_scaled(n)), " + bias": _shifted} | affine
    found: dict[str, Pattern] = {}
    for tail, apply in affine.items():
        found[f"({formula}{tail}).to(dtype)"] = Cast(apply(normal), "rounded last")
        if tail:
            found[f"({formula}).to(dtype){tail}"] = apply(Cast(normal, "rounded first"))
        found[formula + tail] = apply(normal)
    return found


def _scaled(normal: Pattern) -> Pattern:
    return Op(aten.mul.Tensor, normal, Trailing("weight"), commutative=True)


def _shifted(normal: Pattern) -> Pattern:
    return Op(aten.add.Tensor, normal, Trailing("bias"), commutative=True)


def read_norm(match: Match) -> NormForm | Rejection:
    """The norm that was matched, if its axes are the last ones, its eps is a number ≥ 0 and its dtypes can be said."""
    x, eps, dtype = match["x"], match["eps"], tensor(match["normal"]).dtype
    axes = _trailing_axes(match, len(shape(x)))
    if isinstance(axes, Rejection):
        return axes
    if not (math.isfinite(eps) and eps >= 0):
        return Rejection(f"eps = {eps} is not a number that can be added to a variance")
    scaling = _dtypes(match, tensor(x).dtype, dtype)
    if isinstance(scaling, Rejection):
        return scaling
    widened, scale_after_cast = scaling
    return NormForm(x, axes, match.get("weight"), match.get("bias"), eps, dtype, widened, scale_after_cast)


def _trailing_axes(match: Match, rank: int) -> int | Rejection:
    axes = sorted(axis - rank if axis >= 0 else axis for axis in match["axes"] or [])
    if not axes or axes != list(range(-len(axes), 0)):
        return Rejection(f"it normalises over axes {match['axes']}, which are not the last ones")
    restored = match.get("restored")
    if match["keepdim"] == (restored is not None) or (restored is not None and restored not in (-1, rank - 1)):
        return Rejection("a mean is not put back on the axis that it was taken over")
    return len(axes)


def _dtypes(match: Match, given: torch.dtype, computed: torch.dtype) -> tuple[bool, bool] | Rejection:
    """Whether ``x`` counts as widened beforehand, and whether weight and bias come after rounding."""
    result = tensor(match.root).dtype
    if match.get("rounded first") is not None:
        if match["rounded first"] == given:
            return False, True
        return Rejection(f"it is rounded to {match['rounded first']}, which is not the dtype of x, {given}")
    if result == given:
        return False, False
    if result == computed:
        return True, False
    if given == computed:
        return False, True
    return Rejection(f"the result in {result} has neither the dtype of x, {given}, nor that of the norm, {computed}")
