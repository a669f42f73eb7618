"""Exchanging the norms of a model: which are meant, which can be, and what a report says of each."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from fxopt.errors import OptionError
from fxopt.ir.site import Site, Source
from fxopt.passes.norm.recognise import NormModule, may_be_norm, recognise
from fxopt.passes.norm.running import RunningNorm
from fxopt.passes.norm.token_mask import MaskCloser, MaskReader, TokenMask
from fxopt.rewriter.progressive import Call, Preparation, Progressive, Student, exchange, inlining
from fxopt.rewriter.settings import check_texts

#: The argument that a mask of tokens usually is.
USUAL_MASK = "attention_mask"
#: Why a norm is kept that did not run while the model was captured.
_IDLE = (
    "it does not run when the model is called with the example arguments in evaluation, so what it would become is "
    "used nowhere; in training it runs as it is"
)
#: Makes the progressive module for an original, its meaning, the model's mask, and a tensor of the dtype and device
#: that new parameters get.
Build = Callable[[nn.Module, NormModule, TokenMask, Tensor], Progressive]


@dataclass(frozen=True)
class Swap:
    """How a pass exchanges norms: its name, its selection, its mask argument, and the module it makes."""

    rule: str
    select: tuple[str, ...]
    mask: str | None
    build: Build


def swap_norms(student: Student, swap: Swap) -> Preparation:
    """Exchange every selected norm of the student that can be.

    Raises:
        OptionError: a pattern of ``select`` fits no norm, or the model's forward has no argument ``mask``.
    """
    mask = TokenMask()
    reader = _reader(student, swap.mask, mask)
    found = _find(student)
    _check_patterns(swap.select, list(found))
    sites = [_treat(student, name, meaning, swap, mask) for name, meaning in found.items()]
    if any(site.status == "rewritten" for site in sites):
        _leave_nested(student.model)
        if reader is not None:
            student.model.register_forward_pre_hook(reader, with_kwargs=True)
            student.model.register_forward_hook(MaskCloser(mask), always_call=True)
    return Preparation(tuple(sites))


def _leave_nested(model: nn.Module) -> None:
    """Encoders that pack padded tokens into nested tensors do so for layers that compute their own norms."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def _find(student: Student) -> dict[str, NormModule | str]:
    """The meaning of every module that holds a norm, or why it can't be exchanged, in the order of their calls."""
    found: dict[str, NormModule | str] = {}
    others: set[tuple[object, ...]] = set()
    for name, calls in (*student.calls.items(), *_never_called(student)):
        module = student.model.get_submodule(name)
        if isinstance(module, RunningNorm):
            found[name] = f"it is exchanged already, for {module}"
        likeness = _likeness(module, calls)
        if likeness in others or isinstance(module, Progressive) or not may_be_norm(module, calls):
            continue
        meaning = recognise(module, calls)
        if meaning is None:
            others.add(likeness)
        else:
            found[name] = meaning if name in student.calls else _IDLE
    return found


def _never_called(student: Student) -> Iterator[tuple[str, tuple[Call, ...]]]:
    """Modules that did not run while the model was captured, with a call that they could have if they are norms."""
    for name, module in student.model.named_modules():
        parameters = list(module.parameters())
        own = parameters[0].shape if parameters and all(p.dim() == 1 for p in parameters) else ()
        sizes = getattr(module, "normalized_shape", own)
        if name in student.calls or not sizes or inlining(student.model, name) is not None:
            continue
        like = next(iter(parameters), torch.empty(0))
        if like.is_floating_point():
            yield name, (Call((like.new_zeros(3, 3, *sizes),), {}),)


def _likeness(module: nn.Module, calls: tuple[Call, ...]) -> tuple[object, ...]:
    """Modules that share this are all norms, or none of them is."""
    held = tuple((name, parameter.dim()) for name, parameter in module.named_parameters())
    ranks = tuple(getattr(arg, "ndim", None) for arg in calls[0].args) if calls else ()
    choices = tuple(item for item in vars(module).items() if isinstance(item[1], str | bool) and item[0] != "training")
    return (type(module), held, ranks, choices)


def _treat(student: Student, name: str, meaning: NormModule | str, swap: Swap, mask: TokenMask) -> Site:
    if isinstance(meaning, str):
        return Site("norm", "kept", swap.rule, meaning, Source(module=name))
    place = Source(meaning.where, module=name)
    if not name:
        return Site("norm", "kept", swap.rule, "the model itself is the norm; prepare what holds it", place)
    around = inlining(student.model, name)
    if around is not None:
        reason = f"it is a part of the graph that runs in the place of {around}; give this pass before the other one"
        return Site("norm", "kept", swap.rule, reason, place)
    if not any(fnmatchcase(name, pattern) for pattern in swap.select):
        return Site("norm", "kept", swap.rule, f"select={list(swap.select)} leaves it out", place)
    old = student.model.get_submodule(name)
    x = student.calls[name][0].args[0]
    like = torch.empty(0, dtype=x.dtype, device=x.device) if meaning.weight is None else getattr(old, meaning.weight)
    new = swap.build(old, meaning, mask, like).train(old.training)
    exchange(student.model, old, new)
    return Site("norm", "rewritten", swap.rule, f"{meaning.kind} -> {new}", place)


def _check_patterns(patterns: tuple[str, ...], names: list[str]) -> None:
    for pattern in patterns:
        if pattern != "*" and not any(fnmatchcase(name, pattern) for name in names):
            raise OptionError(f"select={pattern!r} fits no norm; the norms are: {', '.join(names) or 'none'}")


def _reader(student: Student, wanted: str | None, mask: TokenMask) -> MaskReader | None:
    """What reads the mask; ``None`` where no mask is wanted, or the usual one does not exist."""
    arguments = inspect.signature(student.model.forward).parameters
    if wanted is None or (wanted == USUAL_MASK and wanted not in arguments):
        return None
    if wanted not in arguments:
        has = ", ".join(arguments) or "none"
        raise OptionError(f"mask={wanted!r} is no argument of the model's forward, which has: {has}")
    by_name_only = arguments[wanted].kind is inspect.Parameter.KEYWORD_ONLY
    return MaskReader(wanted, None if by_name_only else list(arguments).index(wanted), mask)


def check_selection(select: object, mask: object) -> None:
    """Which norms and which mask, as users give them.

    Raises:
        OptionError: they are not texts.
    """
    check_texts("select", select, "a name or pattern of names")
    if mask is not None and not isinstance(mask, str):
        raise OptionError(
            f"mask={mask!r} is not possible; give the name of an argument of the model's forward, or None"
        )


def read_patterns(select: str | tuple[str, ...]) -> tuple[str, ...]:
    """``select`` as a tuple of patterns."""
    return (select,) if isinstance(select, str) else tuple(select)
