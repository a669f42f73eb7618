"""Attention over windows and short sequences on one GPU: kernels for few keys beside the portable one and SDPA.

    python -m benchmarks.windows [--case TEXT] [--configs short:64x64w4p8 …] [--output results.json]

bfloat16, ``q, k, v`` as views of one packed projection ``[B, N, 3, H, D]``. Swin-T's four stages at batch 64, with and
without the shift mask, and sequences of 128, 197, 256 and 512 tokens at 16k tokens. Every candidate is checked against
float64 before it is timed as a CUDA graph, in turn with the others. SDPA gets bias and mask added up beforehand.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.environment import environment
from benchmarks.timing import Timing, cuda_graph, interleave
from fxopt.codegen.attention import kernels
from fxopt.codegen.attention.operator import attention_forward
from fxopt.codegen.attention.problem import Problem
from fxopt.errors import LoweringError
from fxopt.ir.attention import AttentionSpec, Capture
from fxopt.ir.expression import parse

_HALF: Final = torch.bfloat16
_IMAGES: Final = 64
_BACKENDS: Final = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
#: Largest error of a bfloat16 attention of standard normal values.
_TOLERANCE: Final = 4e-2
#: Sequences that the float64 check reads, the first and the last ones.
_CHECKED: Final = 8
Candidate = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """``batch`` sequences of ``tokens``; ``windows`` to an image where there is a bias, with a mask if ``shifted``."""

    batch: int
    heads: int
    tokens: int
    head_dim: int
    windows: int = 0
    shifted: bool = False

    def __str__(self) -> str:
        kind = ("shifted " if self.shifted else "windows ") if self.windows else "plain "
        return f"{kind}B{self.batch} H{self.heads} N{self.tokens} D{self.head_dim}"

    @property
    def flops(self) -> float:
        """Multiplications and additions of the two contractions."""
        return 4.0 * self.batch * self.heads * self.tokens**2 * self.head_dim

    @property
    def spec(self) -> AttentionSpec:
        """The case as fxopt states it."""
        captures = (Capture("-hij", _HALF),) * bool(self.windows) + (Capture("p-ij", _HALF),) * self.shifted
        terms = " + ".join((f"s * {1 / math.sqrt(self.head_dim)!r}", *(f"c{n}" for n in range(len(captures)))))
        return AttentionSpec(parse(terms), None, captures, out_dtype=_HALF, out_layout="bshd")

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Views of one packed projection."""
        packed = torch.randn(self.batch, self.tokens, 3, self.heads, self.head_dim, device="cuda", dtype=_HALF)
        q, k, v = (packed[:, :, n].transpose(1, 2) for n in range(3))
        return q, k, v

    def captures(self) -> list[Tensor]:
        """The bias of each head, and the mask of each window of an image."""
        n = self.tokens
        bias = [torch.randn(1, self.heads, n, n, device="cuda", dtype=_HALF)] * bool(self.windows)
        hidden = torch.rand(self.windows, 1, n, n, device="cuda") < 0.3
        return bias + [torch.where(hidden, -100.0, 0.0).to(_HALF)] * self.shifted

    def dense(self, captures: Sequence[Tensor]) -> Tensor | None:
        """Bias and mask added up for every sequence, as SDPA wants them."""
        if not captures:
            return None
        if not self.shifted:
            return captures[0].expand(self.batch, -1, -1, -1)
        return (captures[0] + captures[1]).repeat(self.batch // self.windows, 1, 1, 1)


_STAGES: Final = ((64, 3), (16, 6), (4, 12), (1, 24))
CASES: Final = (
    *(
        Case(windows * _IMAGES, heads, 49, 32, windows, shifted)
        for windows, heads in _STAGES
        for shifted in ((False, True) if windows > 1 else (False,))
    ),
    *(Case(round(16_384 / n), 32, n, 64) for n in (128, 197, 256, 512)),
    *(Case(round(16_384 / n), 16, n, 128) for n in (128, 256)),
)


def measure(case: Case, configs: Sequence[str], rounds: int) -> dict[str, Timing | str]:
    """Check and time every candidate of one case; what fails is its reason instead."""
    torch.manual_seed(0)
    q, k, v = case.tensors()
    captures = case.captures()
    dense = case.dense(captures)
    runs: dict[str, Candidate] = {c: _own(case, q, k, v, captures, c) for c in _configs(case, configs)}
    runs |= {f"sdpa-{name}": _sdpa(backend, q, k, v, dense) for name, backend in _BACKENDS.items()}
    runs["flex"] = _flex(case, q, k, v, captures)
    found: dict[str, Timing | str] = {}
    sound: dict[str, Callable[[], object]] = {}
    for name, run in runs.items():
        try:
            _check(run, q, k, v, dense)
            sound[name] = cuda_graph(run)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error) else ''}"
    return found | interleave(sound, "cuda", rounds=rounds)


