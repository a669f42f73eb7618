"""Which GPU kernels a call runs, and for how long: a ratio without kernel names explains nothing."""

from __future__ import annotations

from benchmarks.timing import Candidate


def kernel_times(candidate: Candidate, *, limit: int = 12) -> list[tuple[str, float]]:
    """The ``limit`` longest-running GPU kernels of one call of ``candidate``: (name, milliseconds), longest first."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        candidate()
        torch.cuda.synchronize()
    times = [(event.key[:160], event.self_device_time_total / 1e3) for event in trace.key_averages()]
    return sorted(times, key=lambda entry: -entry[1])[:limit]
