"""One model, all its peers: compile, check against float64, then time interleaved. A failing peer loses only itself."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.accuracy import Reference, compare, reference
from benchmarks.kernels import kernel_times
from benchmarks.model_cases import Case, Inputs
from benchmarks.model_peers import Forward, Peer, main_output
from benchmarks.model_results import CaseResult, PeerResult, judge
from benchmarks.progress import Progress
from benchmarks.timing import Timing, interleave

_WARM_UP_CALLS = 4  # CUDA graphs are recorded at the second and third call


@dataclass(frozen=True)
class Settings:
    """How the models are measured; the same for all of them in one run."""

    device: torch.device
    dtype: torch.dtype
    quick: bool = False
    rounds: int = 30
    kernels: bool = False
    keep_caches: bool = False
    fxopt_options: Mapping[str, str] = field(default_factory=dict)


@dataclass
class _Bench:
    """A model under measurement: what its peers share."""

    case: Case
    settings: Settings
    progress: Progress
    result: CaseResult
    model: Any
    timed: Inputs
    checked: Inputs
    expected: Reference


def measure(case: Case, peers: list[Peer], settings: Settings, progress: Progress) -> CaseResult:
    """Measure ``peers`` on ``case``. What fails or no longer fits in the time is recorded, never raised."""
    result = CaseResult(case.name, case.title, source=case.source(settings.quick))
    result.peers = {peer.name: PeerResult() for peer in peers}
    with torch.no_grad(), TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        try:
            _warm_compiler(peers, settings.device)
            bench = _prepare(case, settings, progress, result)
        except Exception as error:
            for peer in result.peers.values():
                peer.fail(error)
            progress.say(f"{case.name}: could not be built or run in higher precision: {_first_line(error)}")
            return result
        forwards = {peer.name: _first_calls(bench, peer, Path(directory)) for peer in peers}
        _time(bench, {name: forward for name, forward in forwards.items() if forward is not None})
    judge(result)
    return result


def _warm_compiler(peers: list[Peer], device: torch.device) -> None:
    """Import Inductor and start its workers, once a process, so that the first compiled peer is not charged for it."""
    if device.type == "cuda" and any(peer.backend for peer in peers):
        _compile_one_kernel(device)


@cache
def _compile_one_kernel(device: torch.device) -> None:
    torch.compile(torch.nn.functional.gelu)(torch.randn(1024, device=device))


def _prepare(case: Case, settings: Settings, progress: Progress, result: CaseResult) -> _Bench:
    _forget_previous_model()
    build, where = partial(case.build, quick=settings.quick), (settings.device, settings.dtype)
    model = build(*where)
    timed, checked = (case.make_inputs(*where, seed=seed, quick=settings.quick) for seed in (0, 1))
    expected = reference(model, checked)
    result.inputs = {name: list(tensor.shape) for name, tensor in timed.items()}
    result.filled = float(timed["attention_mask"].float().mean()) if "attention_mask" in timed else None
    result.reference_dtype = expected.dtype
    progress.say(f"{case.name}: built with {result.source}, reference in {expected.dtype}")
    return _Bench(case, settings, progress, result, model, timed, checked, expected)


def _forget_previous_model() -> None:
    """Drop compiled code and the memory it holds. Peers of one model stay, side by side by backend."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _first_calls(bench: _Bench, peer: Peer, directory: Path) -> Forward | None:
    """Compile, warm up and check one peer; None where it failed or there was no time."""
    outcome = bench.result.peers[peer.name]
    if bench.progress.expired:
        outcome.status, outcome.reason = "skipped", "time limit"
        bench.progress.say(f"{bench.case.name}: {peer.name} skipped, the time limit is reached")
        return None
    try:
        with _caches(directory / (peer.kernels_of or peer.name), keep=bench.settings.keep_caches or not peer.backend):
            forward = _compiled(bench, peer, outcome)
            for _ in range(_WARM_UP_CALLS):
                forward(**bench.timed)
            outcome.error = compare(main_output(forward(**bench.checked)), bench.expected)
    except Exception as error:
        outcome.fail(error)
        bench.progress.say(f"{bench.case.name}: {peer.name} failed: {_first_line(error)}")
        return None
    seconds = f"first call {outcome.first_call_seconds:.2f} s, relative error {outcome.error.relative:.2e}"
    bench.progress.say(f"{bench.case.name}: {peer.name} {seconds}")
    return forward


def _compiled(bench: _Bench, peer: Peer, outcome: PeerResult) -> Forward:
    model = bench.model
    if peer.attention:
        settings = bench.settings
        model = bench.case.build(settings.device, settings.dtype, quick=settings.quick, attention=peer.attention)
        model.load_state_dict(bench.model.state_dict())
    seconds = _fxopt_seconds() if peer.backend == "fxopt" else {}
    seconds.update(dict.fromkeys(seconds, 0.0))
    graphs = _graphs()
    forward = peer.compile(model, bench.settings.fxopt_options)
    start = time.perf_counter()
    forward(**bench.timed)
    _synchronize(bench.settings.device)
    outcome.first_call_seconds = time.perf_counter() - start
    outcome.fxopt_seconds = _with_own(seconds)
    outcome.graphs = _graphs() - graphs if peer.backend else None
    return forward


def _fxopt_seconds() -> dict[str, float]:
    """fxopt's account of the latest compilation: total, and Inductor's and the measurements' parts of it."""
    from fxopt.backend import COMPILE_SECONDS

    return COMPILE_SECONDS


def _with_own(seconds: dict[str, float]) -> dict[str, float]:
    if not seconds:
        return {}
    return {**seconds, "own": seconds["total"] - seconds["inductor"] - seconds["measurement"]}


def _graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _caches(directory: Path, *, keep: bool) -> Any:
    """Empty Inductor and Triton caches, so that no peer compiles with what another one left; or those of the user."""
    if keep:
        return contextlib.nullcontext()
    from torch._inductor.utils import fresh_cache

    directory.mkdir(exist_ok=True)
    return fresh_cache(dir=str(directory), delete=False)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _time(bench: _Bench, forwards: dict[str, Forward]) -> None:
    candidates = {name: partial(forward, **bench.timed) for name, forward in forwards.items()}
    sample_ms = 1.0 if bench.settings.quick else 10.0
    time_them = partial(interleave, device=bench.settings.device, rounds=bench.settings.rounds, sample_ms=sample_ms)
    peers = bench.result.peers
    try:
        for name, timing in time_them(candidates).items():
            peers[name].timing = timing
    except Exception as together:
        bench.progress.say(f"{bench.case.name}: interleaved timing failed, each on its own: {_first_line(together)}")
        for name, candidate in candidates.items():
            _time_alone(peers[name], partial(time_them, {name: candidate}), name)
    for name in candidates if bench.settings.kernels else ():
        peers[name].kernels = kernel_times(candidates[name])


def _time_alone(outcome: PeerResult, time_it: partial[dict[str, Timing]], name: str) -> None:
    try:
        outcome.timing = time_it()[name]
    except Exception as error:
        outcome.fail(error)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
