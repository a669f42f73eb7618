"""Timing a model in turn: eager, Inductor, fxopt; what ``python -m fxopt bench`` shows."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.utils import _pytree as pytree

from fxopt.errors import FxoptError, TargetRunError
from fxopt.target import Target

_SAMPLE_SECONDS: Final = 0.01


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: median, 10th and 90th percentile."""

    median_ms: float
    p10_ms: float
    p90_ms: float


@dataclass(frozen=True)
class BenchResult:
    """Timings by candidate (``eager``, ``inductor``, ``fxopt``) on one device."""

    device: str
    rounds: int
    timings: Mapping[str, Timing]

    def as_json(self) -> dict[str, Any]:
        """The result as plain data, with the speed of each candidate relative to eager."""
        eager = self.timings["eager"].median_ms
        rows = {
            name: {"median_ms": t.median_ms, "p10_ms": t.p10_ms, "p90_ms": t.p90_ms, "speedup": eager / t.median_ms}
            for name, t in self.timings.items()
        }
        return {"device": self.device, "torch": torch.__version__, "rounds": self.rounds, "timings": rows}

    def __str__(self) -> str:
        eager = self.timings["eager"].median_ms
        lines = [f"{self.device}, torch {torch.__version__}, {self.rounds} samples of each in turn"]
        for name, t in self.timings.items():
            spread = f"({t.p10_ms:.3f} … {t.p90_ms:.3f})"
            lines.append(f"{name:9} {t.median_ms:10.3f} ms  {spread:24} {eager / t.median_ms:6.2f}x of eager")
        return "\n".join(lines)


def bench_target(target: Target, *, inductor: bool = False, rounds: int = 20) -> BenchResult:
    """Time ``target`` without gradients; every candidate is compiled and warm before the first sample.

    Raises:
        TargetRunError: the model raised; fxopt's own errors pass through.
    """
    import fxopt

    candidates = {"eager": target.model}
    if inductor:
        candidates["inductor"] = torch.compile(copy.deepcopy(target.model))
    candidates["fxopt"] = fxopt.optimize(copy.deepcopy(target.model))
    synchronize = _synchronizer(target)
    with torch.no_grad():
        calls = {name: _warm(name, _call(model, target), synchronize) for name, model in candidates.items()}
        timings = _interleave(calls, synchronize, rounds)
    return BenchResult(_device(target), rounds, timings)


def _call(model: Callable[..., Any], target: Target) -> Callable[[], object]:
    return lambda: model(*target.args, **target.kwargs)


def _warm(name: str, call: Callable[[], object], synchronize: Callable[[], None]) -> Callable[[], object]:
    try:
        for _ in range(3):
            call()
        synchronize()
    except FxoptError:
        raise
    except Exception as error:
        raise TargetRunError(f"the model raised under {name}: {type(error).__name__}: {error}") from error
    return call


def _interleave(
    calls: Mapping[str, Callable[[], object]], synchronize: Callable[[], None], rounds: int
) -> dict[str, Timing]:
    """Sample the candidates in turn (A B A B), so that a drift of the machine hits all alike."""
    lengths = {name: max(1, round(_SAMPLE_SECONDS / _seconds(call, 2, synchronize))) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            samples[name].append(_seconds(call, lengths[name], synchronize) * 1e3)
    return {name: _timing(values) for name, values in samples.items()}


def _seconds(call: Callable[[], object], count: int, synchronize: Callable[[], None]) -> float:
    synchronize()
    start = time.perf_counter()
    for _ in range(count):
        call()
    synchronize()
    return (time.perf_counter() - start) / count


def _timing(samples: list[float]) -> Timing:
    deciles = statistics.quantiles(samples, n=10, method="inclusive")
    return Timing(statistics.median(samples), deciles[0], deciles[-1])


def _uses_cuda(target: Target) -> bool:
    parameters = list(target.model.parameters()) if isinstance(target.model, torch.nn.Module) else []
    leaves = [*pytree.tree_leaves((target.args, target.kwargs)), *parameters]
    return any(isinstance(leaf, torch.Tensor) and leaf.is_cuda for leaf in leaves)


def _synchronizer(target: Target) -> Callable[[], None]:
    return torch.cuda.synchronize if _uses_cuda(target) else lambda: None


def _device(target: Target) -> str:
    return torch.cuda.get_device_name() if _uses_cuda(target) else f"cpu ({torch.get_num_threads()} threads)"
