"""Attention with dropout on one GPU: generated kernels against the ways that PyTorch has, in the same run.

    python -m benchmarks.dropout [--case TEXT] [--configs 64x64w4s3/32x128w8s2-128x64w8s2] [--output results.json]

bfloat16, dropout 0.1. Every generated candidate is checked against float64 with the same weights dropped before it is
timed, forward and backward, in turn with eager, Inductor, ``scaled_dot_product_attention`` and its memory-efficient
kernel; and with the same kernel without dropout, which tells what dropping costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.sweep import parser, show_modes, sweep
from benchmarks.timing import Timing, interleave
from fxopt.codegen.attention import kernels, reference
from fxopt.codegen.attention.backward import kernel as backward
from fxopt.codegen.attention.backward.config import split_config
from fxopt.codegen.attention.operator import attention_forward
from fxopt.codegen.attention.problem import Problem
from fxopt.ir.attention import AttentionSpec
from fxopt.ir.expression import parse

_PROBABILITY: Final = 0.1
#: A few roundings to bfloat16 of results of the size of one.
_TOLERANCE: Final = 3e-2
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """Sizes of one case."""

    name: str
    batch: int
    heads: int
    length: int
    dim: int
    causal: bool = False

    @property
    def spec(self) -> AttentionSpec:
        """The attention of this case."""
        mask = parse("j <= i") if self.causal else None
        score = parse(f"s * {self.dim**-0.5!r}")
        return AttentionSpec(score, mask, dropout=_PROBABILITY, out_dtype=torch.bfloat16)

    def operands(self, device: str) -> list[Tensor]:
        """``q``, ``k`` and ``v``."""
        sizes = (self.batch, self.heads, self.length, self.dim)
        return [torch.randn(sizes, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]


CASES: Final = (
    Case("BERT base B32 S128", 32, 12, 128, 64),
    Case("BERT base B32 S512", 32, 12, 512, 64),
    Case("GPT-2 B8 S1024", 8, 12, 1024, 64, causal=True),
    Case("long B2 S4096 D64", 2, 16, 4096, 64),
    Case("long B2 S4096 D128", 2, 16, 4096, 128, causal=True),
)


def measure(case: Case, configs: Sequence[str], rounds: int, device: str = "cuda") -> dict[str, Timing]:
    """Milliseconds of every candidate that is right, forward and with its backward; those that are not are said."""
    torch.manual_seed(0)
    operands = case.operands(device)
    cotangent = torch.randn_like(operands[0])
    runs: dict[str, Callable[[], object]] = {}
    for name, attention in {**_peers(case, device), **_generated(case, configs, device)}.items():
        runs[f"forward {name}"] = lambda attention=attention: _forward(attention, operands)  # type: ignore[misc]
        runs[f"training {name}"] = lambda attention=attention: _train(attention, operands, cotangent)  # type: ignore[misc]
    return interleave(runs, device, rounds=rounds)


@torch.no_grad()
def _forward(attention: Attention, operands: Sequence[Tensor]) -> Tensor:
    q, k, v = operands
    return attention(q, k, v)


def _train(attention: Attention, operands: Sequence[Tensor], cotangent: Tensor) -> tuple[Tensor, ...]:
    q, k, v = operands
    return torch.autograd.grad(attention(q, k, v), operands, cotangent)


def _peers(case: Case, device: str) -> dict[str, Attention]:
    hidden = torch.ones(case.length, case.length, dtype=torch.bool, device=device).triu(1)

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) * case.dim**-0.5
        scores = scores.masked_fill(hidden, -torch.inf) if case.causal else scores
        return F.dropout(scores.softmax(-1), _PROBABILITY) @ v

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=_PROBABILITY, is_causal=case.causal)

    def efficient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            return sdpa(q, k, v)

    peers: dict[str, Attention] = {"eager": eager, "inductor": torch.compile(eager), "sdpa": sdpa}
    return {**peers, "sdpa-efficient": efficient} if device == "cuda" else peers


def _generated(case: Case, configs: Sequence[str], device: str) -> dict[str, Attention]:
    """The generated kernels that are right, and the first of them without dropout."""
    found = {config: _attention(case.spec, config) for config in dict.fromkeys((*configs, *_own(case, device)))}
    right = {f"fxopt {config}": attention for config, attention in found.items() if _is_right(case, config, device)}
    return {**right, "fxopt without dropout": _attention(replace(case.spec, dropout=0.0), next(iter(found)))}


def _own(case: Case, device: str) -> list[str]:
    """The configurations that fxopt itself would measure, each forward with the first of the backward."""
    capability = torch.cuda.get_device_capability() if device == "cuda" else (9, 0)
    sizes = (case.batch, case.heads, case.heads, case.length, case.length)
    forwards, _ = kernels.candidates(Problem(case.spec, case.dim, case.dim, torch.bfloat16, capability, *sizes))
    backwards = backward.candidates(Problem(case.spec, case.dim, case.dim, torch.bfloat16, capability))
    return [*(f"{config}/{backwards[0]}" for config in forwards), *(f"{forwards[0]}/{b}" for b in backwards[1:])]


def _attention(spec: AttentionSpec, config: str) -> Attention:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seed = torch.randint(2**63 - 1, (1,), device=q.device) if spec.dropout else None
        out: Tensor = attention_forward(q, k, v, [], str(spec), config, torch.is_grad_enabled(), seed)[0]
        return out

    return run


def _is_right(case: Case, config: str, device: str) -> bool:
    """Whether one sequence gives what float64 does with the same weights dropped, and the same gradients."""
    q, k, v = (x[:1, :2].detach().requires_grad_() for x in case.operands(device))
    seed, dout = torch.tensor([7], device=device), torch.randn_like(q)
    out, _ = attention_forward(q, k, v, [], str(case.spec), config, True, seed)
    found = [out, *torch.autograd.grad(out, (q, k, v), dout)]
    wide = a, b, c = [x.detach().double().requires_grad_() for x in (q, k, v)]
    exact = reference.attention(a, b, c, [], str(replace(case.spec, out_dtype=torch.float64)), seed)
    expected = [exact, *torch.autograd.grad(exact, wide, dout.double())]
    pairs = [(a.detach().double(), b.detach()) for a, b in zip(found, expected, strict=True)]
    error = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
    if error >= _TOLERANCE:
        print(f"  {config} ({split_config(config)[1]}) is wrong: error {error:.3g}")
    return error < _TOLERANCE


show: Final = partial(show_modes, width=64)


def main() -> None:
    """Parse the command line, run the cases, write the results."""
    options = parser(__doc__, "BERT")
    options.add_argument("--configs", nargs="*", default=[], help="configurations to time beside fxopt's own choice")
    chosen = options.parse_args()
    sweep(chosen, CASES, lambda case: measure(case, chosen.configs, chosen.rounds), show)


if __name__ == "__main__":
    main()
