"""What users call: optimize, explain, capture, rewrite."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch import nn

from fxopt import backend, driver
from fxopt.errors import CaptureError, FxoptWarning, OptionError
from fxopt.frontend.export import from_export
from fxopt.ir import program as ir
from fxopt.lowering.kernels import kernel_sources
from fxopt.lowering.options import Options, read_options
from fxopt.report.dump import dump
from fxopt.report.report import Report
from fxopt.rewriter.passes import Pass
from fxopt.rewritten import RewrittenModule

__all__ = ["Program", "RewrittenModule", "capture", "explain", "explain_program", "optimize", "rewrite"]

Target = TypeVar("Target")


@overload
def optimize(target: Target, **options: Any) -> Target: ...
@overload
def optimize(target: None = None, **options: Any) -> Callable[[Target], Target]: ...
def optimize(target: Any = None, **options: Any) -> Any:
    """Make a model faster: exact rewrites, compiled at the first call, for any input signature.

    Use it on an ``nn.Module`` instance, on a function, or as a decorator on a module class or a function, with or
    without
    options. Parameters, ``state_dict``, signature and outputs stay; an instance that is passed in is not changed.

    Args:
        target: what to optimize; ``None`` when used as ``@fxopt.optimize(...)``.
        **options: ``dynamic`` and ``fullgraph`` as torch.compile has them, and those of the backend
            (`fxopt.lowering.options.Options`): ``lower``, ``verify``, ``passes``, ``base``, ``strict``, ``inductor``.

    Returns:
        Something that is called as ``target`` is: for a class a subclass of the same name, whose instances are
        compiled.

    Raises:
        OptionError: an unknown option or value, or a target that is neither module, class of modules nor function.
    """
    backend.check_torch()
    own: dict[str, Any] = {key: options.pop(key) for key in ("dynamic", "fullgraph") if key in options}
    read_options(options)
    if target is None:
        return functools.partial(optimize, **own, **options)
    if isinstance(target, type) and issubclass(target, nn.Module):
        return _optimized_class(target, own, options)
    if not callable(target):
        raise OptionError(f"{target!r} can't be optimized; give an nn.Module, a class of modules or a function")
    return torch.compile(target, backend="fxopt", options=options or None, **own)


def _optimized_class(cls: type[nn.Module], own: dict[str, Any], options: dict[str, Any]) -> type[nn.Module]:
    """A subclass whose instances compile their forward, with the same name, parameters and signature."""

    def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, *args, **kwargs)
        self.compile(backend="fxopt", options=options or None, **own)

    functools.update_wrapper(__init__, cls.__init__)
    names = {
        "__init__": __init__,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    return type(cls.__name__, (cls,), names)


def explain(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Report:
    """What fxopt does with ``model`` called as ``model(*args, **kwargs)``: every attention, norm and MLP of it.

    The model runs once, rewritten but without the base compiler; graph breaks are followed, so several graphs may be
    covered. Nothing of the model is changed. The mode (training or not, gradients or not) is the caller's.

    Raises:
        CaptureError: no graph at all could be captured.
    """
    torch._dynamo.reset()
    with backend.collecting() as (outcomes, failures):
        target = model._orig_mod if hasattr(model, "_orig_mod") else model
        torch.compile(target, backend="fxopt", options={"base": "eager"})(*args, **kwargs)
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
    """
    backend.check_torch()
    if not isinstance(args, tuple):
        raise CaptureError(
            f"args must be a tuple of positional arguments, not {type(args).__name__}: write (x,) for one"
        )
    found = from_export(model, args, kwargs, dynamic_shapes)
    frozen = isinstance(model, nn.Module) and not model.training
    return Program(found.module, found.entry, found.signature, found.notes, frozen)


def explain_program(program: ir.Program, passes: Sequence[str | Pass] | None = None) -> Report:
    """What the pipeline, or ``passes``, does with a captured program."""
    return _run(program, passes).report


def _run(program: ir.Program, passes: Sequence[str | Pass] | None) -> driver.Outcome:
    options = Options(passes=None if passes is None else tuple(passes))
    return driver.run(program, options, training=False)


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

    Args:
        model: the module to rewrite.
        args: example positional arguments. Those of calls may need gradients where some of the examples do.
        kwargs: example keyword arguments.
        passes: names or instances of the passes to run; ``None`` for the exact pipeline.
        dynamic_shapes: which sizes are symbolic, as torch.export takes it.
        **options: ``verify`` and ``strict`` of the backend.

    Raises:
        CaptureError: the model can't be captured as one graph.
        UnknownPassError: a pass name that is not registered.
        PassError: with ``strict=True``, a pass failed.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(
            f"rewrite takes an nn.Module, not {type(model).__name__}; for a function use optimize or capture"
        )
    if not isinstance(args, tuple):
        raise CaptureError(
            f"args must be a tuple of positional arguments, not {type(args).__name__}: write (x,) for one"
        )
    chosen = read_options({**options, **({} if passes is None else {"passes": passes})})

    def build(source: nn.Module) -> Callable[[bool], ir.Program]:
        captured = from_export(source, args, kwargs, dynamic_shapes)
        told: set[str] = set()

        def make(frozen: bool) -> ir.Program:
            result = driver.rewrite(replace(captured, frozen=frozen), chosen)
            failed = {record.name: record.failure for record in result.records if record.failure}
            for name in failed.keys() - told:
                warnings.warn(f"pass {name} was rolled back: {failed[name]}", FxoptWarning, stacklevel=5)
            told.update(failed)
            return result.program

        return make

    return RewrittenModule(model, build)
