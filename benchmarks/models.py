"""Whole models, forward: eager, Inductor and fxopt in one run, checked against float64 and timed interleaved.

Usage::

    python -m benchmarks.models --list
    python -m benchmarks.models --output models.json --max-autotune vit swin --time-limit 500 --isolate
    python -m benchmarks.models --quick --models bert-sdpa --peers eager fxopt --fxopt-option base=eager

The exit status is 1 where a peer failed or gave a wrong result, 0 otherwise; what the time limit cut off is
"skipped" and not a failure.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from benchmarks.environment import environment
from benchmarks.model_cases import CASES, Case
from benchmarks.model_measure import Settings, measure
from benchmarks.model_peers import ASKED_PEERS, PEERS, Peer
from benchmarks.model_results import CaseResult, PeerResult, table
from benchmarks.progress import Progress

_GRACE_SECONDS = 20.0  # what an isolated model may take beyond the limit to time and write what it has compiled
_REASON_LINES = 8  # of a failure are printed; the JSON has more


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark named by ``arguments`` (the command line's by default) and return the exit status."""
    options = _parser().parse_args(arguments)
    if options.list:
        _print_choices()
        return 0
    progress = Progress(options.time_limit)
    settings = _settings(options)
    facts = environment(settings.device)
    if not options.no_table:
        progress.say(", ".join(f"{name} {value}" for name, value in facts.items()))
    results: list[CaseResult] = []
    for name in (name for name in CASES if name in options.models):
        results.append(_run(CASES[name], options, settings, progress))
        _write(options.output, facts, options, results)
    if not options.no_table:
        _print_results(results)
    return int(any(result.failed for result in results))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=__doc__.splitlines()[0])
    add = parser.add_argument
    standard = [name for name in PEERS if name not in ASKED_PEERS]
    add("--list", action="store_true", help="print models and peers and stop")
    add("--models", nargs="+", choices=CASES, default=list(CASES), metavar="MODEL", help="default: all")
    add(
        "--peers",
        nargs="+",
        choices=PEERS,
        default=standard,
        metavar="PEER",
        help="default: all but max-autotune's and those with passes to be named",
    )
    add("--max-autotune", nargs="*", choices=CASES, metavar="MODEL", help="also this peer, which compiles for minutes")
    add("--fxopt-option", action="append", default=[], type=_pair, metavar="NAME=VALUE", help="passed to the backend")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda where there is one")
    add("--dtype", choices=("bfloat16", "float16", "float32"), help="default: bfloat16; float32 with --quick on a CPU")
    add("--quick", action="store_true", help="tiny models, for a smoke test")
    add("--rounds", type=int, default=30, help="samples of each peer")
    add("--kernels", action="store_true", help="record the longest GPU kernels of each peer")
    add("--keep-caches", action="store_true", help="compile with the caches as found instead of empty ones")
    add("--isolate", action="store_true", help="a process for each model: a crash loses only that model")
    add("--time-limit", type=float, metavar="SECONDS", help="start no further model or peer after this time")
    add("--no-table", action="store_true", help="print the progress only")
    add("--output", type=Path, metavar="FILE", help="write the results as JSON, after every model")
    return parser


def _pair(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def _settings(options: argparse.Namespace) -> Settings:
    device = torch.device(options.device)
    default = "float32" if options.quick and device.type == "cpu" else "bfloat16"
    return Settings(
        device=device,
        dtype=getattr(torch, options.dtype or default),
        quick=options.quick,
        rounds=options.rounds,
        kernels=options.kernels and device.type == "cuda",
        keep_caches=options.keep_caches,
        fxopt_options=dict(options.fxopt_option),
    )


def _peers(case: Case, options: argparse.Namespace) -> list[Peer]:
    """The peers asked for that this model has; max-autotune last, since it takes minutes."""
    autotuned = options.max_autotune is not None and (not options.max_autotune or case.name in options.max_autotune)
    wanted = [peer for name, peer in PEERS.items() if name in options.peers or (name == "max-autotune" and autotuned)]
    return [peer for peer in wanted if not peer.attention or peer.attention in case.variants]


def _run(case: Case, options: argparse.Namespace, settings: Settings, progress: Progress) -> CaseResult:
    peers = _peers(case, options)
    if progress.expired:
        progress.say(f"{case.name}: skipped, the time limit is reached")
        skipped = {peer.name: PeerResult("skipped", "time limit") for peer in peers}
        return CaseResult(case.name, case.title, peers=skipped)
    if options.isolate:
        return _run_isolated(case, peers, options, progress)
    return measure(case, peers, settings, progress)


def _run_isolated(case: Case, peers: list[Peer], options: argparse.Namespace, progress: Progress) -> CaseResult:
    """The same measurement in a process of its own; whatever ends that process is recorded for all its peers."""
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "result.json"
        command = [sys.executable, "-m", "benchmarks.models", *_child_arguments(case, peers, options, output)]
        command += [] if progress.remaining is None else ["--time-limit", f"{progress.remaining:.1f}"]
        limit = None if progress.remaining is None else progress.remaining + _GRACE_SECONDS
        try:
            status = subprocess.run(command, timeout=limit, check=False).returncode
            if output.exists():
                return CaseResult.from_json(json.loads(output.read_text())["results"][0])
            error: Exception = RuntimeError(f"the process ended with status {status} before it wrote a result")
        except subprocess.TimeoutExpired as expired:
            error = expired
    progress.say(f"{case.name}: {error}")
    result = CaseResult(case.name, case.title, peers={peer.name: PeerResult() for peer in peers})
    for peer in result.peers.values():
        peer.fail(error)
    return result


def _child_arguments(case: Case, peers: list[Peer], options: argparse.Namespace, output: Path) -> list[str]:
    flags = [f"--{name.replace('_', '-')}" for name in ("quick", "kernels", "keep_caches") if getattr(options, name)]
    flags += ["--no-table", "--models", case.name, "--peers", *(peer.name for peer in peers), "--output", str(output)]
    flags += ["--device", options.device, "--rounds", str(options.rounds)]
    flags += ["--dtype", options.dtype] if options.dtype else []
    return flags + [f"--fxopt-option={name}={value}" for name, value in options.fxopt_option]


def _write(path: Path | None, facts: dict[str, str], options: argparse.Namespace, results: list[CaseResult]) -> None:
    """Replace the output by what is known so far; a reader never sees half a file."""
    if path is None:
        return
    asked: dict[str, Any] = {name: str(value) for name, value in vars(options).items() if value}
    document = {"environment": facts, "options": asked, "results": [result.to_json() for result in results]}
    part = path.with_name(f"{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    part.write_text(json.dumps(document, indent=1) + "\n")
    part.replace(path)


def _print_choices() -> None:
    for case in CASES.values():
        print(f"{case.name:12} {case.title}, batch {case.batch}, length {case.length} ({case.source(quick=False)})")
    print("peers:", ", ".join(PEERS))


def _print_results(results: list[CaseResult]) -> None:
    """The ends of the failures, then the table and the speed-ups: where output is cut, its end is what remains."""
    console = Console() if sys.stdout.isatty() else Console(width=150)
    for result in results:
        for name, peer in result.peers.items():
            if peer.status == "failed":
                lines = peer.reason.strip().splitlines()[-_REASON_LINES:]
                console.print(escape("\n  ".join([f"{result.model}, {name} failed:", *lines])), highlight=False)
    console.print(table(results))
    for result in results:
        for name, speedup in result.speedups.items():
            console.print(f"{result.model}: {name} {speedup:.3f}x as fast as {result.best_peer}, the best peer")


if __name__ == "__main__":
    sys.exit(main())
