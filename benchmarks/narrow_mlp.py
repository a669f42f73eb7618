"""A narrow feed-forward block: the generated kernel against what Inductor makes of the same function, and eager.

    python -m benchmarks.narrow_mlp [--case TEXT] [--configs 128x64w8s3] [--max-autotune] [--quick] [--output FILE]

bfloat16, GELU, four times as many hidden elements, inference. *alone* is linear, GELU and linear; *residual* adds a
residual to it; *norm* gives that sum and its LayerNorm, as the next half of a block reads them: there Inductor adds the
residual in the kernel of the norm, and the generated kernel by itself. Every candidate is checked against float64
before it is timed; on a GPU all are replayed as CUDA graphs, in turn. The widest shape is one that no kernel serves.
``--quick`` takes a small size and few samples, on the CPU too, where the operator computes in plain PyTorch.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.accuracy import largest_error
from benchmarks.environment import environment
from benchmarks.timing import Candidate, Timing, cuda_graph, interleave
from fxopt.codegen.mlp.narrow_mlp.config import candidates
from fxopt.codegen.mlp.narrow_mlp.operator import mlp_forward
from fxopt.codegen.mlp.narrow_mlp.problem import Problem, objection

#: A few roundings to bfloat16 of results of the size of one.
_TOLERANCE: Final = 3e-2
#: Swin-T's stages at 64 images of 224 pixels, and DeiT-Ti at 256.
SHAPES: Final = ((200704, 96), (50176, 192), (12544, 384), (50432, 192))
QUICK: Final = ((64, 32),)
PARTS: Final = ("alone", "residual", "norm")
Function = Callable[..., tuple[Tensor, ...]]
Block = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """One function of rows: a block alone, with a residual, or with a residual and the norm of the sum."""

    rows: int
    width: int
    part: str

    def __str__(self) -> str:
        return f"{self.rows}x{self.width} {self.part}"

    @property
    def operations(self) -> int:
        """Multiplications and additions of both products."""
        return 16 * self.rows * self.width**2

    @property
    def bytes(self) -> int:
        """What is read and written at least: rows of operands and results, and the weights."""
        rows = {"alone": 2, "residual": 3, "norm": 4}[self.part]
        return 2 * (rows * self.rows * self.width + 8 * self.width**2)

    @property
    def problem(self) -> Problem:
        """That of the kernel."""
        residual = self.part != "alone"
        return Problem(self.width, 4 * self.width, self.width, "gelu", torch.bfloat16, True, True, residual)

    def operands(self, device: str) -> list[Tensor]:
        """x, the weights and biases of both layers, the residual."""
        c, h = self.width, 4 * self.width
        sizes = ((self.rows, c), (h, c), (h,), (c, h), (c,), (self.rows, c))
        scales = (1.0, c**-0.5, 1.0, h**-0.5, 1.0, 1.0)
        draws = [torch.randn(size, device=device) * scale for size, scale in zip(sizes, scales, strict=True)]
        return [draw.to(torch.bfloat16) for draw in draws]

    def function(self, block: Block) -> Function:
        """The case around ``block``, which takes x, weights and biases, and the residual or ``None``."""

        def run(*operands: Tensor) -> tuple[Tensor, ...]:
            *given, residual = operands
            out = block(*given, None if self.part == "alone" else residual)
            return (out, F.layer_norm(out, (self.width,))) if self.part == "norm" else (out,)

        return run


def plain(x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor, residual: Tensor | None) -> Tensor:
    """The block in plain PyTorch."""
    out = F.linear(F.gelu(F.linear(x, up, up_bias)), down, down_bias)
    return out if residual is None else residual + out


def generated(config: str, *operands: Tensor | None) -> Tensor:
    """The block by the kernel of one configuration."""
    found: Tensor = mlp_forward(*operands, "gelu", config)
    return found


def cases(shapes: Sequence[tuple[int, int]], text: str = "") -> list[Case]:
    """Every case of ``shapes`` whose name contains ``text``."""
    found = [Case(rows, width, part) for rows, width in shapes for part in PARTS]
    return [case for case in found if text in str(case)]


def architecture(device: str) -> int:
    """That of the GPU at hand, ``90`` for sm_90."""
    major, minor = torch.cuda.get_device_capability() if device == "cuda" else (9, 0)
    return 10 * major + minor


def measure(
    case: Case, configs: Sequence[str], rounds: int, device: str, max_autotune: bool = False
) -> dict[str, Timing]:
    """Milliseconds of every candidate that is right; those that are not are said."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    operands = case.operands(device)
    whole = case.function(plain)
    functions: dict[str, Function] = {"eager": whole, "inductor": torch.compile(whole, dynamic=False)}
    if max_autotune:
        mode = "max-autotune-no-cudagraphs"
        functions["inductor max-autotune"] = torch.compile(case.function(plain), dynamic=False, mode=mode)
    reason = objection(case.problem)
    if reason is not None:
        print(f"  no kernel: {reason}")
    listed = () if reason is not None else dict.fromkeys((*configs, *candidates(case.problem, architecture(device))))
    for config in listed:
        block = case.function(partial(generated, config))
        functions[f"fxopt {config}"] = torch.compile(block, dynamic=False) if case.part == "norm" else block
    with torch.no_grad():
        runs = _right(functions, operands, whole(*(operand.double() for operand in operands)))
        runs = {name: cuda_graph(run) for name, run in runs.items()} if device == "cuda" else runs
        return interleave(runs, device, rounds=rounds)


