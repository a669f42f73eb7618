"""Timing of candidates on the operands that a site will see."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any, Final

import torch

#: Seconds this process spent building and timing candidates.
MEASUREMENT_SECONDS: Final = {"total": 0.0}
_BUDGET_SECONDS: Final = 0.05
_MAX_REPEATS: Final = 20
#: How much slower than the best so far a first time must be to be the last one.
_HOPELESS: Final = 2.0
#: Seconds that launching the kernels of a candidate may take, which its time on the device does not include.
_LAUNCHES: Final = 1e-3
#: Calls recorded into one CUDA graph.
_CALLS: Final = 5


def median_seconds(function: Callable[[], Any], device: torch.device, best: float = math.inf) -> float:
    """Median time of one call in seconds, after a warm-up call; about a twentieth of a second is spent.

    A single time is enough of a function that takes more than twice the ``best`` seconds of others; one that does so
    by far is not even captured.

    On a GPU the device's own time is measured, by replaying a CUDA graph of several calls: what launching costs depends
    on the program around the site, and overlaps with its work. A function that can't be captured is timed by events.
    """
    function()
    once = _once(function, device)
    if once > _HOPELESS * best + _LAUNCHES:
        return once
    run, calls = _replayed(function, device)
    first = _once(run, device) / calls
    if first > _HOPELESS * best:
        return first
    repeats = max(1, min(_MAX_REPEATS, int(_BUDGET_SECONDS / max(first * calls, 1e-6))))
    return statistics.median(_once(run, device) for _ in range(repeats)) / calls


def _replayed(function: Callable[[], Any], device: torch.device) -> tuple[Callable[[], Any], int]:
    """What to time, and how many calls of ``function`` it stands for."""
    if device.type != "cuda" or torch.is_grad_enabled():
        return function, 1
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(_CALLS):
                function()
    except RuntimeError:
        torch.cuda.synchronize()
        return function, 1
    graph.replay()
    return graph.replay, _CALLS


def _once(function: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        return _once_cuda(function)
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _once_cuda(function: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    function()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


def materialise(value: torch.Tensor, sizes: tuple[int, ...], strides: tuple[int, ...], seed: int) -> torch.Tensor:
    """A real tensor of ``sizes`` and ``strides`` with the dtype and device of ``value`` and random contents."""
    generator = torch.Generator(device=value.device).manual_seed(seed)
    elements = extent(sizes, strides)
    if value.dtype.is_floating_point:
        flat = torch.randn(elements, generator=generator, device=value.device, dtype=torch.float32).to(value.dtype)
    else:
        flat = torch.ones(elements, device=value.device, dtype=value.dtype)
    return flat.as_strided(sizes, strides)


def extent(sizes: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """The number of elements from the first to the last of a tensor, those between its rows included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True)) if all(sizes) else 0


def layout(value: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes and strides of a fake tensor, symbolic ones as they were seen."""
    return tuple(map(hint, value.shape)), tuple(map(hint, value.stride()))


def hint(size: int | torch.SymInt) -> int:
    """A size, where it is symbolic the one that was seen."""
    return size if isinstance(size, int) else int(size.node.hint)
