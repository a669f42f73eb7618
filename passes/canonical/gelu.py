"""GELU by hand, exact or with tanh, becomes one operator."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch.fx import Node

from fxopt.ir.nodes import tensor
from fxopt.ir.program import Program
from fxopt.ir.site import Tier
from fxopt.rewriter.arithmetic import Product, Sum
from fxopt.rewriter.builder import Builder
from fxopt.rewriter.passes import PassResult, apply_rules
from fxopt.rewriter.pattern import Match, Op, Pattern, Var
from fxopt.rewriter.registry import register_pass
from fxopt.rewriter.rule import Rejection, Rule

aten = torch.ops.aten
X: Final = Var("x")

#: What the named constants are, but for the slopes, which differ between the two formulas.
_EXPECTED: Final = {
    "half": 0.5, "half term": 0.5, "one": 1.0, "inner one": 1.0, "zero": 0.0, "factor": 1.0, "cubic": 0.044715,
}  # fmt: skip


def _halved(function: Pattern) -> Pattern:
    """``0.5 * x * (1 + function)`` or ``x * (0.5 + 0.5 * function)``."""
    factored = Product(X, Sum(function, constant="one"), constant="half")
    return factored | Product(X, Sum(Product(function, constant="half"), constant="half term"), constant="factor")


_CUBE = Product(X, X, X, constant="cubic")
_SQUARE = Product(X, X, constant="cubic")
_INNER = Product(Sum(X, _CUBE, constant="zero"), constant="slope") | Product(
    X, Sum(_SQUARE, constant="inner one"), constant="slope"
)
_ERF_OF_X = Op((aten.erf.default, aten.special_erf.default), Product(X, constant="slope"))
_ERFC_OF_X = Op((aten.erfc.default, aten.special_erfc.default), Product(X, constant="negative slope"))


def _check(match: Match, slopes: dict[str, float]) -> Match | Rejection:
    accuracy = 2.0**-50 if tensor(match["x"]).dtype == torch.float64 else 2.0**-24
    for name, value in (_EXPECTED | slopes).items():
        found = match.get(name)
        if found is not None and not math.isclose(found, value, rel_tol=accuracy, abs_tol=0.0):
            return Rejection(f"the constant {name!r} is {found} where GELU has {value}")
    return match


def check_erf(match: Match) -> Match | Rejection:
    """Every constant is that of ``0.5 * x * (1 + erf(x / sqrt(2)))``, to the accuracy of float32."""
    return _check(match, {"slope": math.sqrt(0.5), "negative slope": -math.sqrt(0.5)})


def check_tanh(match: Match) -> Match | Rejection:
    """Every constant is that of ``0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x ** 3)))``, likewise."""
    return _check(match, {"slope": math.sqrt(2 / math.pi)})


def build_erf(builder: Builder, match: Match) -> Node:
    """``gelu(x)``."""
    return builder.call(aten.gelu.default, match["x"])


def build_tanh(builder: Builder, match: Match) -> Node:
    """``gelu(x, approximate="tanh")``."""
    return builder.call(aten.gelu.default, match["x"], approximate="tanh")


RULES = (
    Rule(
        name="erf",
        patterns={
            "0.5 * x * (1 + erf(x / sqrt(2)))": _halved(_ERF_OF_X),
            "0.5 * x * erfc(-x / sqrt(2))": Product(X, _ERFC_OF_X, constant="half"),
            "x * ndtr(x)": Product(X, Op(aten.special_ndtr.default, X), constant="factor"),
        },
        check=check_erf,
        rewrite=build_erf,
    ),
    Rule(
        name="tanh",
        patterns={
            "0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x ** 3)))": _halved(Op(aten.tanh.default, _INNER))
        },
        check=check_tanh,
        rewrite=build_tanh,
    ),
)


@register_pass
@dataclass(frozen=True)
class Gelu:
    """GELU in any order and association of its factors becomes ``gelu(x)``, or ``gelu(x, approximate="tanh")``.

    ``0.5 * x * (1 + erf(x / sqrt(2))) -> gelu(x)``, also as ``erfc`` and ``ndtr``;
    ``0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x ** 3))) -> gelu(x, approximate="tanh")``, also with
    ``x * (1 + 0.044715 * x * x)``. Constants must be right to a relative 2⁻²⁴, the accuracy of float32 (2⁻⁵⁰ where
    ``x`` is float64). QuickGELU, ``x * sigmoid(1.702 * x)``, is another function and stays.
    """

    name: ClassVar[str] = "gelu"
    tier: ClassVar[Tier] = "exact"
    requires: ClassVar[tuple[str, ...]] = ()

    def run(self, program: Program) -> PassResult:
        """Rewrite them."""
        return apply_rules(program, RULES)
