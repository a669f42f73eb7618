"""SiLU by hand becomes one operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from fxopt.ir.program import Program
from fxopt.ir.site import Tier
from fxopt.rewriter.arithmetic import Product, Sum
from fxopt.rewriter.builder import Builder
from fxopt.rewriter.passes import PassResult, apply_rules
from fxopt.rewriter.pattern import Match, Op, Var
from fxopt.rewriter.registry import register_pass
from fxopt.rewriter.rule import Rejection, Rule

aten = torch.ops.aten

_SIGMOID = Op((aten.sigmoid.default, aten.special_expit.default), Product(Var("x"), constant="slope"))
_INVERSE = Sum(Op(aten.exp.default, Product(Var("x"), constant="minus slope")), constant="one")


def check_silu(match: Match) -> Match | Rejection:
    """The argument of the sigmoid is not scaled (QuickGELU's is), nor is the result."""
    if match["factor"] != 1:
        return Rejection(f"x * sigmoid(x) is multiplied by {match['factor']}")
    if match.get("one") not in (None, 1):
        return Rejection(f"the denominator is {match['one']} + exp(-x) where SiLU has 1 + exp(-x)")
    slope = match.get("slope")
    slope = -match["minus slope"] if slope is None else slope
    return match if slope == 1 else Rejection(f"the sigmoid is that of {slope} * x, not of x")


def build_silu(builder: Builder, match: Match) -> Node:
    """``silu(x)``."""
    return builder.call(aten.silu.default, match["x"])


RULES = (
    Rule(
        name="silu",
        patterns={
            "x * sigmoid(x)": Product(Var("x"), _SIGMOID, constant="factor"),
            "x * (1 / (1 + exp(-x)))": Product(Var("x"), Op(aten.reciprocal.default, _INVERSE), constant="factor"),
            "x / (1 + exp(-x))": Op(aten.div.Tensor, Product(Var("x"), constant="factor"), _INVERSE),
        },
        check=check_silu,
        rewrite=build_silu,
    ),
)


@register_pass
@dataclass(frozen=True)
class Silu:
    """``x * sigmoid(x) -> silu(x)`` and ``x / (1 + exp(-x)) -> silu(x)``, in any order of the factors.

    Exact: the definition of SiLU. QuickGELU, ``x * sigmoid(1.702 * x)``, is another function and stays.
    """

    name: ClassVar[str] = "silu"
    tier: ClassVar[Tier] = "exact"
    requires: ClassVar[tuple[str, ...]] = ()

    def run(self, program: Program) -> PassResult:
        """Rewrite them."""
        return apply_rules(program, RULES)
