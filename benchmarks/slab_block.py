"""The block of SLAB-Swin, linear attention behind a folded norm, through fxopt and through Inductor, in the same run.

    python -m benchmarks.slab_block [--stage TEXT] [--batch 64] [--quick] [--output results.json]

A block of Swin-T is prepared with `SimplifiedLinearAttention` and `RepBatchNorm` and converted; beside it run SLAB's
own block, written from the formulas as plain PyTorch with the same weights (with queries, keys and values in the dtype
of the model, and in float32 as published), and the softmax block that it came from. Results are compared with float64
first. ``fxopt, fuse-mlp`` runs with the pass of that name besides the default ones. bfloat16, 64 images; the half with
the attention alone, and the whole block; CUDA graphs of all are replayed, as the host would be what is timed.
``--quick`` runs on a CPU.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

import fxopt
from benchmarks.environment import environment
from benchmarks.kernels import kernel_times
from benchmarks.slab_modules import STAGES, Block, Stage, randomise, slab
from benchmarks.timing import Timing, cuda_graph, interleave

#: Against which the speed of the others is told.
BASE: Final = "SLAB, Inductor"
_OWN: Final = "fxopt"
#: The same with the pass that is not among the default ones.
_FUSED: Final = "fxopt, fuse-mlp"
#: A few roundings to bfloat16, of results of the size of one.
_TOLERANCE: Final = 3e-2
_TINY: Final = Stage("tiny", 32, 2, 8, window=4)
Run = Callable[[Tensor], Tensor]


def measure(
    stage: Stage, batch: int, *, fed: bool, rounds: int, device: str
) -> tuple[dict[str, Timing], dict[str, list[tuple[str, float]]]]:
    """Milliseconds of every variant, and on a GPU the kernels of fxopt's and of what it is compared with."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    block = Block(stage, fed=fed).to(device)
    x_BNC = torch.randn(batch, stage.tokens, stage.channels, device=device, dtype=dtype)
    exact, models = _models(block, stage, x_BNC, fed=fed)
    with torch.no_grad():
        count = max(batch // 16, 1)
        expected = exact(x_BNC[:count].double())
        for name, model in models.items():
            found = model(x_BNC)[:count]
            if not name.startswith("softmax"):
                _check(name, found, expected)
        calls = {name: _timed(model, x_BNC) for name, model in models.items()}
        if device == "cpu":
            return interleave(calls, device, rounds=rounds), {}
        timings = interleave({name: cuda_graph(call) for name, call in calls.items()}, device, rounds=rounds)
        return timings, {name: kernel_times(calls[name]) for name in (_OWN, _FUSED, BASE)}


def _models(block: Block, stage: Stage, x_BNC: Tensor, *, fed: bool) -> tuple[Run, dict[str, Run]]:
    """SLAB's block in float64, and the variants."""
    passes: list[fxopt.Pass] = [fxopt.passes.SimplifiedLinearAttention(), fxopt.passes.RepBatchNorm(steps=0)]
    student = fxopt.prepare(block.to(x_BNC.dtype), (x_BNC,), passes=passes)
    randomise(student)
    plain = {wide: copy.deepcopy(slab(student, stage, fed=fed, wide=wide)) for wide in (False, True)}
    converted = fxopt.convert(student, verify=False)
    models: dict[str, nn.Module] = {"SLAB": plain[False], "SLAB as published": plain[True], "softmax": block.eval()}
    compiled: dict[str, Run] = {
        f"{name}, Inductor": torch.compile(model, dynamic=False) for name, model in models.items()
    }
    named: dict[str, Any] = {"passes": [*fxopt.passes.exact_pipeline(), "fuse-mlp"]}
    own: dict[str, Run] = {
        _OWN: torch.compile(converted, backend="fxopt", dynamic=False),
        _FUSED: torch.compile(converted, backend="fxopt", dynamic=False, options=named),
    }
    return copy.deepcopy(plain[False]).double(), {**compiled, **own, "SLAB, eager": plain[False]}


def _timed(model: Run, x_BNC: Tensor) -> Callable[[], object]:
    return lambda: model(x_BNC)


def _check(name: str, found: Tensor, expected: Tensor) -> None:
    """Say how far a variant is from float64; fxopt must be near."""
    error = float((found.double() - expected).abs().max() / expected.abs().max())
    print(f"  {name}: error {error:.2g} against float64")
    if name in (_OWN, _FUSED) and not error < _TOLERANCE:
        raise SystemExit(f"{name} is wrong: error {error:.3g}")


def show(title: str, timings: dict[str, Timing]) -> None:
    """Print milliseconds, and how much faster each is than SLAB's block under Inductor."""
    print(f"\n{title}")
    base = timings[BASE].median_ms
    for name, timing in sorted(timings.items(), key=lambda item: item[1].median_ms):
        gain = base / timing.median_ms
        print(f"  {name:28} {timing.median_ms:8.3f} ms  {gain:5.2f}x  ±{timing.spread:4.0%}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, run the stages, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", default="", help="only stages whose name contains this, such as '1'")
    parser.add_argument("--batch", type=int, default=64, help="images")
    parser.add_argument("--rounds", type=int, default=20, help="samples per variant")
    parser.add_argument("--quick", action="store_true", help="a tiny stage, once, on the CPU")
    parser.add_argument("--output", type=Path, help="where to write the results as JSON")
    options = parser.parse_args(arguments)
    device = "cpu" if options.quick else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("benchmarks.slab_block needs an NVIDIA GPU; torch sees none. --quick runs on the CPU")
    facts = environment(device)
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    stages = [_TINY] if options.quick else [stage for stage in STAGES if options.stage in stage.name]
    batch, rounds = (2, 1) if options.quick else (options.batch, options.rounds)
    results = []
    for stage in stages:
        for fed in (False, True):
            title = f"{stage.name}, {batch} images, {'whole block' if fed else 'attention half'}"
            timings, kernels = measure(stage, batch, fed=fed, rounds=rounds, device=device)
            show(title, timings)
            plain = {name: asdict(timing) for name, timing in timings.items()}
            results.append({"title": title, "timings": plain, "kernels": kernels})
            if options.output:
                options.output.write_text(json.dumps({"environment": facts, "results": results}, indent=1))


if __name__ == "__main__":
    main()
