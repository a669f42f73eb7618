"""Timing of candidates on the operands that a site will see."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

_BUDGET_SECONDS = 0.05
_MAX_REPEATS = 20


def median_seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Median time of one call in seconds, after a warm-up call; at most about a twentieth of a second is spent."""
    function()
    first = _once(function, device)
    repeats = max(1, min(_MAX_REPEATS, int(_BUDGET_SECONDS / max(first, 1e-6))))
    return statistics.median(_once(function, device) for _ in range(repeats))


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
    return start.elapsed_time(end) / 1000


def materialise(value: torch.Tensor, sizes: tuple[int, ...], strides: tuple[int, ...], seed: int) -> torch.Tensor:
    """A real tensor of ``sizes`` and ``strides`` with the dtype and device of ``value`` and random contents."""
    generator = torch.Generator(device=value.device).manual_seed(seed)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True)) if all(sizes) else 0
    if value.dtype.is_floating_point:
        flat = torch.randn(extent, generator=generator, device=value.device, dtype=torch.float32).to(value.dtype)
    else:
        flat = torch.ones(extent, device=value.device, dtype=value.dtype)
    return flat.as_strided(sizes, strides)
