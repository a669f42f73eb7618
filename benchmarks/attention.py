"""Attention on one GPU: fxopt's generated kernels beside SDPA and FlexAttention, and the goals they are to reach.

    python -m benchmarks.attention [--quick] [--isolate] [--group forward decode] [--case TEXT] [--output results.json]
    python -m benchmarks.attention --group forward --configs 128x64w8s3 128x64w4s3 --loads pointer tma
    python -m benchmarks.attention --device cpu --tiny --rounds 1

bfloat16. Every candidate is checked against float64 on some heads, then timed in turn with the others;
a candidate that fails is a row with its reason, and the others go on. Where the fastest takes less than 0.1 ms, CUDA
graphs of all candidates are replayed. TFLOP/s count the scores that a mask keeps; "per computed FLOP" counts whole
blocks of 64×64 scores. On a CPU nothing but right or wrong means anything: fxopt's specifications and the peers' masks
(FlexAttention and every kernel of SDPA are their unfused forms there).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console

from benchmarks.attention_cases import Case
from benchmarks.attention_groups import GROUPS
from benchmarks.attention_measure import Settings, measure
from benchmarks.attention_process import DEVICE_LOST, Publish, is_lost, supervise
from benchmarks.attention_results import Result, show, table
from benchmarks.environment import environment
from benchmarks.progress import Progress
from fxopt.codegen.attention.portable.config import Loads

_WIDTH = 170  # of the table where output goes to a file


def select(groups: Sequence[str], text: str = "", *, quick: bool = False, tiny: bool = False) -> list[Case]:
    """The cases of ``groups`` whose name contains ``text``; with ``quick`` one size of each kind, and ``tiny`` ones."""
    cases = (case for name, make in GROUPS.items() if name in groups for case in make(tiny))
    return [case for case in cases if text in str(case) and (tiny or case.quick or not quick)]


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    """Run the benchmark named by ``arguments`` (the command line's by default)."""
    options = _parser().parse_args(arguments)
    cases = select(options.group, options.case, quick=options.quick, tiny=options.tiny)
    if options.list:
        print(*cases, sep="\n")
        return []
    settings, progress = _settings(options), Progress(options.time_limit)
    facts = environment(settings.device)
    publish = partial(_write, options.output, facts, options)
    if not options.worker:
        print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    if options.isolate and not options.worker:
        given = list(sys.argv[1:] if arguments is None else arguments)
        results = supervise(given, cases[options.start :], options.case_limit, progress, publish, start=options.start)
    else:
        results = _run(cases[options.start :], settings, progress, publish)
    if options.worker:
        return results
    console = Console() if sys.stdout.isatty() else Console(width=_WIDTH)
    console.print(table(results), highlight=False)
    progress.say(f"{len(results)} cases")
    return results


def _run(cases: list[Case], settings: Settings, progress: Progress, publish: Publish) -> list[Result]:
    results: list[Result] = []
    for case in cases:
        skipped = Result(str(case), case.group, case.unit, failures={"case": "skipped: the time limit is reached"})
        results.append(skipped if progress.expired else measure(case, settings))
        show(results[-1])
        publish(results)
        if is_lost(settings.device):
            progress.say("the device is lost to this process; nothing more can run in it (--isolate goes on)")
            sys.exit(DEVICE_LOST)
    return results


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--list", action="store_true", help="print the cases and stop")
    add("--group", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="GROUP", help=f"of {', '.join(GROUPS)}")
    add("--case", default="", help="only cases whose name contains this, such as 'causal D64'")
    add("--quick", action="store_true", help="one size of each kind, fewer rounds")
    add("--tiny", action="store_true", help="tiny sizes, to check every case")
    add("--device", default="cuda", choices=("cuda", "cpu"), help="the CPU has tiny cases only")
    add("--configs", nargs="*", default=[], help="configurations to time, or 'all' of fxopt's own")
    add("--loads", nargs="*", default=[], choices=get_args(Loads), help="portable kernels read keys and values so")
    add("--rounds", type=int, default=0, help="samples per candidate (default 30, quick 10)")
    add("--kernels", action="store_true", help="record the longest GPU kernels of every candidate")
    add("--time-limit", type=float, metavar="SECONDS", help="start no further case after this time")
    add("--isolate", action="store_true", help="in a process that is replaced when a case crashes it or hangs")
    add(
        "--case-limit",
        type=float,
        default=150.0,
        metavar="SECONDS",
        help="with --isolate: a case hangs after this time",
    )
    add("--start", type=int, default=0, metavar="N", help="leave the first N cases out")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    add("--output", type=Path, help="where to write the results as JSON, after every case")
    return parser


def _settings(options: argparse.Namespace) -> Settings:
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("benchmarks.attention needs an NVIDIA GPU (torch sees none), or --device cpu --tiny")
    if device.type == "cpu" and not options.tiny:
        raise SystemExit("--device cpu checks tiny cases only; add --tiny")
    return Settings(
        device=device,
        dtype=torch.float32 if device.type == "cpu" else torch.bfloat16,
        rounds=options.rounds or (10 if options.quick else 30),
        configs=options.configs,
        loads=options.loads,
        kernels=options.kernels and device.type == "cuda",
    )


def _write(path: Path | None, facts: dict[str, str], options: argparse.Namespace, results: list[Result]) -> None:
    """Replace the output by what is known so far; a reader never sees half a file."""
    if path is None:
        return
    asked: dict[str, Any] = {name: str(value) for name, value in vars(options).items() if value}
    document = {"environment": facts, "options": asked, "results": [result.to_json() for result in results]}
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(document, indent=1) + "\n")
    part.replace(path)


if __name__ == "__main__":
    main()
