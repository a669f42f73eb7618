"""The torch.compile backend: ``torch.compile(model, backend="fxopt")``."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

import torch
from torch import fx

from fxopt import driver
from fxopt.errors import FxoptError, FxoptWarning, OptionError, UnsupportedTorchError
from fxopt.frontend.dynamo import from_dynamo, hand_over
from fxopt.lowering.base import compile_base, start_base
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
        to the
            base compiler as it is, and a `FxoptWarning` says why.
    """
    check_torch()
    chosen = read_options(options)
    if mode is not None and mode not in _MODES:
        raise OptionError(f"mode={mode!r} is not possible; choose one of {', '.join(_MODES)}")
    driver.selected_passes(chosen)  # what the user names must exist, whatever becomes of the graph
    start, measured = time.perf_counter(), MEASUREMENT_SECONDS["total"]
    mode = None if mode == "default" else mode
    start_base(inputs, chosen)
    rewritten = _rewrite(module, inputs, chosen, mode)
    before_base = time.perf_counter()
    compiled = compile_base(rewritten, inputs, chosen, mode)
    COMPILE_SECONDS["measurement"] += MEASUREMENT_SECONDS["total"] - measured
    COMPILE_SECONDS["inductor"] += time.perf_counter() - before_base
    COMPILE_SECONDS["total"] += time.perf_counter() - start
    return compiled


def _rewrite(module: fx.GraphModule, inputs: Sequence[Any], options: Options, mode: str | None) -> fx.GraphModule:
    training = torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs)
    start = time.perf_counter()
    try:
        with driver.garbage_waits():
            program = from_dynamo(module, inputs)
        COMPILE_SECONDS["capture"] += time.perf_counter() - start
        outcome = driver.run(program, options, training=training, mode=mode)
    except Exception as error:
        if options.strict or isinstance(error, OptionError):
            raise
        _say_left_alone(error)
        return module
    COMPILE_SECONDS["passes"] += sum(record.seconds for record in outcome.result.records)
    _collect(_outcomes, outcome)
    hand_over(outcome.lowered.module, module)
    return outcome.lowered.module


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
