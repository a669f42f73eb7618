"""A rule and a pass of one's own, registered from outside the package.

The attention below subtracts the largest score itself before the softmax. That changes nothing, as softmax does not
depend on a shift of its row, but the scores are read twice, so fxopt keeps the site and says so. A rule of a few lines
removes the shift; after it, the site is an attention like any other.

    python examples/your_own_pass.py
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.fx import Node

import fxopt
from fxopt.ir.nodes import shape
from fxopt.rewriter.pattern import Const, Match, Op, Var
from fxopt.rewriter.pattern import Literal as Exactly

aten = torch.ops.aten

# What has no pattern must have its default: a softmax with a dtype, or a maximum without keepdim, does not match.
LARGEST = Op(aten.amax.default, Var("x"), Const("axes"), Exactly(True))
SHIFTED = Op(aten.softmax.int, Op(aten.sub.Tensor, Var("x"), LARGEST), Const("axis"))


def check_axis(match: Match) -> Match | fxopt.Rejection:
    """The maximum may only run over the axis of the softmax: any other shift changes from element to element."""
    rank = len(shape(match["x"]))
    axis, axes = match["axis"] % rank, [a % rank for a in match["axes"]]
    if axes != [axis]:
        return fxopt.Rejection(f"the maximum runs over axes {axes}, the softmax over axis {axis}", (match.root,))
    return match


def build_softmax(builder: fxopt.Builder, match: Match) -> Node:
    """``softmax(x)``."""
    return builder.call(aten.softmax.int, match["x"], match["axis"])


RULES = (
    fxopt.Rule(
        name="shifted-softmax",
        kind="softmax",
        patterns={"softmax(x - amax(x))": SHIFTED},
        check=check_axis,
        rewrite=build_softmax,
    ),
)


@fxopt.register_pass
@dataclass(frozen=True)
class UnshiftSoftmax:
    """``softmax(x - amax(x)) -> softmax(x)``, the maximum taken over the axis of the softmax."""

    name: ClassVar[str] = "unshift-softmax"
    tier: ClassVar[Literal["exact"]] = "exact"
    requires: ClassVar[tuple[str, ...]] = ()

    def run(self, program: fxopt.Program) -> fxopt.PassResult:
        """Rewrite every one."""
        return fxopt.apply_rules(program, RULES)


class Attention(nn.Module):
    """Self-attention that shifts its scores by their maximum over ``axis``; only −1 is harmless."""

    def __init__(self, axis: int = -1, channels: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.axis, self.heads = axis, heads
        self.qkv = nn.Linear(channels, 3 * channels)

    def forward(self, x_BSC: Tensor) -> Tensor:
        """``[B, S, C]`` to ``[B, S, C]``."""
        batch, length, channels = x_BSC.shape
        q_BHSD, k_BHSD, v_BHSD = self.qkv(x_BSC).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores_BHSS = q_BHSD @ k_BHSD.transpose(-2, -1) * 0.25
        weights_BHSS = torch.softmax(scores_BHSS - scores_BHSS.amax(self.axis, keepdim=True), dim=-1)
        mixed_BHSD: Tensor = weights_BHSS @ v_BHSD
        return mixed_BHSD.transpose(1, 2).reshape(batch, length, channels)


def main(base: str = "inductor") -> tuple[fxopt.Report, fxopt.PassResult]:
    """Use the pass in the backend and in `fxopt.rewrite`; return the report, and what became of a near miss."""
    torch.manual_seed(0)
    model, x_BSC = Attention().eval(), torch.randn(2, 20, 64)
    passes: list[str | fxopt.Pass] = ["unshift-softmax", *fxopt.passes.exact_pipeline()]
    with torch.no_grad():
        print(f"Without the pass\n{fxopt.explain(model, x_BSC).sites[0].reason}\n")

        good = fxopt.explain_program(fxopt.capture(model, (x_BSC,)), passes)
        print(f"With it\n{good}\n")
        miss = UnshiftSoftmax().run(fxopt.capture(Attention(axis=-2).eval(), (x_BSC,)))
        print(f"Its near miss, which shifts by the maximum of each column\n{miss.near_misses[0].reason}\n")

        # verify="numeric" checks each rewritten site against float64: outputs and gradients, on hard inputs too.
        options: dict[str, Any] = {"passes": passes, "verify": "numeric", "strict": True, "base": base}
        through_backend = torch.compile(model, backend="fxopt", options=options)
        rewritten = fxopt.rewrite(model, (x_BSC,), passes=passes, verify="numeric", strict=True)
        candidates: dict[str, Callable[[Tensor], Tensor]] = {
            "torch.compile": through_backend,
            "fxopt.rewrite": rewritten,
        }
        for name, fast in candidates.items():
            torch.testing.assert_close(fast(x_BSC), model(x_BSC))
            print(f"{name}: equal")
    return good, miss


if __name__ == "__main__":
    main()
