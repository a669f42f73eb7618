"""What users call: optimize, explain, capture, rewrite."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeVar, overload

import torch
from torch import nn

from fxopt import backend, driver
from fxopt.calling import call_form
from fxopt.errors import CaptureError, FxoptWarning, OptionError
from fxopt.example import check_args, kind_of, moved
from fxopt.frontend.export import from_export
from fxopt.ir import program as ir
from fxopt.lowering.kernels import kernel_sources
from fxopt.lowering.options import Options, read_options
from fxopt.optimized import optimized_class, optimized_twin, plain_call
from fxopt.report.dump import dump
from fxopt.report.report import Report
from fxopt.rewriter.passes import Pass
from fxopt.rewriter.pipeline import PipelineResult
from fxopt.rewriter.registry import register_pass
from fxopt.rewritten import Captured, RewrittenModule

__all__ = [
    "Program", "RewrittenModule", "capture", "explain", "explain_program", "optimize", "register_pass", "rewrite",
]  # fmt: skip

Target = TypeVar("Target")

#: What `optimize` hands to torch.compile itself, and the values it may have.
_OF_COMPILE: Final = {"dynamic": (None, True, False), "fullgraph": (True, False)}
_OF_REWRITE: Final = ("passes", "verify", "strict")


@overload
def optimize(target: Target, **options: Any) -> Target: ...
@overload
def optimize(target: None = None, **options: Any) -> Callable[[Target], Target]: ...
def optimize(target: Any = None, **options: Any) -> Any:
    """Make a model faster: exact rewrites, compiled at the first call, for any input signature.

    Use it on an ``nn.Module`` instance, on a function, or as a decorator on a module class or a function, with or
    without options. Class, parameters, ``state_dict``, signature and outputs stay. Of an instance this gives a second
    one that shares its state; calls of the first stay as they were.

    Args:
        target: what to optimize; ``None`` when used as ``@fxopt.optimize(...)``.
        **options: ``dynamic`` and ``fullgraph`` as torch.compile has them, and those of the backend
            (`fxopt.lowering.options.Options`): ``lower``, ``verify``, ``passes``, ``base``, ``strict``, ``inductor``.

    Returns:
        Something that is called as ``target`` is: for a class a subclass of the same name, whose instances are
        compiled; for an instance one of such a subclass.

    Raises:
        OptionError: an unknown option or value, or a target that is neither module, class of modules nor function.
        UnknownPassError: a pass name that is not registered.
    """
    backend.check_torch()
    if target is None:
        _settings(options)
        return functools.partial(optimize, **options)
    settings = _settings(options)
    if isinstance(target, type) and issubclass(target, nn.Module):
        return optimized_class(target, settings)
    if isinstance(target, nn.Module):
        return optimized_twin(target, settings)
    if isinstance(target, type) or not callable(target):
        raise OptionError(f"{target!r} can't be optimized; give an nn.Module, a class of modules or a function")
    return torch.compile(target, backend="fxopt", **settings)


def _settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of torch.compile that ``given`` options of `optimize` are."""
    own = {key: value for key, value in given.items() if key in _OF_COMPILE}
    options = {key: value for key, value in given.items() if key not in _OF_COMPILE}
    driver.selected_passes(read_options(options, further=tuple(_OF_COMPILE)))
    for name, value in own.items():
        if value not in _OF_COMPILE[name] or not isinstance(value, bool | None):
            raise OptionError(f"{name}={value!r} is not possible; choose {' or '.join(map(str, _OF_COMPILE[name]))}")
    return {**own, "options": options or None}


