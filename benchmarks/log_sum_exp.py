"""Attention whose log-sum-exp is read, on one GPU: the rewritten function against eager, Inductor and FlexAttention.

    python -m benchmarks.log_sum_exp [--case TEXT] [--output results.json]

bfloat16. The model writes ``softmax(x) @ v`` and ``logsumexp(x)``, of which it takes a loss in training. Every
candidate is checked against float64 before it is timed, forward and backward; all are timed in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.sweep import parser, show_modes, sweep
from benchmarks.timing import Timing, interleave

#: A few roundings to bfloat16 of results of the size of one.
_TOLERANCE: Final = 3e-2
Both = tuple[Tensor, Tensor]
Attention = Callable[[Tensor, Tensor, Tensor], Both]


@dataclass(frozen=True)
class Case:
    """Sizes of one case."""

    name: str
    batch: int
    heads: int
    length: int
    dim: int
    causal: bool = False

    def operands(self, device: str) -> list[Tensor]:
        """``q``, ``k`` and ``v``."""
        sizes = (self.batch, self.heads, self.length, self.dim)
        return [torch.randn(sizes, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]

    def written_out(self, q: Tensor, k: Tensor, v: Tensor) -> Both:
        """The attention as a model writes it."""
        scores = (q @ k.transpose(-2, -1)).to(torch.promote_types(q.dtype, torch.float32)) * self.dim**-0.5
        if self.causal:
            hidden = torch.ones(self.length, self.length, dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(hidden, -torch.inf)
        return scores.softmax(-1).to(v.dtype) @ v, scores.logsumexp(-1)


CASES: Final = (
    Case("window B64 S49", 64, 12, 49, 64),
    Case("BERT base B32 S512", 32, 12, 512, 64),
    Case("GPT-2 B8 S1024", 8, 12, 1024, 64, causal=True),
    Case("long B2 S4096 D128", 2, 16, 4096, 128, causal=True),
    Case("part of a ring B1 S8192 D128", 1, 16, 8192, 128),
)


def measure(case: Case, rounds: int, device: str = "cuda") -> dict[str, Timing]:
    """Milliseconds of every candidate that is right, forward and with its backward; those that are not are said."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    operands = case.operands(device)
    runs: dict[str, Callable[[], object]] = {}
    for name, attention in _candidates(case, device).items():
        if _is_right(case, name, attention, operands):
            runs[f"forward {name}"] = lambda attention=attention: _forward(attention, operands)  # type: ignore[misc]
            runs[f"training {name}"] = lambda attention=attention: _train(attention, operands)  # type: ignore[misc]
    return interleave(runs, device, rounds=rounds)


def _candidates(case: Case, device: str) -> dict[str, Attention]:
    found: dict[str, Any] = {
        "eager": case.written_out,
        "inductor": torch.compile(case.written_out, dynamic=False),
        "fxopt": torch.compile(case.written_out, backend="fxopt", dynamic=False),
    }
    return {**found, "flex": _flex(case)} if device == "cuda" else found


def _flex(case: Case) -> Attention:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    length = case.length
    mask = create_block_mask(lambda b, h, i, j: j <= i, None, None, length, length) if case.causal else None
    run: Any = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: run(q, k, v, block_mask=mask, return_lse=True)


@torch.no_grad()
def _forward(attention: Attention, operands: Sequence[Tensor]) -> Both:
    q, k, v = operands
    return attention(q, k, v)


def _train(attention: Attention, operands: Sequence[Tensor]) -> tuple[Tensor, ...]:
    q, k, v = operands
    out, lse = attention(q, k, v)
    return torch.autograd.grad(out.float().square().mean() + 1e-2 * lse.square().mean(), operands)


def _is_right(case: Case, name: str, attention: Attention, operands: Sequence[Tensor]) -> bool:
    """Whether two heads of the first sequence, results and gradients, are what float64 gives."""
    wide = [x.detach()[:1, :2].double().requires_grad_() for x in operands]
    expected = [*_forward(case.written_out, wide), *_train(case.written_out, wide)]
    # The means that the loss is made of run over all heads and sequences.
    expected[2:] = [x * 2 / (case.batch * case.heads) for x in expected[2:]]
    found = [*_forward(attention, operands), *_train(attention, operands)]
    pairs = [(a[:1, :2].double(), b) for a, b in zip(found, expected, strict=True)]
    error = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
    if error >= _TOLERANCE:
        print(f"  {name} is wrong: error {error:.3g}")
    return error < _TOLERANCE


show: Final = partial(show_modes, width=24)


def main() -> None:
    """Parse the command line, run the cases, write the results."""
    options = parser(__doc__, "BERT").parse_args()
    sweep(options, CASES, lambda case: measure(case, options.rounds), show)


if __name__ == "__main__":
    main()
