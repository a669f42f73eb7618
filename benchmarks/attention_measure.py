"""One case of attention, all its candidates: made ready, checked against float64, then timed in turn."""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

import torch
from torch import Tensor

from benchmarks.attention_cases import Case, Operands, Probe, Work
from benchmarks.attention_goals import judge
from benchmarks.attention_kinds import PLAIN, Kind
from benchmarks.attention_peers import PEERS, Build, Forward
from benchmarks.attention_results import Result
from benchmarks.kernels import kernel_times
from benchmarks.timing import Timing, cuda_graph, interleave
from fxopt.codegen.attention.backward import families as backward
from fxopt.codegen.attention.kernels import ranking
from fxopt.codegen.attention.operator import attention_forward
from fxopt.codegen.attention.portable import kernel as portable
from fxopt.codegen.attention.portable.config import Loads
from fxopt.codegen.attention.problem import Problem

Run = Callable[[], tuple[Tensor, ...]]
#: Largest error over the largest value: several roundings of inputs, weights and result.
_TOLERANCE: Final = {torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float32: 1e-4}
#: Where the fastest candidate takes less, launches would be timed: CUDA graphs are replayed instead.
_SMALL_MS: Final = 1.0
_COPIED: Final = {"cuda": 1 << 30, "cpu": 1 << 20}
_KERNELS: Final = 3
#: Where there is no GPU, candidates are those for a Hopper one; the CPU runs their specification.
_CAPABILITY: Final = (9, 0)


@dataclass(frozen=True)
class Settings:
    """How the cases are measured; the same for all of them in one run."""

    device: torch.device
    dtype: torch.dtype
    rounds: int
    configs: Sequence[str] = ()
    loads: Sequence[Loads] = ()
    kernels: bool = False

    @property
    def sample_ms(self) -> float:
        """How long one sample is."""
        return 10.0 if self.device.type == "cuda" else 0.1


@dataclass
class Bench:
    """A case under measurement: its result so far, and what has been made ready for timing."""

    case: Case
    settings: Settings
    operands: Operands
    result: Result
    runs: dict[str, Run] = field(default_factory=dict)

    def add(self, name: str, make: Callable[[], Forward], probes: list[Probe], work: Work) -> None:
        """Make one candidate ready and check it; why it is not fit for timing goes into the result."""
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                run = _in_mode(self.case, make(), self.operands)
                error = _error(run(), probes)
            except Exception as failure:
                self.result.failures[name] = _sentence(failure, [str(warning.message) for warning in said])
                return
        self.result.errors[name] = error
        # A NaN compares false.
        if not error < _TOLERANCE[self.settings.dtype]:
            self.result.failures[name] = f"wrong: error {error:.3g}"
            return
        self.take(name, run, work)

    def take(self, name: str, run: Run, work: Work) -> None:
        """Time this candidate, of which ``work`` is done."""
        in_bytes = self.case.unit == "GB/s"
        self.result.work[name] = work.bytes if in_bytes else work.flops
        self.result.computed[name] = work.bytes if in_bytes else work.computed
        self.runs[name] = run


def measure(case: Case, settings: Settings) -> Result:
    """Build, check, time and judge every candidate of one case. What fails is recorded, never raised."""
    result = Result(str(case), case.group, case.unit)
    try:
        with retained_buffers():
            _measure(case, settings, result)
    except Exception as error:
        result.failures["case"] = _sentence(error)
    judge(case, result)
    forget()
    return result


def forget() -> None:
    """Drop compiled code and free the memory of the case before."""
    torch._dynamo.reset()
    gc.collect()
    # Where a kernel has broken the device, this fails as everything does; `is_lost` sees it.
    with contextlib.suppress(RuntimeError):
        torch.cuda.empty_cache()


@contextlib.contextmanager
def retained_buffers() -> Iterator[None]:
    """Compiled backward passes run again and again here, so they must not give their inputs' memory away."""
    from torch._functorch import config

    with config.patch(donated_buffer=False):
        yield


def _measure(case: Case, settings: Settings, result: Result) -> None:
    _time(prepared(case, settings, result))


def prepared(case: Case, settings: Settings, result: Result) -> Bench:
    """Every candidate of one case, built and checked; those that are fit for timing are the bench's runs."""
    torch.manual_seed(0)
    bench = Bench(case, settings, case.operands(settings.device, settings.dtype), result)
    work, probes = case.work(case.kind, bench.operands), case.probes(case.kind, bench.operands)
    if case.kind.mask_mod is not None:
        every = case.work(PLAIN, bench.operands).flops
        result.notes["part of all scores that the mask keeps"] = work.flops / every
        result.notes["part of all scores in blocks that it keeps something of"] = work.computed / every
    for config in _configs(case, settings, bench.operands):
        bench.add(f"fxopt {config}", _own(bench.operands, config), probes, work)
    for name in case.peers:
        setup = Build(case, bench.operands, result.notes)
        bench.add(name, _peer(name, setup), probes, work)
    for baseline in case.baselines:
        _add_baseline(bench, baseline, work)
    return bench


def _own(operands: Operands, config: str) -> Callable[[], Forward]:
    spec, with_lse = str(operands.spec), operands.grad_out is not None
    return lambda: lambda: attention_forward(*operands.qkv, operands.captures, spec, config, with_lse)[0]


def _peer(name: str, setup: Build) -> Callable[[], Forward]:
    return lambda: PEERS[name](setup)


