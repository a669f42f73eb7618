"""Trainable passes, as users call them: prepare a student, train it as usual, convert it.

student = fxopt.prepare(model, args, passes=[fxopt.passes.RepBatchNorm(steps=20_000)])
for batch in batches:                      # any loop with a torch.optim optimiser
loss(student(batch)).backward(); optimizer.step(); optimizer.zero_grad()
fast = fxopt.convert(student, batches)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from torch import Tensor, nn

from fxopt import backend, driver
from fxopt.errors import OptionError, PreparationError
from fxopt.example import check_args, kind_of
from fxopt.frontend.export import from_export
from fxopt.ir.program import Program
from fxopt.ir.site import Site
from fxopt.lowering.options import Options, read_options
from fxopt.report.report import PassSummary, Report
from fxopt.rewriter.passes import Pass
from fxopt.rewriter.progressive import Call, Preparation, Student, TrainablePass, progressive_modules
from fxopt.rewriter.registry import resolve_pass

#: The attribute under which a student carries what `convert` needs.
_RECORD: Final = "_fxopt_prepared"


@dataclass(frozen=True)
class Prepared:
    """What `prepare` did and was given.

    Attributes:
        report: every site of the kinds that the passes are about: exchanged, or kept with the reason.
        args: example positional arguments.
        kwargs: example keyword arguments.
        dynamic_shapes: which sizes are symbolic.
        like: an empty tensor on the device and in the precision that the model had.
    """

    report: Report
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    dynamic_shapes: Any
    like: Tensor


def prepare(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    passes: Sequence[str | Pass],
    dynamic_shapes: Any = None,
) -> nn.Module:
    """A copy of ``model`` in which trainable passes have exchanged modules; the model is not changed.

    The student is of the model's own class, takes the same arguments, and its parameters keep their names, beside new
    ones. It may be prepared again, by other passes for what is not exchanged yet. Train it as usual: what moves from
    step to step follows the ``torch.optim`` optimiser that holds its parameters, through gradient accumulation,
    activation checkpoints, ``torch.compile`` and ``DistributedDataParallel``; all of it is in the ``state_dict``.
    `prepared` gives the report, `fxopt.convert` ends the training.

    Args:
        model: the module to train.
        args: example positional arguments, of the sizes that the converted model will be called with.
        kwargs: example keyword arguments.
        passes: trainable passes, by instance.
        dynamic_shapes: which sizes are symbolic, as torch.export takes it.

    Raises:
        CaptureError: the model can't be captured as one graph.
        OptionError: a pass that is not trainable, or an option that does not fit the model.
        PreparationError: no pass found anything that it can exchange.
        UnknownPassError: a pass name that is not registered.
    """
    backend.check_torch()
    import fxopt.codegen.meanings  # noqa: F401 - canonical operators get their meaning before a pass makes one

    _check_model(model, args)
    chosen = [_trainable(resolve_pass(wanted)) for wanted in read_options({"passes": passes}).passes or ()]
    if not chosen:
        raise OptionError("passes is empty; give trainable passes such as fxopt.passes.RepBatchNorm(steps=20_000)")
    copied = copy.deepcopy(model)
    program, calls = _captured(copied, args, kwargs, dynamic_shapes)
    student = Student(copied, calls, program)
    done = [(current, current.prepare(student)) for current in chosen]
    report, earlier = _report(program, done), _earlier(copied)
    if not any(site.status == "rewritten" for site in report.sites):
        raise PreparationError(_nothing_done(model, chosen, report, earlier))
    report = _joined(report, earlier)
    parameters = list(copied.parameters())
    for module in progressive_modules(copied).values():
        module.companions = parameters
    setattr(copied, _RECORD, Prepared(report, args, dict(kwargs or {}), dynamic_shapes, kind_of(model)))
    return copied


def prepared(student: nn.Module) -> Prepared:
    """What `prepare` did to ``student``, wrapped (``torch.compile``, ``DistributedDataParallel``) or not.

    Raises:
        PreparationError: `prepare` did not make it.
    """
    record = getattr(unwrapped(student), _RECORD, None)
    if not isinstance(record, Prepared):
        raise PreparationError(
            f"{type(student).__name__} does not come from fxopt.prepare; prepare it, train it, convert"
        )
    return record


def advance(student: nn.Module) -> None:
    """Tell ``student`` that one optimiser step was taken: for training loops without a ``torch.optim.Optimizer``.

    Raises:
        PreparationError: `prepare` did not make it.
    """
    prepared(student)
    for module in progressive_modules(student).values():
        module.advance()


def unwrapped(student: nn.Module) -> nn.Module:
    """The module inside of ``torch.compile``'s and data-parallel wrappers."""
    while True:
        inner = getattr(student, "_orig_mod", None)
        if isinstance(student, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = student.module
        if not isinstance(inner, nn.Module):
            return student
        student = inner


def _check_model(model: nn.Module, args: tuple[Any, ...]) -> None:
    if not isinstance(model, nn.Module):
        raise OptionError(f"prepare takes an nn.Module, not {type(model).__name__}")
    check_args(args)


def _trainable(chosen: Pass) -> TrainablePass:
    if not isinstance(chosen, TrainablePass):
        raise OptionError(f"{chosen.name} is not a trainable pass; give it to fxopt.rewrite, or to fxopt.convert")
    return chosen


def _captured(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None, dynamic_shapes: Any
) -> tuple[Program, dict[str, tuple[Call, ...]]]:
    """The program of ``model`` in evaluation, and the calls of its submodules meanwhile."""
    calls: dict[str, list[Call]] = {}
    modes = {module: module.training for module in model.modules()}

    def follow(name: str) -> Callable[..., None]:
        def remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not name:
                calls.clear()
            calls.setdefault(name, []).append(Call(args, kwargs))

        return remember

    hooks = [m.register_forward_pre_hook(follow(name), with_kwargs=True) for name, m in model.named_modules()]
    try:
        program = from_export(model.eval(), args, kwargs, dynamic_shapes)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    return program, {name: tuple(found) for name, found in calls.items()}


def _report(program: Program, done: Sequence[tuple[TrainablePass, Preparation]]) -> Report:
    """What the passes did, and why every other site of their kinds is none for them."""
    told: dict[tuple[str, str], Site] = {}
    for _, preparation in done:
        for site in preparation.sites:
            if site.status == "rewritten" or _key(site) not in told:
                told[_key(site)] = site
    subjects = {current.kind: current.subject for current, _ in done}
    sites: dict[tuple[tuple[str, str], tuple[str, ...]], Site] = {}
    for site in Report.of(driver.rewrite(program, Options())).sites:
        if _key(site) in told:
            where = replace(site.source, module=told[_key(site)].source.module)
            sites[_key(site), ()] = replace(told[_key(site)], nodes=site.nodes, source=where)
        elif site.kind in subjects:
            reason = f"it is not {subjects[site.kind]}"
            sites[_key(site), site.nodes] = replace(site, status="kept", rule="", reason=reason)
    for key, site in told.items():
        sites.setdefault((key, ()), site)
    summaries = tuple(_summary(current, preparation) for current, preparation in done)
    notes = tuple(note for _, preparation in done for note in preparation.notes)
    return Report(tuple(sites.values()), summaries, notes=notes)


def _earlier(copied: nn.Module) -> dict[tuple[str, str], Site]:
    """The sites of modules that an earlier `prepare` has exchanged."""
    record = getattr(copied, _RECORD, None)
    sites = record.report.sites if isinstance(record, Prepared) else ()
    still = progressive_modules(copied)
    return {_key(site): site for site in sites if site.status == "rewritten" and site.source.module in still}


def _joined(report: Report, earlier: Mapping[tuple[str, str], Site]) -> Report:
    """``report`` with what an earlier `prepare` did, of which this one can only say that it is so."""
    own = tuple(site for site in report.sites if _key(site) not in earlier)
    return replace(report, sites=(*earlier.values(), *own))


def _key(site: Site) -> tuple[str, str]:
    """Kind and module; torch.export numbers the calls of one module after its first with ``@``."""
    return site.kind, site.source.module.partition("@")[0]


def _summary(current: TrainablePass, preparation: Preparation) -> PassSummary:
    rewrites = sum(site.status == "rewritten" for site in preparation.sites)
    return PassSummary(current.name, current.tier, rewrites, changed=bool(rewrites))


def _nothing_done(
    model: nn.Module, chosen: Sequence[TrainablePass], report: Report, earlier: Mapping[tuple[str, str], Site]
) -> str:
    kinds = {current.kind for current in chosen}
    reasons = [
        f"{site.source.module}: it is exchanged already, by {site.rule}"
        for site in earlier.values()
        if site.kind in kinds
    ]
    others = (site for site in report.sites if _key(site) not in earlier)
    reasons += [f"{site.source.module or type(model).__name__}: {site.reason}" for site in others]
    names = ", ".join(current.name for current in chosen)
    found = "; ".join(dict.fromkeys(reasons)) or f"it has no {' or '.join(c.kind for c in chosen)} at all"
    return f"{names} found nothing to exchange in {type(model).__name__}: {found}"
