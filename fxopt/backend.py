"""The torch.compile backend: ``torch.compile(model, backend="fxopt")``."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Final

import torch
from torch import fx

from fxopt import driver
from fxopt.errors import FxoptError, FxoptWarning, OptionError, UnsupportedTorchError
from fxopt.frontend.buffers import guard_buffers
from fxopt.frontend.dynamo import from_dynamo, hand_over
from fxopt.lowering.base import compile_base, start_base, times_kernels
from fxopt.lowering.measure import MEASUREMENT_SECONDS
from fxopt.lowering.options import Options, read_options

_OLDEST_TORCH: Final = (2, 11)
_MODES: Final = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")

#: Seconds spent compiling in this process: ``total``, of which ``inductor`` in the base compiler and ``measurement``
#: building and timing candidates. The rest is fxopt's own; of that, ``capture`` retracing and ``passes`` in passes.
COMPILE_SECONDS: Final[dict[str, float]] = dict.fromkeys(("total", "inductor", "measurement", "capture", "passes"), 0.0)

_outcomes: ContextVar[list[driver.Outcome] | None] = ContextVar("fxopt_outcomes", default=None)
_failures: ContextVar[list[str] | None] = ContextVar("fxopt_failures", default=None)


def compile(  # noqa: A001 - the name under which torch.compile's entry point finds it
    module: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Rewrite one Dynamo graph, lower it and hand the rest to the base compiler.

    Args:
        module: the graph that TorchDynamo captured.
        inputs: its example inputs.
        mode: a mode of torch.compile, passed on to Inductor.
        options: see `fxopt.lowering.options.Options`.

    Raises:
        OptionError: an unknown option or mode.
        UnknownPassError: a pass name that is not registered.
        FxoptError: with ``strict=True``, whatever made fxopt leave the graph alone. By default the graph then goes
            to the base compiler as it is, and a `FxoptWarning` says why.
    """
    check_torch()
    chosen = read_options(options)
    if mode is not None and mode not in _MODES:
        raise OptionError(f"mode={mode!r} is not possible; choose one of {', '.join(_MODES)}")
    driver.selected_passes(chosen)  # what the user names must exist, whatever becomes of the graph
    start, measured = time.perf_counter(), MEASUREMENT_SECONDS["total"]
    mode = None if mode == "default" else mode
    start_base(inputs, chosen)
    # A base that times kernels itself is left alone meanwhile, and needs the memory that garbage holds.
    alone = chosen.base != "inductor" or times_kernels(chosen, mode)
    with nullcontext() if alone else driver.garbage_waits():
        compiled = _compile(module, inputs, chosen, mode, wait=not alone)
    COMPILE_SECONDS["measurement"] += MEASUREMENT_SECONDS["total"] - measured
    COMPILE_SECONDS["total"] += time.perf_counter() - start
    return compiled


def _compile(
    module: fx.GraphModule, inputs: Sequence[Any], options: Options, mode: str | None, wait: bool
) -> Callable[..., Any]:
    outcome = _unless_it_fails(options, lambda: _rewrite(module, inputs, options, mode, wait))
    if outcome is None:
        return _base(module, inputs, options, mode)
    compiled = _base(_in_place_of(module, outcome), inputs, options, mode)
    settled = _unless_it_fails(options, lambda: driver.settle(outcome, options, mode))
    if settled is None:
        return _base(module, inputs, options, mode)
    _collect(_outcomes, settled)
    if settled.lowered is outcome.lowered:
        return compiled
    return _base(_in_place_of(module, settled), inputs, options, mode)


def _rewrite(
    module: fx.GraphModule, inputs: Sequence[Any], options: Options, mode: str | None, wait: bool
) -> driver.Outcome:
    training = torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs)
    start = time.perf_counter()
    with driver.garbage_waits():
        program = from_dynamo(module, inputs)
    COMPILE_SECONDS["capture"] += time.perf_counter() - start
    outcome = driver.run(program, options, training=training, mode=mode, wait=wait)
    COMPILE_SECONDS["passes"] += sum(record.seconds for record in outcome.result.records)
    guard_buffers(outcome.result.program, module)
    return outcome


def _in_place_of(module: fx.GraphModule, outcome: driver.Outcome) -> fx.GraphModule:
    hand_over(outcome.lowered.module, module)
    return outcome.lowered.module


def _base(module: fx.GraphModule, inputs: Sequence[Any], options: Options, mode: str | None) -> Callable[..., Any]:
    start = time.perf_counter()
    compiled = compile_base(module, inputs, options, mode)
    COMPILE_SECONDS["inductor"] += time.perf_counter() - start
    return compiled


def _unless_it_fails(options: Options, attempt: Callable[[], driver.Outcome]) -> driver.Outcome | None:
    """The outcome; ``None``, with a warning, where there is none and the graph is to stay as it is."""
    try:
        return attempt()
    except Exception as error:
        if options.strict or isinstance(error, OptionError):
            raise
        _say_left_alone(error)
        return None


def _say_left_alone(error: Exception) -> None:
    reason = f"{type(error).__name__}: {error}"
    _collect(_failures, reason)
    advice = "" if isinstance(error, FxoptError) else " This is a defect of fxopt; strict=True raises it."
    warnings.warn(f"fxopt left a graph as it is ({reason}).{advice}", FxoptWarning, stacklevel=3)


def _collect(collector: ContextVar[list[Any] | None], value: Any) -> None:
    collected = collector.get()
    if collected is not None:
        collected.append(value)


@contextmanager
def collecting() -> Iterator[tuple[list[driver.Outcome], list[str]]]:
    """Collect the outcomes, and the reasons for graphs left alone, of everything compiled inside the block."""
    outcomes: list[driver.Outcome] = []
    failures: list[str] = []
    tokens = _outcomes.set(outcomes), _failures.set(failures)
    try:
        yield outcomes, failures
    finally:
        _outcomes.reset(tokens[0])
        _failures.reset(tokens[1])


def check_torch() -> None:
    """Raises `UnsupportedTorchError` when the installed torch is too old."""
    found = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if found < _OLDEST_TORCH:
        oldest = ".".join(map(str, _OLDEST_TORCH))
        raise UnsupportedTorchError(f"fxopt needs torch {oldest} or newer, found {torch.__version__}; upgrade torch")
