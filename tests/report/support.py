"""Programs and passes that the tests of reports share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fxopt.frontend.export import from_export
from fxopt.ir.program import Program
from fxopt.ir.site import Site, Source, Tier
from fxopt.passes.canonical.inactive_dropout import InactiveDropout
from fxopt.report.sites import collect_sites
from fxopt.rewriter.passes import Pass, PassResult, apply_rules
from fxopt.rewriter.pattern import Const, Op, Var
from fxopt.rewriter.pipeline import PipelineResult, run_pipeline
from fxopt.rewriter.rule import Rejection, Rule

aten = torch.ops.aten

#: Text that breaks quoting, lines, terminals, markup and reading direction.
HOSTILE = "a'b\"c\nd\r\x1b[31m\x07<b>&{x}%s\\ \u2028\u202e\ud800 e\u0301"


class Block(nn.Module):
    """One transformer layer: norm, attention with dropout, norm, MLP."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm, self.other = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x_BSD: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x_BSD)).chunk(3, -1)
        weights = self.drop((q @ k.transpose(-2, -1) * 0.5).softmax(-1))
        x_BSD = x_BSD + self.out(weights @ v)
        hidden: Tensor = self.down(nn.functional.gelu(self.up(self.other(x_BSD))))
        return x_BSD + hidden


def capture(function: Callable[..., Any], *args: Any) -> Program:
    return from_export(function, args)


def sites(function: Callable[..., Any], *args: Any, passes: Sequence[Pass] = ()) -> tuple[Site, ...]:
    return collect_sites(run(capture(function, *args), passes))


def run(program: Program, passes: Sequence[Pass] = ()) -> PipelineResult:
    return run_pipeline(program, passes or [InactiveDropout()])


def kinds(found: Sequence[Site]) -> list[str]:
    return [site.kind for site in found]


def site(**changes: Any) -> Site:
    fields: dict[str, Any] = {
        "kind": "norm",
        "status": "kept",
        "rule": "r",
        "reason": "why",
        "source": Source("f.py:1"),
    }
    return Site(**{**fields, **changes})


@dataclass(frozen=True)
class RulePass:
    """A pass of the rules it is given."""

    rules: tuple[Rule, ...]

    name: ClassVar[str] = "rule-pass"
    tier: ClassVar[Tier] = "exact"
    requires: ClassVar[tuple[str, ...]] = ()

    def run(self, program: Program) -> PassResult:
        return apply_rules(program, self.rules)


@dataclass(frozen=True)
class Failing:
    """A pass that raises."""

    name: ClassVar[str] = "failing"
    tier: ClassVar[Tier] = "approximate"
    requires: ClassVar[tuple[str, ...]] = ()

    def run(self, program: Program) -> PassResult:
        raise ValueError("broken on purpose")


#: Gives the activation of an MLP another form (wrong as mathematics, right in shape): enough to make a site.
GELU_TO_SILU = Rule(
    "gelu-to-silu",
    {"gelu": Op(aten.gelu.default, Var("x"))},
    lambda builder, match: builder.call(aten.silu.default, match["x"]),
    kind="mlp",
)
SILU_TO_RELU = Rule(
    "silu-to-relu",
    {"silu": Op(aten.silu.default, Var("x"))},
    lambda builder, match: builder.call(aten.relu.default, match["x"]),
    kind="mlp",
)
REFUSE_SOFTMAX = Rule(
    "refuse-softmax",
    {"plain": Op(aten.softmax.int, Var("x"), Const("dim"))},
    lambda builder, match: match["x"],
    check=lambda match: Rejection("refused on purpose", (match.root,)),
    kind="attention",
)
#: Fits only where the scores are divided, so a product is a near miss of two nodes.
DIVIDED = Rule(
    "divided",
    {
        "divided scores": Op(
            aten.matmul.default, Op(aten.softmax.int, Op(aten.div.Tensor, Var("s"), Const("c")), Const("dim")), Var("v")
        )
    },
    lambda builder, match: match["v"],
    kind="attention",
)
