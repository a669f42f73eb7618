"""Dropout that drops nothing disappears."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fxopt.ir.program import Program
from fxopt.ir.site import Tier
from fxopt.rewriter.passes import PassResult, apply_rules
from fxopt.rewriter.pattern import Const, Literal, Op, Var
from fxopt.rewriter.registry import register_pass
from fxopt.rewriter.rule import Rule

aten = torch.ops.aten
_DROPOUTS = (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)


def _is_false(value: Any) -> bool:
    return value is False


RULES = (
    Rule(
        name="inactive-dropout",
        patterns={
            "evaluation": Op(_DROPOUTS, Var("x"), Const("p"), Const("train", _is_false)),
            "probability 0": Op(_DROPOUTS, Var("x"), Literal(0.0), Const("train")),
        },
        rewrite=lambda builder, match: match["x"],
    ),
)


@register_pass
@dataclass(frozen=True)
class InactiveDropout:
    """``dropout(x, p, train=False) -> x`` and ``dropout(x, 0, train) -> x``: an identity, in any dtype."""

    name: ClassVar[str] = "inactive-dropout"
    tier: ClassVar[Tier] = "exact"
    requires: ClassVar[tuple[str, ...]] = ()

    def run(self, program: Program) -> PassResult:
        """Remove them."""
        return apply_rules(program, RULES)