def _configs(case: Case, configs: Sequence[str]) -> list[str]:
    sizes = (case.batch, case.heads, case.heads, case.tokens, case.tokens)
    capability = torch.cuda.get_device_capability()
    own, _ = kernels.candidates(Problem(case.spec, case.head_dim, case.head_dim, _HALF, capability, *sizes))
    return list(dict.fromkeys((*own, *(c for c in configs if _serves(c, case.tokens)))))


def _serves(config: str, tokens: int) -> bool:
    """Whether the pieces of a configuration hold these tokens with less than half to spare."""
    pieces = config.partition("x")[2].partition("w")[0].split("+")
    return not config.startswith("short:") or tokens <= sum(map(int, pieces)) < 2 * tokens


def _own(case: Case, q: Tensor, k: Tensor, v: Tensor, captures: list[Tensor], config: str) -> Candidate:
    spec = str(case.spec)
    return lambda: attention_forward(q, k, v, captures, spec, config, False)[0]


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Candidate:
    def run() -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, bias)

    return run


def _flex(case: Case, q: Tensor, k: Tensor, v: Tensor, captures: Sequence[Tensor]) -> Candidate:
    from torch.nn.attention.flex_attention import flex_attention

    def biased(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        score = score + captures[0][0, h, i, j]
        return score + captures[1][b % case.windows, 0, i, j] if case.shifted else score

    torch._dynamo.reset()
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    score_mod = biased if case.windows else None
    return lambda: compiled(q, k, v, score_mod=score_mod)


def _check(run: Candidate, q: Tensor, k: Tensor, v: Tensor, dense: Tensor | None) -> None:
    """The first and the last sequences must agree with float64."""
    out = run()
    for part in (slice(0, _CHECKED), slice(-_CHECKED, None)):
        bias = 0.0 if dense is None else dense[part].double()
        x = q[part].double() @ k[part].double().transpose(2, 3) / math.sqrt(q.shape[3]) + bias
        error = (out[part].double() - torch.softmax(x, -1) @ v[part].double()).abs().max().item()
        if not error < _TOLERANCE:
            raise LoweringError(f"wrong: error {error:.3g}")


def show(case: Case, found: dict[str, Timing | str]) -> None:
    """Print one case, best first."""
    timed = {name: timing for name, timing in found.items() if isinstance(timing, Timing)}
    print(f"\n{case}")
    for name, timing in sorted(timed.items(), key=lambda pair: pair[1].median_ms):
        rate = case.flops / timing.median_ms * 1e-9
        print(f"  {name:32} {timing.median_ms * 1e3:8.1f} us  {rate:6.1f} TFLOP/s  ±{timing.spread:4.0%}")
    for name, reason in found.items():
        if isinstance(reason, str):
            print(f"  {name:32} {reason}", flush=True)


def main() -> None:
    """Parse the command line, run the cases, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="", help="only cases whose name contains this, such as 'shifted' or 'N197'")
    parser.add_argument("--configs", nargs="*", default=[], help="further configurations, where they hold the tokens")
    parser.add_argument("--rounds", type=int, default=20, help="samples per candidate")
    parser.add_argument("--output", type=Path, help="where to write the results as JSON")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.windows needs an NVIDIA GPU; torch sees none")
    facts = environment("cuda")
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    results: dict[str, dict[str, object]] = {}
    for case in (case for case in CASES if options.case in str(case)):
        found = measure(case, options.configs, options.rounds)
        show(case, found)
        results[str(case)] = {name: value if isinstance(value, str) else asdict(value) for name, value in found.items()}
        if options.output:
            options.output.write_text(json.dumps({"environment": facts, "results": results}, indent=1))


if __name__ == "__main__":
    main()
