"""LayerNorm by hand becomes one operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from fxopt.ir.nodes import shape, tensor
from fxopt.ir.operators import overload
from fxopt.ir.program import Program
from fxopt.ir.site import Tier
from fxopt.passes.canonical.norm_form import (
    NormForm,
    mean,
    over_root,
    over_shifted_root,
    read_norm,
    reject_shifted_root,
    tails,
)
from fxopt.rewriter.arithmetic import Product
from fxopt.rewriter.builder import Builder
from fxopt.rewriter.operands import Result, Widened
from fxopt.rewriter.passes import PassResult, apply_rules
from fxopt.rewriter.pattern import Const, Match, Op, Pattern, Var
from fxopt.rewriter.registry import register_pass
from fxopt.rewriter.rule import Rejection, Rule

aten = torch.ops.aten

_X = Widened(Var("x"))
_BOTH = Op(aten.var_mean.correction, _X, Const("axes"), correction=Const("correction"), keepdim=Const("keepdim"))
_BOTH_PLAIN = Op(aten.var_mean.dim, _X, Const("axes"), Const("correction"), Const("keepdim"))


def _centred(average: Pattern) -> Pattern:
    return Op(aten.sub.Tensor, _X, average)


def _restored(variance: Pattern) -> Pattern:
    return variance | Op(aten.unsqueeze.default, variance, Const("restored"))


_CENTRED = _centred(mean(_X))
_VARIANCE = _restored(
    Op(aten.var.correction, _X, Const("axes"), correction=Const("correction"), keepdim=Const("keepdim"))
    | Op(aten.var.dim, _X, Const("axes"), Const("correction"), Const("keepdim"))
)
_BY_MEAN = over_root(_CENTRED, mean(Product(_CENTRED, _CENTRED, constant="factor")))
_BY_VARIANCE = over_root(_CENTRED, _VARIANCE)
_DEVIATION = _restored(
    Op(aten.std.correction, _X, Const("axes"), correction=Const("correction"), keepdim=Const("keepdim"))
    | Op(aten.std.dim, _X, Const("axes"), Const("correction"), Const("keepdim"))
    | Op(aten.sqrt.default, _VARIANCE)
)
_BY_VAR_MEAN = over_root(
    _centred(_restored(Result(_BOTH, 1) | Result(_BOTH_PLAIN, 1))), _restored(Result(_BOTH, 0) | Result(_BOTH_PLAIN, 0))
)


def check_by_hand(match: Match) -> NormForm | Rejection:
    """The variance is that of ``x`` without Bessel's correction, and what `read_norm` says."""
    if match.get("factor") not in (None, 1):
        return Rejection(f"the variance is multiplied by {match['factor']}")
    if match.values.get("correction", 0) != 0:
        return Rejection("the variance has Bessel's correction (it divides by n - 1), LayerNorm's divides by n")
    return read_norm(match)


def build_norm(builder: Builder, norm: NormForm) -> Node:
    """``aten.layer_norm`` where everything has one dtype, else ``fxopt.layer_norm``, which says where to round."""
    x = builder.cast(norm.x, norm.dtype) if norm.widened else norm.x
    operands = [node for node in (x, norm.weight, norm.bias) if node is not None]
    if any(tensor(node).dtype != norm.dtype for node in operands):
        target = overload("layer_norm")
        return builder.call(target, x, norm.axes, norm.weight, norm.bias, norm.eps, norm.dtype, norm.scale_after_cast)
    rank = len(shape(x))
    sizes = [builder.size(x, axis) for axis in range(rank - norm.axes, rank)]
    return builder.call(aten.layer_norm.default, x, sizes, norm.weight, norm.bias, norm.eps)


def _rule(name: str, normal: Pattern, formula: str) -> Rule:
    return Rule(name, tails(normal, formula, with_bias=True), build_norm, check_by_hand, kind="norm")


RULES = (
    _rule("mean-of-squares", _BY_MEAN, "d / sqrt(mean(d ** 2) + eps)"),
    _rule("variance", _BY_VARIANCE, "d / sqrt(var(x) + eps)"),
    _rule("variance-and-mean", _BY_VAR_MEAN, "d / sqrt(var_mean(x) + eps)"),
    Rule(
        name="eps-outside",
        patterns={"d / (std(x) + eps)": over_shifted_root(_CENTRED, _DEVIATION)},
        check=reject_shifted_root,
        rewrite=build_norm,
        kind="norm",
    ),
)


@register_pass
@dataclass(frozen=True)
class LayerNorm:
    """``(x - mean(x)) / sqrt(var(x) + eps) * weight + bias -> layer_norm(x)``, the variance divided by ``n``.

    With ``d = x - mean(x)`` the variance is ``mean(d ** 2)`` (any product) or ``var``/``var_mean`` without correction;
    the root is ``rsqrt``, ``sqrt`` or a power; mean and variance run over the same trailing axes. Where everything has
    one dtype the result is ``aten.layer_norm``; where ``x`` is widened first and the result rounded it is
    ``fxopt.layer_norm(x, axes, weight, bias, eps, dtype, scale_after_cast)``, which computes in ``dtype`` and says
    whether rounding comes before or after weight and bias. Exact: the same function, rounded as often or less.
    """

    name: ClassVar[str] = "layer-norm"
    tier: ClassVar[Tier] = "exact"
    requires: ClassVar[tuple[str, ...]] = ("no-ops",)

    def run(self, program: Program) -> PassResult:
        """Rewrite them."""
        return apply_rules(program, RULES)
