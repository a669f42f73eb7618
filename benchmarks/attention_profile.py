"""What limits attention kernels: counters of fxopt's and its peers' kernels, read by Nsight Compute.

    python -m benchmarks.attention_profile --case "window D64 N2048" "backward plain D128 N2048" [--output profile.json]
    python -m benchmarks.attention_profile --case "plain D64 N197" --names sdpa-cudnn fxopt --configs 64x64w4s3r128

Needs ``ncu`` on the PATH and leave to read hardware counters. One launch of every kernel, at the clock that the device
has then, with cold caches: its time is longer than the benchmark's. Columns: microseconds; how busy the tensor cores,
the unit of exp2 (XU), the integer and comparison unit (ALU), the units of products and sums (FMA), instruction issue,
shared memory, the L2 cache and memory were, in % of their peaks; registers of a thread; warps there, in % of the most;
what warps waited for longest. Warps that only load wait most of the time, by design.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Final

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.attention import select
from benchmarks.attention_cases import Case
from benchmarks.attention_groups import GROUPS
from benchmarks.attention_measure import Settings, forget, prepared, retained_buffers
from benchmarks.attention_results import Result
from benchmarks.environment import environment

_TIME: Final = "gpu__time_duration.sum"
_ACTIVE: Final = "avg.pct_of_peak_sustained_active"
_ELAPSED: Final = "pct_of_peak_sustained_elapsed"
#: By the name of a column.
COUNTERS: Final = {
    "tensor": f"sm__pipe_tensor_cycles_active.{_ACTIVE}",
    "XU": f"sm__inst_executed_pipe_xu.{_ACTIVE}",
    "ALU": f"sm__pipe_alu_cycles_active.{_ACTIVE}",
    "FMA": f"sm__pipe_fma_cycles_active.{_ACTIVE}",
    "issue": f"smsp__issue_active.{_ACTIVE}",
    "shared": f"l1tex__data_pipe_lsu_wavefronts_mem_shared.sum.{_ELAPSED}",
    "L2": f"lts__t_sectors.avg.{_ELAPSED}",
    "memory": f"gpu__dram_throughput.avg.{_ELAPSED}",
    "registers": "launch__registers_per_thread",
    "warps": f"sm__warps_active.{_ACTIVE}",
}
#: What a warp can wait for; there are more reasons, which these kernels don't have.
_REASONS: Final = (
    *("barrier", "branch_resolving", "dispatch_stall", "gmma", "lg_throttle", "long_scoreboard", "math_pipe_throttle"),
    *("membar", "mio_throttle", "no_instruction", "not_selected", "selected", "short_scoreboard", "sleeping", "wait"),
)
_STALL: Final = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
#: Microseconds in the units that Nsight Compute prints.
_MICROSECONDS: Final = {"ns": 1e-3, "us": 1.0, "ms": 1e3, "s": 1e6}
#: A kernel of PyTorch's own that stands between those of two candidates.
_MARKER: Final = "spin_kernel"
_SHOWN_REASONS: Final = 3


@dataclass(frozen=True)
class Kernel:
    """One launch: whose it is, its name, its time in microseconds, `COUNTERS`, and shares of what warps waited for."""

    candidate: str
    name: str
    microseconds: float
    counters: dict[str, float]
    waits: dict[str, float]


def main(arguments: Sequence[str] | None = None) -> list[Kernel]:
    """Profile what ``arguments`` name (the command line's by default)."""
    options = _parser().parse_args(arguments)
    if options.launches is not None:
        _launch(options)
        return []
    ncu = shutil.which("ncu")
    if ncu is None or not torch.cuda.is_available():
        raise SystemExit("benchmarks.attention_profile needs an NVIDIA GPU, and Nsight Compute's ncu on the PATH")
    with tempfile.TemporaryDirectory() as folder:
        found = _profiled(ncu, Path(folder), list(sys.argv[1:] if arguments is None else arguments))
    facts = environment(torch.device("cuda"))
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    Console(width=200).print(table(found), highlight=False)
    if options.output:
        document = {"environment": facts, "kernels": [asdict(kernel) for kernel in found]}
        options.output.write_text(json.dumps(document, indent=1) + "\n")
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--case", nargs="+", required=True, help="names of cases, as benchmarks.attention --list prints them, or parts")
    add("--names", nargs="+", default=["fxopt", "sdpa", "flex"], help="how the candidates to profile begin")
    add("--configs", nargs="*", default=[], help="configurations of fxopt's own, instead of its first one")
    add("--output", type=Path, help="where to write the counters as JSON")
    add("--launches", type=Path, help=argparse.SUPPRESS)
    return parser


def _profiled(ncu: str, folder: Path, given: list[str]) -> list[Kernel]:
    """The counters of what a process of this module launches between markers, which lists whose launches they are."""
    report, launches = folder / "report.ncu-rep", folder / "launches.json"
    counters = [_TIME, *COUNTERS.values(), *map(_STALL.format, _REASONS)]
    recording = ("--profile-from-start", "off", "--clock-control", "none", "--metrics", ",".join(counters))
    inside = (sys.executable, "-m", "benchmarks.attention_profile", *given, "--launches", str(launches))
    ran = subprocess.run([ncu, *recording, "--export", str(report), *inside], check=False)
    if ran.returncode or not report.exists():
        raise SystemExit("Nsight Compute made no report; what it and the candidates said stands above")
    page = (ncu, "--import", str(report), "--page", "raw", "--csv")
    printed = subprocess.run(page, check=True, capture_output=True, text=True).stdout
    return list(kernels(printed, json.loads(launches.read_text())))


def kernels(printed: str, candidates: Sequence[str]) -> Iterator[Kernel]:
    """What Nsight Compute printed of the launches of ``candidates``, a marker before those of each.

    Raises:
        ValueError: it isn't such a page, or has another number of markers.
    """
    lines = [line for line in printed.splitlines() if line.startswith('"')]
    header, units, *rows = csv.reader(lines) if len(lines) > 1 else ([], [])
    if _TIME not in header:
        raise ValueError(f"no page of raw counters: {printed.strip()[:300]!r}")
    unit = _MICROSECONDS[dict(zip(header, units, strict=True))[_TIME]]
    launches = [dict(zip(header, row, strict=True)) for row in rows]
    markers = [_MARKER in launch["Kernel Name"] for launch in launches]
    if sum(markers) != len(candidates):
        raise ValueError(f"{sum(markers)} markers before the kernels of {len(candidates)} candidates")
    seen = accumulate(markers)
    for launch, is_marker, number in zip(launches, markers, seen, strict=True):
        if not is_marker:
            yield _kernel(launch, candidates[number - 1], unit)


def _kernel(row: dict[str, str], candidate: str, unit: float) -> Kernel:
    ratios = {reason: _number(row[_STALL.format(reason)]) for reason in _REASONS}
    total = sum(ratios.values()) or 1.0
    return Kernel(
        candidate,
        row["Kernel Name"],
        _number(row[_TIME]) * unit,
        {column: _number(row[counter]) for column, counter in COUNTERS.items()},
        {reason: ratio / total for reason, ratio in ratios.items()},
    )


def _number(text: str) -> float:
    return float(text.replace(",", "") or 0)


def table(found: Sequence[Kernel]) -> Table:
    """One row a kernel."""
    grid = Table("candidate", "kernel", "µs", *COUNTERS, "waits for", title="Nsight Compute", box=box.SIMPLE)
    for kernel in found:
        longest = sorted(kernel.waits.items(), key=lambda entry: -entry[1])[:_SHOWN_REASONS]
        waits = ", ".join(f"{reason} {share:.0%}" for reason, share in longest)
        counted = (f"{kernel.counters[column]:.0f}" for column in COUNTERS)
        grid.add_row(kernel.candidate, kernel.name[:28], f"{kernel.microseconds:.1f}", *counted, waits)
    return grid


def _launch(options: argparse.Namespace) -> None:
    """Run every candidate once where the profiler sees it, and write their names."""
    cases = [case for text in options.case for case in select(list(GROUPS), text)]
    launched = [label for case in cases for label in _recorded(case, options)]
    options.launches.write_text(json.dumps(launched))


def _recorded(case: Case, options: argparse.Namespace) -> Iterator[str]:
    """The candidates of one case, each when the profiler has seen a marker and one call of it, not its first one."""
    settings = Settings(torch.device("cuda"), torch.bfloat16, 1, options.configs)
    with retained_buffers():
        bench = prepared(case, settings, Result(str(case), case.group, case.unit))
        for name in _chosen(list(bench.runs), options):
            bench.runs[name]()
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            torch.cuda._sleep(1)
            bench.runs[name]()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
            yield f"{case}: {name}"
    del bench
    forget()


def _chosen(names: list[str], options: argparse.Namespace) -> list[str]:
    """Those that are asked for; of fxopt's own the first one, unless configurations are named."""
    own = [name for name in names if name.startswith("fxopt")]
    left_out = [] if options.configs else own[1:]
    return [name for name in names if name.startswith(tuple(options.names)) and name not in left_out]


if __name__ == "__main__":
    main()
