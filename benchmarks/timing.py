"""Interleaved medians: every candidate is sampled in turn (A B A B), so that drift of the machine hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Candidate = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: the median over ``samples``, and the 10th and 90th percentile around it."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    samples: int
    calls_per_sample: int

    @property
    def spread(self) -> float:
        """(p90 - p10) / median: differences between candidates smaller than this are noise."""
        return (self.p90_ms - self.p10_ms) / self.median_ms


def interleave(
    candidates: Mapping[str, Candidate], device: torch.device | str, *, rounds: int = 30, sample_ms: float = 10.0
) -> dict[str, Timing]:
    """Time every candidate ``rounds`` times, in turn.

    A sample is as many back-to-back calls as fill about ``sample_ms`` (at least one), between two CUDA events where
    ``device`` is a GPU and by the host's clock otherwise. One untimed call precedes each sample, so that the caches
    hold the candidate's own data and not its predecessor's. Candidates must already be compiled and warmed up;
    whatever a candidate raises is passed on.
    """
    clock = _cuda_clock if torch.device(device).type == "cuda" else _host_clock
    calls = {name: _calls_to_fill(candidate, clock, sample_ms) for name, candidate in candidates.items()}
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, candidate in candidates.items():
            candidate()
            samples[name].append(clock(candidate, calls[name]))
    return {name: _summary(samples[name], calls[name]) for name in candidates}


def cuda_graph(candidate: Candidate) -> Candidate:
    """``candidate`` captured as a CUDA graph: replays show the time of small kernels without launch gaps."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            candidate()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        candidate()

    def replay(keep: Candidate = candidate) -> None:
        """``keep`` holds on to the tensors that the graph reads and writes."""
        graph.replay()

    return replay


def _calls_to_fill(candidate: Candidate, clock: Callable[[Candidate, int], float], sample_ms: float) -> int:
    candidate()
    return max(1, round(sample_ms / max(clock(candidate, 3), 1e-4)))


def _cuda_clock(candidate: Candidate, calls: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        candidate()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / calls


def _host_clock(candidate: Candidate, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        candidate()
    return (time.perf_counter() - start) * 1e3 / calls


def _summary(samples: list[float], calls: int) -> Timing:
    if len(samples) == 1:
        return Timing(samples[0], samples[0], samples[0], 1, calls)
    deciles = statistics.quantiles(samples, n=10, method="inclusive")
    return Timing(statistics.median(samples), deciles[0], deciles[-1], len(samples), calls)