def _right(functions: dict[str, Function], operands: Sequence[Tensor], exact: Sequence[Tensor]) -> dict[str, Candidate]:
    runs: dict[str, Candidate] = {}
    for name, function in functions.items():
        error = largest_error(function(*operands), exact)
        if error < _TOLERANCE:
            runs[name] = partial(function, *operands)
        else:
            print(f"  {name} is wrong: error {error:.3g}")
    return runs


def show(case: Case, timings: dict[str, Timing]) -> None:
    """Print milliseconds, TFLOP/s, GB/s, and how much faster each is than Inductor's."""
    print(f"\n{case}  ({case.operations / 1e9:.0f} GFLOP, {case.bytes / 1e6:.0f} MB)")
    base = timings["inductor"].median_ms if "inductor" in timings else math.nan
    for name, timing in sorted(timings.items(), key=lambda item: item[1].median_ms):
        ms = timing.median_ms
        speed = f"{case.operations / ms / 1e9:5.0f} TFLOP/s  {case.bytes / ms / 1e6:5.0f} GB/s"
        print(f"  {name:24} {ms:8.4f} ms  {speed}  {base / ms:5.2f}x  ±{timing.spread:4.0%}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, run the cases, write the results."""
    options = _parser().parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.quick:
        raise SystemExit("benchmarks.narrow_mlp needs an NVIDIA GPU, and torch sees none; --quick runs without one")
    facts = environment(device)
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    results: list[dict[str, Any]] = []
    rounds = options.rounds or (2 if options.quick else 20)
    for case in cases(QUICK if options.quick else SHAPES, options.case):
        timings = measure(case, options.configs, rounds, device, options.max_autotune)
        show(case, timings)
        figures = {name: asdict(timing) for name, timing in timings.items()}
        results.append({**asdict(case), "operations": case.operations, "bytes": case.bytes, "timings": figures})
        if options.output:
            options.output.write_text(json.dumps({"environment": facts, "results": results}, indent=1))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="", help="only cases whose name contains this, such as '50176x192 residual'")
    parser.add_argument("--configs", nargs="*", default=[], help="configurations to time beside fxopt's own")
    parser.add_argument("--max-autotune", action="store_true", help="Inductor's max-autotune as another peer")
    parser.add_argument("--rounds", type=int, default=0, help="samples per candidate (default 20, quick 2)")
    parser.add_argument("--quick", action="store_true", help="one small size and few samples, on a CPU too")
    parser.add_argument("--output", type=Path, help="where to write the results as JSON")
    return parser


if __name__ == "__main__":
    main()
