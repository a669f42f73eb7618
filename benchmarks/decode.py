"""Attention of few queries over long caches of keys and values on one GPU: how near to a copy's rate they are read.

    python -m benchmarks.decode [--case TEXT] [--configs split:64w4s3x2 split:64w4s4x2] [--output results.json]

bfloat16, D = 128, caches ``[B, T, G, D]``. Every candidate is checked against float64 before it is timed, in turn with
SDPA and a copy of as many bytes, as CUDA graphs. Caches that might stay in the device's own cache are rotated.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from benchmarks.environment import environment
from benchmarks.timing import Timing, cuda_graph, interleave
from fxopt.codegen.attention import kernels, reference
from fxopt.codegen.attention.operator import attention_forward
from fxopt.codegen.attention.problem import Problem
from fxopt.ir.attention import AttentionSpec, Capture
from fxopt.ir.expression import parse

_DIM: Final = 128
_SCALE: Final = _DIM**-0.5
#: Together the operands of one graph exceed the second level of the cache several times.
_ROTATED_BYTES: Final = 400e6
#: A few roundings to bfloat16 of values below one.
_TOLERANCE: Final = 1e-2
Candidate = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """Sizes of one case; ``lengths`` gives each batch a length of its own, up to ``keys``."""

    name: str
    batch: int
    heads: int
    kv_heads: int
    keys: int
    rows: int = 1
    lengths: bool = False

    @property
    def spec(self) -> AttentionSpec:
        """The attention of this case."""
        score = parse(f"s * {_SCALE!r}")
        if not self.lengths:
            return AttentionSpec(score, out_dtype=torch.bfloat16)
        return AttentionSpec(score, parse("j < c0"), (Capture("b---", torch.int64),), out_dtype=torch.bfloat16)

    @property
    def captures(self) -> list[Tensor]:
        """From a tenth to all of the keys."""
        if not self.lengths:
            return []
        lengths = torch.linspace(self.keys / 10, self.keys, self.batch, dtype=torch.float64, device="cuda")
        return [lengths.long().view(-1, 1, 1, 1)]

    @property
    def bytes(self) -> float:
        """Bytes of keys and values that have to be read."""
        kept = float(self.captures[0].sum()) if self.lengths else self.batch * self.keys
        return kept * self.kv_heads * _DIM * 2 * 2

    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        """``q``, and ``k`` and ``v`` as a cache lays them out."""
        q = torch.randn(self.batch, self.heads, self.rows, _DIM, device="cuda", dtype=torch.bfloat16)
        sizes = (self.batch, self.keys, self.kv_heads, _DIM)
        k, v = (torch.randn(sizes, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(2))
        return q, k, v


CASES: Final = (
    Case("grouped B16 T8192", 16, 32, 8, 8192),
    Case("grouped B1 T131072", 1, 32, 8, 131_072),
    Case("grouped B16 T8191 S4", 16, 32, 8, 8191, 4),
    Case("one kv head B16 T8192", 16, 32, 1, 8192),
    Case("one kv head B1 T131072", 1, 32, 1, 131_072),
    Case("all kv heads B4 T8192", 4, 32, 32, 8192),
    Case("all kv heads B1 T32768", 1, 32, 32, 32_768),
    Case("lengths B16 T16384", 16, 32, 8, 16_384, lengths=True),
    Case("short B1 T4096", 1, 32, 8, 4096),
)


def measure(case: Case, configs: Sequence[str], rounds: int) -> dict[str, Timing]:
    """Milliseconds of one call of every candidate that is right; those that are not are said."""
    torch.manual_seed(0)
    sets = [case.operands() for _ in range(max(1, round(_ROTATED_BYTES / case.bytes)))]
    spec, captures = case.spec, case.captures
    exact = _exact(case, *sets[0], captures)
    graphs: dict[str, Callable[[], object]] = {"copy": cuda_graph(_copies(sets, case))}
    for name, run in _candidates(case, spec, captures, configs).items():
        error = (run(*sets[0]).double() - exact).abs().max().item()
        if not error < _TOLERANCE:
            print(f"  {name:24} wrong: error {error:.3g}")
            continue
        graphs[name] = cuda_graph(lambda run=run: [run(*operands) for operands in sets])  # type: ignore[misc]
    timings = interleave(graphs, "cuda", rounds=rounds)
    return {name: _per_call(timing, len(sets)) for name, timing in timings.items()}


def _candidates(
    case: Case, spec: AttentionSpec, captures: list[Tensor], configs: Sequence[str]
) -> dict[str, Candidate]:
    sizes = (case.batch, case.heads, case.kv_heads, case.rows, case.keys)
    capability = torch.cuda.get_device_capability()
    own, _ = kernels.candidates(Problem(spec, _DIM, _DIM, torch.bfloat16, capability, *sizes))
    found: dict[str, Candidate] = {
        f"fxopt {config}": lambda q, k, v, config=config: attention_forward(  # type: ignore[misc]
            q, k, v, captures, str(spec), config, False
        )[0]
        for config in dict.fromkeys((*configs, *own))
    }
    if not case.lengths:
        found["sdpa"] = lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    return found


def _copies(sets: list[tuple[Tensor, Tensor, Tensor]], case: Case) -> Callable[[], object]:
    """Copies that read and write together as many bytes as the attention reads."""
    halves = [k.flatten()[: int(case.bytes / 4)] for _, k, _ in sets]
    target = torch.empty_like(halves[0])
    return lambda: [target.copy_(half) for half in halves]


def _exact(case: Case, q: Tensor, k: Tensor, v: Tensor, captures: list[Tensor]) -> Tensor:
    """In float64, head by head to save memory."""
    served = case.heads // case.kv_heads
    spec = str(replace(case.spec, out_dtype=torch.float64))
    groups = zip(q.split(served, 1), k.split(1, 1), v.split(1, 1), strict=True)
    heads = [reference.attention(q.double(), k.double(), v.double(), captures, spec) for q, k, v in groups]
    return torch.cat(heads, 1)


def _per_call(timing: Timing, calls: int) -> Timing:
    median, p10, p90 = (ms / calls for ms in (timing.median_ms, timing.p10_ms, timing.p90_ms))
    return Timing(median, p10, p90, timing.samples, timing.calls_per_sample * calls)


def show(case: Case, timings: dict[str, Timing]) -> None:
    """Print GB/s of keys and values read, and the part of the copy's rate."""
    copy = timings["copy"].median_ms
    print(f"\n{case.name}: {case.bytes / 1e6:.0f} MB")
    for name, timing in sorted(timings.items(), key=lambda item: item[1].median_ms):
        rate = case.bytes / timing.median_ms / 1e6
        print(f"  {name:24} {rate:7.0f} GB/s  {copy / timing.median_ms:5.2f} of copy  {timing.median_ms * 1e3:8.1f} us"
              f"  ±{timing.spread:4.0%}", flush=True)  # fmt: skip


def main() -> None:
    """Parse the command line, run the cases, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="", help="only cases whose name contains this, such as 'grouped'")
    parser.add_argument("--configs", nargs="*", default=[], help="configurations to time beside fxopt's own choice")
    parser.add_argument("--rounds", type=int, default=20, help="samples per candidate")
    parser.add_argument("--output", type=Path, help="where to write the results as JSON")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.decode needs an NVIDIA GPU; torch sees none")
    facts = environment("cuda")
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    results = []
    for case in (case for case in CASES if options.case in case.name):
        timings = measure(case, options.configs, options.rounds)
        show(case, timings)
        results.append({**asdict(case), "bytes": case.bytes, "timings": {n: asdict(t) for n, t in timings.items()}})
        torch.cuda.empty_cache()
        if options.output:
            options.output.write_text(json.dumps({"environment": facts, "results": results}, indent=1))


if __name__ == "__main__":
    main()
