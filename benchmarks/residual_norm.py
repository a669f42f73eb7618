"""A residual sum and its norm: generated kernels against the one that Inductor makes of the same function, and eager.

    python -m benchmarks.residual_norm [--case TEXT] [--configs 4w4/4w4p4] [--quick] [--output results.json]

bfloat16. *pre* gives the sum besides the norm, *post* the norm alone; *forward* without gradients, *training* with
those of everything. Every candidate is checked against float64 before it is timed; on a GPU all are replayed as CUDA
graphs, in turn. GB/s are those of what has to be read and written at least; a copy of as many bytes is timed beside
them. ``--quick`` takes small sizes and few samples, on the CPU too, where the operators compute in plain PyTorch.
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
from torch.nn import functional as F

from benchmarks.accuracy import largest_error
from benchmarks.environment import environment
from benchmarks.timing import Candidate, Timing, cuda_graph, interleave
from fxopt.codegen.norm.residual_norm.config import backward_candidates, candidates
from fxopt.codegen.norm.residual_norm.operator import residual_norm_forward

_EPS: Final = 1e-5
#: A few roundings to bfloat16 of results of the size of one.
_TOLERANCE: Final = 3e-2
SHAPES: Final = ((16384, 384), (16384, 768), (16384, 1024), (16384, 4096), (4096, 8192))
QUICK: Final = ((64, 96),)
Function = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """One function: a kind of norm over rows, with the sum as a result (pre) or without, with a backward or without."""

    rows: int
    width: int
    kind: str
    pre: bool
    training: bool

    def __str__(self) -> str:
        place, mode = "pre" if self.pre else "post", "training" if self.training else "forward"
        return f"{self.kind} {self.rows}x{self.width} {place} {mode}"

    @property
    def bytes(self) -> int:
        """What is read and written at least: operands and results, and in training the sum, kept for the backward."""
        forward = 3 + (self.pre or self.training)
        backward = 3 + self.pre if self.training else 0
        return (forward + backward) * self.rows * self.width * 2

    def operands(self, device: str) -> list[Tensor]:
        """x, residual, weight, and for a LayerNorm the bias."""
        sizes = [(self.rows, self.width)] * 2 + [(self.width,)] * (2 if self.kind == "layer_norm" else 1)
        draws = [torch.randn(size, device=device, dtype=torch.bfloat16) for size in sizes]
        return [draw.requires_grad_(self.training) for draw in draws]

    def meaning(self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
        """The function, in the dtype of its operands."""
        total = x + residual
        rows = (self.width,)
        layer = self.kind == "layer_norm"
        normal = F.layer_norm(total, rows, weight, bias, _EPS) if layer else F.rms_norm(total, rows, weight, _EPS)
        return (normal, total) if self.pre else (normal,)

    def generated(self, config: str) -> Function:
        """The same by the kernels of one configuration."""

        def run(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
            flags = (self.pre or self.training, self.training)
            found: tuple[Tensor, ...] = residual_norm_forward(
                x, residual, weight, bias, self.kind, _EPS, False, config, *flags
            )
            return found[:2] if self.pre else found[:1]

        return run

    def configs(self) -> list[str]:
        """The configurations that fxopt itself would measure; in training every pair of both."""
        forward = candidates(self.width)
        if not self.training:
            return list(forward)
        return [f"{f}/{b}" for f in forward for b in backward_candidates(self.width)]


def cases(shapes: Sequence[tuple[int, int]], text: str = "") -> list[Case]:
    """Every case of ``shapes`` whose name contains ``text``."""
    found = [
        Case(rows, width, kind, pre, training)
        for rows, width in shapes
        for kind in ("layer_norm", "rms_norm")
        for pre in (True, False)
        for training in (False, True)
    ]
    return [case for case in found if text in str(case)]


def measure(case: Case, configs: Sequence[str], rounds: int, device: str) -> dict[str, Timing]:
    """Milliseconds of every candidate that is right; those that are not are said."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    operands = case.operands(device)
    cotangents = [torch.randn_like(result) for result in case.meaning(*operands)]
    functions: dict[str, Function] = {"eager": case.meaning, "inductor": torch.compile(case.meaning, dynamic=False)}
    functions |= {f"fxopt {config}": case.generated(config) for config in dict.fromkeys((*configs, *case.configs()))}
    exact = _results(
        case, case.meaning, [x.detach().double().requires_grad_(case.training) for x in operands], cotangents
    )
    runs: dict[str, Candidate] = {}
    for name, function in functions.items():
        error = largest_error(_results(case, function, operands, cotangents), exact)
        if error < _TOLERANCE:
            runs[name] = _run(case, function, operands, cotangents)
        else:
            print(f"  {name} is wrong: error {error:.3g}")
    source = torch.empty(case.bytes // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    runs["copy"] = lambda: target.copy_(source)
    runs = {name: cuda_graph(run) for name, run in runs.items()} if device == "cuda" else runs
    return interleave(runs, device, rounds=rounds)


def _run(case: Case, function: Function, operands: Sequence[Tensor], cotangents: Sequence[Tensor]) -> Candidate:
    if case.training:
        return lambda: torch.autograd.grad(function(*operands), operands, cotangents)

    def forward() -> object:
        with torch.no_grad():
            return function(*operands)

    return forward


def _results(case: Case, function: Function, operands: Sequence[Tensor], cotangents: Sequence[Tensor]) -> list[Tensor]:
    """Results, and in training gradients."""
    if not case.training:
        with torch.no_grad():
            return list(function(*operands))
    results = function(*operands)
    given = [cotangent.to(result.dtype) for cotangent, result in zip(cotangents, results, strict=True)]
    return [*(result.detach() for result in results), *torch.autograd.grad(results, operands, given)]


def show(case: Case, timings: dict[str, Timing]) -> None:
    """Print milliseconds, GB/s, and how much faster each is than Inductor's kernel."""
    print(f"\n{case}  ({case.bytes / 1e6:.0f} MB)")
    base = timings["inductor"].median_ms if "inductor" in timings else math.nan
    for name, timing in sorted(timings.items(), key=lambda item: item[1].median_ms):
        rate, gain = case.bytes / timing.median_ms / 1e6, base / timing.median_ms
        print(
            f"  {name:24} {timing.median_ms:8.4f} ms  {rate:6.0f} GB/s  {gain:5.2f}x  ±{timing.spread:4.0%}", flush=True
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, run the cases, write the results."""
    options = _parser().parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.quick:
        raise SystemExit("benchmarks.residual_norm needs an NVIDIA GPU, and torch sees none; --quick runs without one")
    facts = environment(device)
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    results: list[dict[str, Any]] = []
    for case in cases(QUICK if options.quick else SHAPES, options.case):
        timings = measure(case, options.configs, options.rounds or (2 if options.quick else 20), device)
        show(case, timings)
        figures = {name: asdict(timing) for name, timing in timings.items()}
        results.append({**asdict(case), "bytes": case.bytes, "timings": figures})
        if options.output:
            options.output.write_text(json.dumps({"environment": facts, "results": results}, indent=1))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="", help="only cases whose name contains this, such as 'rms_norm 16384x768'")
    parser.add_argument("--configs", nargs="*", default=[], help="configurations to time beside fxopt's own")
    parser.add_argument("--rounds", type=int, default=0, help="samples per candidate (default 20, quick 2)")
    parser.add_argument("--quick", action="store_true", help="one small size and few samples, on a CPU too")
    parser.add_argument("--output", type=Path, help="where to write the results as JSON")
    return parser


if __name__ == "__main__":
    main()
