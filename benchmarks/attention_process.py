"""Cases in a worker process that is replaced when one crashes it, hangs, or breaks its device: one case is lost."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import torch

from benchmarks.attention_cases import Case
from benchmarks.attention_results import Result, show
from benchmarks.progress import Progress

#: Exit status of a worker that has written all it can.
DEVICE_LOST: Final = 3
_POLL_SECONDS: Final = 0.5
#: What a worker may take before it can begin its first case.
_START_SECONDS: Final = 60.0
Publish = Callable[[list[Result]], None]


def is_lost(device: torch.device) -> bool:
    """Whether the device answers this process no more, as after an illegal access."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def supervise(
    arguments: Sequence[str],
    cases: Sequence[Case],
    case_limit: float,
    progress: Progress,
    publish: Publish,
    start: int = 0,
) -> list[Result]:
    """Run ``cases`` in workers called with ``arguments`` and return one result for each, in order.

    ``start`` is the number of cases that ``arguments`` names before these. ``publish`` is given all results whenever
    there are more.
    """
    results: list[Result] = []
    while len(results) < len(cases):
        from_here = [*arguments, "--worker", "--start", str(start + len(results))]
        reason = _work(from_here, results, case_limit, progress, publish)
        if reason and len(results) < len(cases):
            case = cases[len(results)]
            results.append(Result(str(case), case.group, case.unit, failures={"case": reason}))
            show(results[-1])
            publish(results)
    return results


def _work(
    arguments: Sequence[str], results: list[Result], case_limit: float, progress: Progress, publish: Publish
) -> str:
    """Run one worker, append its results, and say why the case after them has none; empty where there is no reason."""
    first = len(results)
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "results.json"
        command = [sys.executable, "-m", "benchmarks.attention", *arguments, "--output", str(output)]
        command += [] if progress.remaining is None else ["--time-limit", f"{progress.remaining:.1f}"]
        worker = subprocess.Popen(command)
        deadline = time.monotonic() + _START_SECONDS + case_limit
        while _runs(worker) and time.monotonic() < deadline:
            if _collect(output, results, first):
                publish(results)
                deadline = time.monotonic() + case_limit
        status = worker.poll()
        if status is None:
            worker.kill()
            worker.wait()
        if _collect(output, results, first):
            publish(results)
    if status is None:
        return f"hung: no result within {case_limit:g} s"
    orderly = status in (0, DEVICE_LOST) and len(results) > first
    return "" if orderly else f"the process ended with status {status} before it had a result"


def _runs(worker: subprocess.Popen[bytes]) -> bool:
    try:
        worker.wait(_POLL_SECONDS)
    except subprocess.TimeoutExpired:
        return True
    return False


def _collect(output: Path, results: list[Result], first: int) -> bool:
    """Replace the results from ``first`` on by those of the worker; whether there are more than before."""
    if not output.exists():
        return False
    found = [Result.from_json(data) for data in json.loads(output.read_text())["results"]]
    more = len(found) > len(results) - first
    results[first:] = found
    return more
