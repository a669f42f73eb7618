"""The command line of benchmarks that time the candidates of several cases in turn, case after case."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import environment
from benchmarks.timing import Timing


def parser(description: str | None, example: str, rounds: int = 20) -> argparse.ArgumentParser:
    """The options of all of them; ``example`` is a part of a case's name."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--case", default="", help=f"only cases whose name contains this, such as {example!r}")
    found.add_argument("--rounds", type=int, default=rounds, help="samples per candidate")
    found.add_argument("--output", type=Path, help="where to write the results as JSON")
    return found


def sweep(
    options: argparse.Namespace,
    cases: Sequence[Any],
    measure: Callable[[Any], dict[str, Timing]],
    show: Callable[[Any, dict[str, Timing]], None],
) -> None:
    """Measure and show the cases (dataclasses with a ``name``) that are asked for, and write what is known after each.

    Raises:
        SystemExit: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs an NVIDIA GPU; torch sees none")
    facts = environment("cuda")
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    results = []
    for case in (case for case in cases if options.case in case.name):
        timings = measure(case)
        show(case, timings)
        results.append({**asdict(case), "timings": {name: asdict(timing) for name, timing in timings.items()}})
        torch.cuda.empty_cache()
        if options.output:
            written = json.dumps({"environment": facts, "results": results}, indent=1, default=str)
            options.output.write_text(written)


def show_modes(case: Any, timings: dict[str, Timing], width: int) -> None:
    """Print milliseconds forward and in training, and how much faster each is than the best that PyTorch has."""
    print(f"\n{case.name}")
    for mode in ("forward", "training"):
        chosen = {name: timing for name, timing in timings.items() if name.startswith(mode)}
        best = min(timing.median_ms for name, timing in chosen.items() if "fxopt" not in name)
        for name, timing in sorted(chosen.items(), key=lambda item: item[1].median_ms):
            gain = best / timing.median_ms
            print(f"  {name:{width}} {timing.median_ms:8.3f} ms  {gain:5.2f}x  ±{timing.spread:4.0%}", flush=True)
