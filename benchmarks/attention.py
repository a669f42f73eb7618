"""Attention forward on one GPU: the generated Triton kernel beside SDPA and FlexAttention.

    python -m benchmarks.attention [--quick] [--case TEXT] [--output results.json]
    python -m benchmarks.attention --configs 128x64w8s3 128x64w4s3 128x128w8s2r128 --loads pointer tma

bfloat16, 16k tokens, H = 2048/D. Every candidate is checked against float64 on a slice before it is timed, and timed in
turn with the others. With ``--configs`` (or ``--configs all`` for fxopt's own list) the kernel's configurations are
candidates too; ``--loads`` runs each of them with these kinds of loads instead of its own. A candidate that fails is a
row with its error; the others go on.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Final, get_args

import torch
from torch import Tensor

from benchmarks.attention_cases import HEAD_DIMS, KINDS, LENGTHS, Case, peers
from benchmarks.environment import environment
from benchmarks.timing import Timing, interleave
from fxopt.codegen.attention.operator import attention_forward
from fxopt.codegen.attention.portable.config import Loads
from fxopt.codegen.attention.portable.kernel import candidates, read_config

_ROWS: Final = 128
#: Largest error of a bfloat16 attention of standard normal values: a few roundings of values up to about 4.
_TOLERANCE: Final = 4e-2
Candidate = Callable[[], Tensor]


@dataclass
class Result:
    """One case: milliseconds and errors by candidate, and why the missing ones are missing."""

    case: str
    flops: float
    timings: dict[str, Timing] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def teraflops(self, name: str) -> float:
        """Rate of one candidate."""
        return self.flops / self.timings[name].median_ms * 1e-9

    def best(self, ours: bool) -> str | None:
        """The fastest candidate among fxopt's own, or among its peers."""
        names = [name for name in self.timings if name.startswith("fxopt") == ours]
        return min(names, key=lambda name: self.timings[name].median_ms, default=None)


def measure(case: Case, configs: Sequence[str], loads: Sequence[Loads], rounds: int) -> Result:
    """Build, check and time every candidate of one case."""
    torch.manual_seed(0)
    result = Result(str(case), case.flops)
    q, k, v = case.tensors()
    captures = case.captures()
    runs = {f"fxopt {c}": _own(case, q, k, v, captures, c) for c in _chosen(case, configs, loads)}
    try:
        runs |= peers(case, q, k, v, captures)
    except Exception as error:
        result.failures["peers"] = _sentence(error)
    sound = {name: run for name, run in runs.items() if _is_sound(name, run, case, (q, k, v, captures), result)}
    if sound:
        result.timings = interleave(sound, "cuda", rounds=rounds)
    return result


def _own(case: Case, q: Tensor, k: Tensor, v: Tensor, captures: list[Tensor], config: str) -> Candidate:
    spec = str(case.spec)
    return lambda: attention_forward(q, k, v, captures, spec, config, False)[0]


def _chosen(case: Case, configs: Sequence[str], loads: Sequence[Loads]) -> list[str]:
    capability = torch.cuda.get_device_capability()
    own = candidates(case.spec, case.head_dim, case.head_dim, torch.bfloat16, capability, case.length)
    chosen = own if list(configs) == ["all"] else [read_config(c) for c in configs] or own[:2]
    kinds = [[replace(c, loads=how) for how in loads or (c.loads,)] for c in chosen]
    return list(dict.fromkeys(str(c) for group in kinds for c in group))


def _is_sound(
    name: str, run: Candidate, case: Case, inputs: tuple[Tensor, Tensor, Tensor, list[Tensor]], result: Result
) -> bool:
    """Run once; the first and the last rows must agree with float64."""
    try:
        out = run()
        errors = [
            (out[0, -1, rows].double() - case.exact(*inputs, rows)).abs().max().item()
            for rows in (slice(0, _ROWS), slice(case.length - _ROWS, case.length))
        ]
    except Exception as error:
        result.failures[name] = _sentence(error)
        return False
    result.errors[name] = max(errors)
    # A NaN compares false.
    if max(errors) < _TOLERANCE and not any(e != e for e in errors):  # noqa: PLR0124
        return True
    result.failures[name] = f"wrong: error {max(errors):.3g}"
    return False


def _sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}"


def show(result: Result) -> None:
    """Print one case: TFLOP/s of every candidate, and the ratio of fxopt's best to the best peer."""
    ours, peer = result.best(ours=True), result.best(ours=False)
    ratio = f"{result.teraflops(ours) / result.teraflops(peer):.2f}x {peer}" if ours and peer else "no comparison"
    flex = (
        f", {result.teraflops(ours) / result.teraflops('flex'):.2f}x flex" if ours and "flex" in result.timings else ""
    )
    print(f"\n{result.case}: {ratio}{flex}")
    for name in sorted(result.timings, key=lambda n: result.timings[n].median_ms):
        timing = result.timings[name]
        print(
            f"  {name:22} {result.teraflops(name):7.1f} TFLOP/s  {timing.median_ms:8.4f} ms"
            f"  ±{timing.spread:4.0%}  error {result.errors[name]:.1e}"
        )
    for name, reason in result.failures.items():
        print(f"  {name:22} {reason}", flush=True)


def select(quick: bool, text: str) -> list[Case]:
    """The cases to run: all, those of N = 2048 when ``quick``, only those whose name contains ``text``."""
    lengths = (2048,) if quick else LENGTHS
    cases = [Case(kind, d, n) for d in HEAD_DIMS for n in lengths for kind in KINDS]
    return [case for case in cases if text in str(case)]


def main() -> None:
    """Parse the command line, run the cases, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only N = 2048, fewer rounds")
    parser.add_argument("--case", default="", help="only cases whose name contains this, such as 'causal D64'")
    parser.add_argument("--configs", nargs="*", default=[], help="configurations to time, or 'all' of fxopt's own")
    parser.add_argument("--loads", nargs="*", default=[], choices=get_args(Loads), help="read keys and values so")
    parser.add_argument("--rounds", type=int, default=0, help="samples per candidate (default 30, quick 10)")
    parser.add_argument("--output", type=Path, help="where to write the results as JSON")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.attention needs an NVIDIA GPU; torch sees none")
    facts = environment("cuda")
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    rounds = options.rounds or (10 if options.quick else 30)
    results: list[Result] = []
    for case in select(options.quick, options.case):
        try:
            results.append(measure(case, options.configs, options.loads, rounds))
        except Exception as error:
            results.append(Result(str(case), case.flops, failures={"case": _sentence(error)}))
        show(results[-1])
        gc.collect()
        torch.cuda.empty_cache()
        if options.output:
            options.output.write_text(
                json.dumps({"environment": facts, "results": [asdict(r) for r in results]}, indent=1)
            )


if __name__ == "__main__":
    main()