def _add_baseline(bench: Bench, baseline: Kind | Literal["copy"], work: Work) -> None:
    """What ratios are taken to besides peers: a copy of memory, or our own kernel for another kind of attention."""
    if baseline == "copy":
        source = torch.ones(_COPIED[bench.settings.device.type], dtype=torch.uint8, device=bench.settings.device)
        target = torch.empty_like(source)
        bench.take("base copy", lambda: (target.copy_(source),), Work(0.0, 0.0, 2.0 * source.numel()))
        return
    _add_own_baseline(bench, baseline, work)


def _add_own_baseline(bench: Bench, kind: Kind, work: Work) -> None:
    case = bench.case
    operands = case.with_kind(kind, bench.operands)
    # The same batch masked in vain, or without padding, does the same useful work; other kinds are rated by their own.
    own_work = work if case.group == "padded" else case.work(kind, operands)
    probes = case.probes(kind, operands)
    for config in _configs(case, replace(bench.settings, configs=(), loads=()), operands):
        bench.add(f"base {kind.name} {config}", _own(operands, config), probes, own_work)


def _configs(case: Case, settings: Settings, operands: Operands) -> list[str]:
    """fxopt's own candidates, those that the cost model leaves out too where all are asked for; or those asked for,
    portable ones with each kind of loads that is asked for. In training the best guess for the forward goes with every
    candidate for the backward.
    """
    z = case.sizes
    on_gpu = settings.device.type == "cuda"
    capability = torch.cuda.get_device_capability(settings.device) if on_gpu else _CAPABILITY
    sizes = (z.batch, z.heads, z.kv_heads, z.rows, z.keys)
    training = operands.grad_out is not None
    problem = Problem(operands.spec, z.width, z.width, settings.dtype, capability, *sizes, with_lse=training)
    own = ranking(problem)
    chosen: Sequence[str] = settings.configs or own.tried
    chosen = [*own.tried, *own.left_out] if list(chosen) == ["all"] else chosen
    if training and not settings.configs:
        found, _ = backward.candidates(problem)
        chosen = [f"{own.tried[0]}/{config}" for config in found]
    return list(dict.fromkeys(text for config in chosen for text in _with_loads(config, settings.loads)))


def _with_loads(config: str, loads: Sequence[Loads]) -> list[str]:
    if not loads or ":" in config:
        return [config]
    return [str(replace(portable.read_config(config), loads=how)) for how in loads]


def _in_mode(case: Case, forward: Forward, operands: Operands) -> Run:
    """What is timed of ``forward``: itself, the backward pass after it, or both."""
    grad_out = operands.grad_out
    if case.mode == "forward" or grad_out is None:
        return lambda: (forward(),)
    if case.mode == "forward+backward":
        return lambda: torch.autograd.grad(forward(), operands.qkv, grad_out)
    out = forward()
    return lambda: torch.autograd.grad(out, operands.qkv, grad_out, retain_graph=True)


def _error(outputs: tuple[Tensor, ...], probes: list[Probe]) -> float:
    """The largest difference to float64, over the largest value, of the worst output; infinite for a NaN."""
    errors = [_probe_error(outputs, probe, n) for probe in probes for n in range(len(outputs))]
    return max(errors) if all(error == error for error in errors) else float("inf")  # noqa: PLR0124


def _probe_error(outputs: tuple[Tensor, ...], probe: Probe, n: int) -> float:
    found, exact = outputs[n][probe.batch, probe.head], probe.exact[n]
    if len(outputs) == 1:
        found, exact = found[probe.rows][probe.kept], exact[probe.kept]
    if not exact.numel():
        return 0.0
    largest = exact.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return float((found.detach().double() - exact).abs().max() / largest)


def _time(bench: Bench) -> None:
    bench.result.graphs = _is_small(bench)
    if bench.result.graphs:
        for name in list(bench.runs):
            _capture(bench, name)
    try:
        bench.result.timings = _interleaved(bench.settings, bench.runs, bench.settings.rounds)
    except Exception:
        for name, run in bench.runs.items():
            _time_alone(bench, name, run)
    for name, run in bench.runs.items() if bench.settings.kernels else ():
        bench.result.kernels[name] = kernel_times(run, limit=_KERNELS)


def _interleaved(settings: Settings, runs: Mapping[str, Any], rounds: int) -> dict[str, Timing]:
    return interleave(runs, settings.device, rounds=rounds, sample_ms=settings.sample_ms)


def _is_small(bench: Bench) -> bool:
    """Whether the fastest candidate is so short that its launch would be timed. Backward passes are never."""
    if bench.settings.device.type != "cuda" or bench.case.mode != "forward" or not bench.runs:
        return False
    timings = _interleaved(bench.settings, bench.runs, 1)
    return min(timing.median_ms for name, timing in timings.items()) < _SMALL_MS


def _capture(bench: Bench, name: str) -> None:
    try:
        replay: Any = cuda_graph(bench.runs[name])
        bench.runs[name] = replay
    except Exception as error:
        bench.result.failures[name] = f"can't be captured in a CUDA graph: {_sentence(error)}"
        del bench.runs[name]


def _time_alone(bench: Bench, name: str, run: Run) -> None:
    try:
        bench.result.timings |= _interleaved(bench.settings, {name: run}, bench.settings.rounds)
    except Exception as error:
        bench.result.failures[name] = _sentence(error)


def _sentence(error: Exception, said: Sequence[str] = ()) -> str:
    """The first line of ``error``, and the warnings that explain it."""
    lines = str(error).strip().splitlines() or [""]
    why = "; ".join(dict.fromkeys(text.strip().splitlines()[0][:120] for text in said[:4] if text.strip()))
    return f"{type(error).__name__}: {lines[0][:160]}{f' ({why})' if why else ''}"