def explain(model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Report:
    """What fxopt does with ``model`` called as ``model(*args, **kwargs)``: every attention, norm and MLP of it.

    The model runs once, rewritten but without the base compiler; graph breaks are followed, so several graphs may be
    covered. Nothing of the model is changed. The mode (training or not, gradients or not) is the caller's.
    TorchDynamo is reset: what was compiled before in this process is compiled again at its next call.

    Raises:
        CaptureError: no graph at all could be captured.
        OptionError: ``model`` is neither module nor function.
    """
    _check_model(model)
    torch._dynamo.reset()
    with backend.collecting() as (outcomes, failures):
        target: Any = model._orig_mod if isinstance(model, torch._dynamo.OptimizedModule) else model
        # A module that is compiled in place would run its own compilation.
        call = functools.partial(plain_call(type(target)), target) if isinstance(target, nn.Module) else target
        torch.compile(call, backend="fxopt", options={"base": "eager"})(*args, **kwargs)
    torch._dynamo.reset()
    notes = tuple(f"a graph was left alone: {reason}" for reason in failures)
    if not outcomes and not failures:
        raise CaptureError("nothing was captured: the model computes nothing that TorchDynamo can trace")
    reports = [outcome.report for outcome in outcomes]
    merged = Report.merge(reports) if reports else Report(graphs=0)
    return Report(merged.sites, merged.passes, merged.decisions, (*merged.notes, *notes), merged.graphs)


@dataclass
class Program(ir.Program):
    """A captured program: ``code`` to read it, `dump` to write it and everything that becomes of it."""

    def dump(self, directory: str | Path, *, passes: Sequence[str | Pass] | None = None) -> Path:
        """Run the pipeline and write the program before and after every pass, the kernels and the report.

        Raises:
            DumpError: ``directory`` holds files that a dump did not write.
        """
        outcome = _run(self, passes)
        steps = [(record.name, step) for record, step in outcome.steps if record.result.modified]
        return dump(self, outcome.result, steps, directory, kernel_sources(outcome.lowered), outcome.report)


def capture(
    model: nn.Module | Callable[..., Any],
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> Program:
    """Capture ``model`` called on ``args`` and ``kwargs`` as one program of the fxopt dialect.

    Of a module in evaluation mode the program is frozen: passes fold weights in it as in `rewrite`.

    Args:
        model: a module or a function.
        args: positional arguments, a tuple.
        kwargs: keyword arguments.
        dynamic_shapes: which sizes are symbolic, as torch.export takes it; ``None``: all static.

    Raises:
        CaptureError: the model can't be captured as one graph; the message carries the line that stopped it.
        OptionError: ``model`` is neither module nor function.
    """
    backend.check_torch()
    _check_model(model)
    check_args(args)
    found = from_export(model, args, kwargs, dynamic_shapes)
    frozen = isinstance(model, nn.Module) and not model.training
    return Program(found.module, found.entry, found.signature, found.notes, frozen, found.held)


def _check_model(model: Any) -> None:
    if isinstance(model, type) or not callable(model):
        raise OptionError(f"{model!r} is neither an nn.Module nor a function; give a model that can be called")


def explain_program(program: ir.Program, passes: Sequence[str | Pass] | None = None) -> Report:
    """What the pipeline, or ``passes``, does with a captured program."""
    return _run(program, passes).report


def _run(program: ir.Program, passes: Sequence[str | Pass] | None) -> driver.Outcome:
    return driver.run(program, read_options({"passes": passes}), training=False)


def rewrite(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    passes: Sequence[str | Pass] | None = None,
    dynamic_shapes: Any = None,
    **options: Any,
) -> RewrittenModule:
    """A rewritten copy of ``model`` as an ``nn.Module`` with the same parameter names; the model is not changed.

    It serves calls with the sizes and constants of the example, and its ``report`` says what was done.

    Args:
        model: the module to rewrite.
        args: example positional arguments. Those of calls may need gradients where some of the examples do.
        kwargs: example keyword arguments.
        passes: names or instances of the passes to run; ``None`` for the exact pipeline.
        dynamic_shapes: which sizes are symbolic, as torch.export takes it.
        **options: ``verify`` and ``strict`` of the backend.

    Raises:
        CaptureError: the model can't be captured as one graph.
        OptionError: an unknown option or value.
        UnknownPassError: a pass name that is not registered.
        PassError: with ``strict=True``, a pass failed.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(
            f"rewrite takes an nn.Module, not {type(model).__name__}; for a function use optimize or capture"
        )
    check_args(args)
    chosen = read_options({**options, **({} if passes is None else {"passes": passes})}, _OF_REWRITE)
    driver.selected_passes(chosen)
    return RewrittenModule(model, _Recipe(args, dict(kwargs or {}), dynamic_shapes, chosen, kind_of(model)))


@dataclass(frozen=True)
class _Recipe:
    """How a model is captured and rewritten, again in another mode or after it was moved."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dynamic_shapes: Any
    options: Options
    like: torch.Tensor

    def __call__(self, model: nn.Module) -> Captured:
        args, kwargs = moved((self.args, self.kwargs), self.like, kind_of(model))
        program = from_export(model, args, kwargs, self.dynamic_shapes)
        told: set[str] = set()

        def make(frozen: bool) -> PipelineResult:
            result = driver.rewrite(replace(program, frozen=frozen), self.options)
            failed = {record.name: record.failure for record in result.records if record.failure}
            for name in failed.keys() - told:
                warnings.warn(f"pass {name} was rolled back: {failed[name]}", FxoptWarning, stacklevel=6)
            told.update(failed)
            return result

        return Captured(call_form(model.forward, args, kwargs, program), make)
