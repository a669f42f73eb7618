"""The end of training: statistics refreshed, progressive modules in their plain forms, folded, verified."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from fxopt import driver
from fxopt.api import capture, rewrite
from fxopt.errors import FxoptWarning, VerificationError
from fxopt.example import kind_of, moved
from fxopt.ir.nodes import source
from fxopt.ir.program import Program
from fxopt.ir.site import Site, Source
from fxopt.lowering.options import Options, read_options
from fxopt.recalibration import check_data, recalibrate
from fxopt.report.report import Report
from fxopt.rewriter.passes import Pass
from fxopt.rewriter.progressive import Progressive, exchange, progressive_modules, unhook
from fxopt.rewritten import RewrittenModule
from fxopt.testing.oracle import double_precision, oracle, upcast
from fxopt.training import Prepared, prepared, unwrapped

#: Largest difference of the converted model from the student in float64, relative to the largest value of a result.
_TOLERANCE: Final = 1e-9
#: How many modules a warning or a note names.
_NAMED: Final = 5


def convert(
    student: nn.Module,
    data: Iterable[Any] | None = None,
    *,
    passes: Sequence[str | Pass] | None = None,
    verify: bool = True,
    strict: bool = False,
) -> RewrittenModule:
    """The trained student as an ordinary fast model: statistics, plain forms, folds, and the other exact passes.

    ``data`` refreshes running statistics first, with the weights as they are: dropout and the last steps of training
    have moved what they describe. The statistics are those of all its tokens together, and of this process alone where
    there are several. Then each progressive module gives way to the plain form that it has in evaluation, computed in
    float64 and rounded once, and the exact passes fold that into its neighbours where they can. The student is not
    changed.

    Names of parameters are the model's, but in the place of each exchanged norm stand ``weight`` and ``bias`` of
    ``x * weight + bias``, under the norm's name: new ones where it had none (an RMSNorm has no bias), and other numbers
    where it had; parameters that it called otherwise are gone. Such a ``state_dict`` belongs into a converted model:
    the original one would load it, where the names are the same, and compute something else with it.

    Args:
        student: what `fxopt.prepare` made, wrapped (``torch.compile``, ``DistributedDataParallel``) or not.
        data: calls of the model to take statistics from: a tuple or list holds positional arguments, a mapping keyword
            arguments, anything else is the only argument (so give the inputs alone of batches with labels). ``None``:
            the running statistics of training stay.
        passes: names or instances of the passes to run; ``None`` for the exact pipeline.
        verify: whether to compare the result with the student in float64, on the example arguments; it takes copies of
            the model in that precision.
        strict: raise where a pass fails, instead of leaving it out and saying so.

    Returns:
        A module in evaluation mode; its ``report`` lists what was folded, and what stayed and why.

    Raises:
        CaptureError: the student can't be captured as one graph.
        OptionError: an option of the wrong kind, or ``data`` that is a call itself, that does not fit the model's
            forward, or that gives statistics which are not finite.
        PassError: with ``strict``, a pass failed.
        PreparationError: `fxopt.prepare` did not make ``student``, or ``data`` is empty.
        UnknownPassError: a pass name that is not registered.
        VerificationError: the converted model differs from the student by more than rounding in float64.
    """
    options = read_options({"strict": strict, **({} if passes is None else {"passes": passes})})
    check_data(data)
    record = prepared(student)
    trained = copy.deepcopy(unwrapped(student)).eval()
    _say_unfinished(trained)
    if data is not None:
        recalibrate(trained, data)
    _say_untouched(trained)
    example = _as_now(record, trained)
    converted = _rewritten(_plain(trained), example, options)
    converted.report = _report(_plain(trained), example, options, progressive_modules(trained))
    if verify:
        _verify(trained, example, options)
    return converted


def _as_now(record: Prepared, trained: nn.Module) -> Prepared:
    """The example arguments on the device, and in the precision, that the student was moved to since."""
    args, kwargs = moved((record.args, dict(record.kwargs)), record.like, kind_of(trained))
    return replace(record, args=args, kwargs=kwargs)


def _say_unfinished(trained: nn.Module) -> None:
    left = max((module.remaining() for module in progressive_modules(trained).values()), default=0.0)
    if left > 0:
        warnings.warn(
            f"the student is converted before its schedule ended: {left:.3g} of what it computes in training still "
            "comes from the original modules, none of what the converted model computes does. Train it to the end, or "
            "prepare it with fewer steps; if it was trained without a torch.optim optimiser, call fxopt.advance",
            FxoptWarning,
            stacklevel=3,
        )


def _say_untouched(trained: nn.Module) -> None:
    names = [name for name, module in progressive_modules(trained).items() if module.untouched()]
    if names:
        warnings.warn(
            f"{_listed(names)}: the statistics are still those that the module was made with, so what it computes in "
            "evaluation is not what was trained. Give convert data to take them from, or train with a torch.optim "
            "optimiser that holds the module's parameters, or call fxopt.advance after each step",
            FxoptWarning,
            stacklevel=3,
        )


def _plain(trained: nn.Module) -> nn.Module:
    """A copy with every progressive module in the form that it ends in."""
    plain = copy.deepcopy(trained)
    for module in progressive_modules(plain).values():
        exchange(plain, module, module.converted())
    unhook(plain)
    return plain


def _rewritten(plain: nn.Module, example: Prepared, options: Options) -> RewrittenModule:
    return rewrite(
        plain,
        example.args,
        example.kwargs,
        passes=options.passes,
        dynamic_shapes=example.dynamic_shapes,
        strict=options.strict,
    )


def _report(plain: nn.Module, example: Prepared, options: Options, exchanged: Mapping[str, Progressive]) -> Report:
    """What the passes do with the plain model, and of every exchanged norm whether something of it is left."""
    program = capture(plain, example.args, example.kwargs, example.dynamic_shapes)
    result = driver.rewrite(program, options)
    report = Report.of(result)
    told = {site.source.module for site in report.sites if site.status == "kept"}
    misses = (miss.site for miss in result.near_misses if miss.site is not None)
    refused = {site.source.module: site for site in misses if site.kind == "norm"}
    names = [name for name, module in exchanged.items() if module.folds]
    written = {node for site in report.sites if site.status == "rewritten" for node in site.nodes}
    left = (site for site in _left_over(result.program, names, written, refused) if site.source.module not in told)
    before = (site for site in example.report.sites if site.source.module in exchanged)
    lines = {(site.kind, site.source.module): site.source for site in before}
    # What took the place of a module was written here; the line to show is the one that was exchanged.
    sites = (*report.sites, *left)
    sites = tuple(replace(s, source=lines.get((s.kind, s.source.module), s.source)) for s in sites)
    return replace(report, sites=sites, notes=(*report.notes, *_names(names)))


def _names(exchanged: Sequence[str]) -> Iterator[str]:
    """What the names of parameters mean now."""
    if exchanged:
        yield (
            f"weight and bias of {_listed(exchanged)} are those of x * weight + bias now: load this state_dict into "
            "converted models only, the original one would compute something else with it"
        )


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _left_over(
    program: Program, names: Sequence[str], written: Collection[str], refused: Mapping[str, Site]
) -> Iterator[Site]:
    """A site for each of the modules ``names`` of which something still works on activations that no fold has
    ``written`` (as a transposition), with the reason why its fold was ``refused``, if one was tried.
    """
    bound = program.signature.bound if program.signature is not None else {}
    moving: set[Node] = set()
    left: dict[str, list[Node]] = {name: [] for name in names}
    for node in program.graph.nodes:
        is_input = node.op == "placeholder" and node.name not in bound
        if not is_input and moving.isdisjoint(node.all_input_nodes):
            continue
        moving.add(node)
        if node.name not in written:
            left.get(source(node).module, []).append(node)
    for name, nodes in left.items():
        if not nodes:
            continue
        members, told = tuple(node.name for node in nodes), refused.get(name)
        if told is not None:
            yield replace(told, nodes=tuple(dict.fromkeys((*members, *told.nodes))))
            continue
        where = Source(source(nodes[0]).location, module=name)
        reason = "it stays as x * weight + bias: no pass folded it into what stands before or behind it"
        yield Site("norm", "kept", "", reason, where, members)


def _verify(trained: nn.Module, example: Prepared, options: Options) -> None:
    """Compare the folded model with the unfolded student, both in float64 from end to end."""
    args, kwargs = upcast((example.args, dict(example.kwargs)))
    reference = oracle(trained, *args, **kwargs)
    wide = _rewritten(_plain(copy.deepcopy(trained).double()), replace(example, args=args, kwargs=kwargs), options)
    with torch.no_grad(), double_precision():
        actual = wide(*args, **kwargs)
    for expected, found in zip(pytree.tree_leaves(reference), pytree.tree_leaves(actual), strict=True):
        _compare(expected, found)


def _compare(expected: Any, found: Any) -> None:
    if not isinstance(expected, Tensor) or not expected.is_floating_point() or not expected.numel():
        return
    size = float(expected.abs().nan_to_num(0.0).max())
    error = float((found - expected).abs().nan_to_num(0.0).max())
    same_places = torch.equal(found.isfinite(), expected.isfinite())
    if not same_places or not error <= _TOLERANCE * size:
        raise VerificationError(
            f"the converted model differs from the student in float64 by {error:.3g} where its largest value is "
            f"{size:.3g}; a fold is wrong. passes=[…] leaves passes out, verify=False takes the result as it is"
        )
