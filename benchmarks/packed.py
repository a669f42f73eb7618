"""Training an attention block with a packed projection on one GPU: gradients written in place or put together.

    python -m benchmarks.packed [--case TEXT] [--rounds N] [--output results.json]

bfloat16. A block is a projection to queries, keys and values, attention, and a projection back; a step is its forward
and backward. fxopt, whose backward writes one gradient, is timed in turn with fxopt that takes views (``fxopt views``,
as it does where it can't), eager, Inductor, and ``scaled_dot_product_attention`` in both. Results and gradients are
checked against float64 within the budget of eager before anything is timed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Final
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn import functional as F

from benchmarks.sweep import parser, sweep
from benchmarks.timing import Timing, interleave
from fxopt.lowering.candidate import Candidate
from fxopt.testing import compare

Step = Callable[[], tuple[Tensor, ...]]
_VIEWS: Final = "fxopt views"


@dataclass(frozen=True)
class Case:
    """Sizes of a block, and how its projection is cut: ``split`` (GPT-2), ``unbind`` (ViT) or ``in turn`` (BLOOM)."""

    name: str
    batch: int
    heads: int
    length: int
    dim: int
    cut: str
    causal: bool = False
    bias: bool = True


CASES: Final = (
    Case("ViT B/16 B128", 128, 12, 197, 64, "unbind"),
    Case("Swin stage 1 B64 x 64 windows", 4096, 3, 49, 32, "unbind"),
    Case("BERT base B32 S512", 32, 12, 512, 64, "split"),
    Case("GPT-2 B8 S1024", 8, 12, 1024, 64, "split", causal=True),
    Case("BLOOM-like B4 S2048 D128", 4, 16, 2048, 128, "in turn", causal=True),
    Case("without a bias B4 S2048 D128", 4, 16, 2048, 128, "split", causal=True, bias=False),
)


class Block(nn.Module):
    """A packed projection, attention written by hand (or as one call, ``fused``), and the projection back."""

    def __init__(self, case: Case, fused: bool = False) -> None:
        super().__init__()
        width = case.heads * case.dim
        self.qkv, self.out = nn.Linear(width, 3 * width, case.bias), nn.Linear(width, width, case.bias)
        self.case, self.fused = case, fused
        self.register_buffer("hidden", torch.ones(case.length, case.length, dtype=torch.bool).triu(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, S, C] -> [B, S, C]``."""
        q, k, v = self._cut(self.qkv(x))
        return self.out(self._attend(q, k, v).transpose(1, 2).reshape(x.shape))  # type: ignore[no-any-return]

    def _cut(self, packed: Tensor) -> Sequence[Tensor]:
        batch, length, width = packed.shape
        heads, dim = self.case.heads, self.case.dim
        if self.case.cut == "unbind":
            return packed.reshape(batch, length, 3, heads, dim).permute(2, 0, 3, 1, 4).unbind(0)
        if self.case.cut == "in turn":
            parts = packed.view(batch, length, heads, 3, dim)
            return [parts[..., n, :].transpose(1, 2) for n in range(3)]
        return [x.view(batch, length, heads, dim).transpose(1, 2) for x in packed.split(width // 3, -1)]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.fused:
            return F.scaled_dot_product_attention(q, k, v, is_causal=self.case.causal)
        scores = q @ k.transpose(-2, -1) * self.case.dim**-0.5
        scores = scores.masked_fill(self.get_buffer("hidden"), -torch.inf) if self.case.causal else scores
        weights: Tensor = scores.softmax(-1)
        return weights @ v


def measure(case: Case, rounds: int, device: str = "cuda") -> dict[str, Timing]:
    """Milliseconds of a step of every candidate that is right; those that are not are said."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    block = Block(case).to(device, torch.bfloat16)
    x = torch.randn(case.batch, case.length, case.heads * case.dim, device=device, dtype=torch.bfloat16)
    cotangent = torch.randn_like(x)
    exact = _step(copy.deepcopy(block).double(), x.double(), cotangent.double())()
    steps = {name: _step(run, x, cotangent) for name, run in _candidates(block).items()}
    eager = steps["eager"]()
    right = {name: step for name, step in steps.items() if _is_right(name, step, eager, exact)}
    del exact, eager
    return interleave(right, device, rounds=rounds)


def _candidates(block: Block) -> dict[str, Any]:
    fused = copy.deepcopy(block)
    fused.fused = True
    return {
        "eager": block,
        "sdpa": fused,
        "inductor": _compiled(block),
        "inductor sdpa": _compiled(fused),
        "fxopt": _compiled(block, backend="fxopt"),
        _VIEWS: _compiled(block, backend="fxopt"),
    }


def _compiled(block: Block, **options: Any) -> Any:
    return torch.compile(copy.deepcopy(block), **options)


def _step(block: Any, x: Tensor, cotangent: Tensor) -> Step:
    leaves = [x.detach().requires_grad_(), *block.parameters()]

    def step() -> tuple[Tensor, ...]:
        out = block(leaves[0])
        return (out, *torch.autograd.grad(out, leaves, cotangent))

    return step


def _is_right(name: str, step: Step, eager: Sequence[Tensor], exact: Sequence[Tensor]) -> bool:
    """Whether a first step, which compiles, gives what float64 does."""
    with patch("fxopt.lowering.attention.as_one", _as_found) if name == _VIEWS else nullcontext():
        found = step()
    wrong = [report for report in compare(found, list(eager), list(exact)) if not report.ok]
    for report in wrong:
        print(f"  {name} is wrong: {report}")
    return not wrong


def _as_found(site: Node, found: Sequence[Candidate]) -> list[Candidate]:
    return list(found)


def show(case: Case, timings: dict[str, Timing]) -> None:
    """Print milliseconds, and how much faster each is than the best that PyTorch has."""
    print(f"\n{case.name}")
    best = min(timing.median_ms for name, timing in timings.items() if "fxopt" not in name)
    for name, timing in sorted(timings.items(), key=lambda item: item[1].median_ms):
        gain = best / timing.median_ms
        print(f"  {name:16} {timing.median_ms:8.3f} ms  {gain:5.2f}x  ±{timing.spread:4.0%}", flush=True)


def main() -> None:
    """Parse the command line, run the cases, write the results."""
    options = parser(__doc__, "ViT").parse_args()
    sweep(options, CASES, lambda case: measure(case, options.rounds), show)


if __name__ == "__main__":
    main()
