"""RMSNorm by hand becomes one operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from fxopt.ir.nodes import tensor
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
from fxopt.rewriter.operands import Widened
from fxopt.rewriter.passes import PassResult, apply_rules
from fxopt.rewriter.pattern import Const, Literal, Match, Op, Var
from fxopt.rewriter.registry import register_pass
from fxopt.rewriter.rule import Rejection, Rule

aten = torch.ops.aten

_X = Widened(Var("x"))
_MEAN_OF_SQUARES = mean(Product(_X, _X, constant="factor"))
_NORMAL = over_root(_X, _MEAN_OF_SQUARES)
_SHIFTED = over_shifted_root(_X, Op(aten.sqrt.default, _MEAN_OF_SQUARES))


def check_by_hand(match: Match) -> NormForm | Rejection:
    """The mean is that of the squares alone, and what `read_norm` says."""
    if match["factor"] != 1:
        return Rejection(f"the mean is that of {match['factor']} * x²")
    return read_norm(match)


def check_call(match: Match) -> NormForm:
    """A call of ``rms_norm`` computes in float32 at least, and scales before it rounds."""
    x, eps = match["x"], match["eps"]
    dtype = torch.promote_types(tensor(x).dtype, torch.float32)
    eps = torch.finfo(dtype).eps if eps is None else eps
    return NormForm(
        x, len(match["sizes"]), match.get("weight"), None, eps, dtype, widened=False, scale_after_cast=False
    )


def build_norm(builder: Builder, norm: NormForm) -> Node:
    """``fxopt.rms_norm`` of ``x``."""
    x = builder.cast(norm.x, norm.dtype) if norm.widened else norm.x
    return builder.call(overload("rms_norm"), x, norm.axes, norm.weight, norm.eps, norm.dtype, norm.scale_after_cast)


RULES = (
    Rule(
        name="by-hand",
        patterns=tails(_NORMAL, "x / sqrt(mean(x ** 2) + eps)", with_bias=False),
        check=check_by_hand,
        rewrite=build_norm,
        kind="norm",
    ),
    Rule(
        name="eps-outside",
        patterns={"x / (sqrt(mean(x ** 2)) + eps)": _SHIFTED},
        check=reject_shifted_root,
        rewrite=build_norm,
        kind="norm",
    ),
    Rule(
        name="call",
        patterns={
            "rms_norm": Op(aten.rms_norm.default, Var("x"), Const("sizes"), Var("weight") | Literal(None), Const("eps"))
        },
        check=check_call,
        rewrite=build_norm,
        kind="norm",
    ),
)


@register_pass
@dataclass(frozen=True)
class RmsNorm:
    """``x / sqrt(mean(x ** 2) + eps) * weight -> fxopt.rms_norm(x, axes, weight, eps, dtype, scale_after_cast)``.

    The root may be ``rsqrt``, ``sqrt`` or a power, the square any product, the mean over any number of trailing axes.
    ``dtype`` is what the original computes in; ``scale_after_cast`` says whether it rounds to the dtype of ``x`` before
    it scales (Llama, T5) or after (Gemma, whose weight is the node that computes ``1 + w``, and ``aten.rms_norm``).
    A weight has the shape of the normalised axes; a scale of any other shape stays outside. Exact: the same operations
    in the same dtypes.
    """

    name: ClassVar[str] = "rms-norm"
    tier: ClassVar[Tier] = "exact"
    requires: ClassVar[tuple[str, ...]] = ("no-ops", "layer-norm")

    def run(self, program: Program) -> PassResult:
        """Rewrite them."""
        return apply_rules(program, RULES)
