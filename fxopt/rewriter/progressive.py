"""What trainable passes put into a model: modules that change from one optimiser step to the next, and their clock.

A progressive module's forward reads its state and never moves it. State moves in `Progressive.advance`, which runs
after each step of the optimiser that owns the module's `Progressive.clock` (while that is frozen, of the one that owns
the first parameter of the student that is not): a hook that PyTorch calls for every ``torch.optim.Optimizer`` does
that. Gradient accumulation, recomputed activations and steps that a gradient scaler skips therefore count as what they
are, and a compiled forward holds no counter.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from fxopt.errors import OptionError
from fxopt.ir.program import Program
from fxopt.ir.site import Site
from fxopt.rewriter.passes import Pass, PassResult

_LIVE: Final[weakref.WeakSet[Progressive]] = weakref.WeakSet()
#: Optimisers in the middle of a step, with the modules that moved on meanwhile: one optimiser may hold another.
_STEPPING: Final[weakref.WeakKeyDictionary[Optimizer, set[int]]] = weakref.WeakKeyDictionary()
_HOOKS: Final[list[Any]] = []


class Progressive(nn.Module):
    """A module between the original and what will be left of it after training.

    Subclasses keep in buffers all that `advance` moves, so that a checkpoint holds it.

    Attributes:
        folds: whether what it ends in can be folded into its neighbours, so that a report says where something stays.
        inlined: whether it runs its submodules as one captured graph, so that nothing can be exchanged inside.
        companions: the parameters of the whole student.
    """

    folds: ClassVar[bool] = True
    inlined: ClassVar[bool] = False

    companions: list[nn.Parameter]

    def __init__(self) -> None:
        super().__init__()
        self.companions = []
        _follow(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copies and unpickled modules follow their own optimiser."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _follow(self)

    def clock(self) -> Tensor:
        """The parameter whose optimiser drives this module, unless it is frozen."""
        raise NotImplementedError

    def driver(self) -> Tensor:
        """The parameter whose optimiser drives this module now: its clock, or while that is frozen another one."""
        clock = self.clock()
        if clock.requires_grad:
            return clock
        return next((parameter for parameter in self.companions if parameter.requires_grad), clock)

    def advance(self) -> None:
        """Move on by one optimiser step."""
        raise NotImplementedError

    def remaining(self) -> float:
        """The share of the original in what the module computes in training: 1 at first, 0 in the end."""
        raise NotImplementedError

    def untouched(self) -> bool:
        """Whether it has statistics that are as they were made: no step, and no data, has moved them."""
        return False

    def batches(self) -> int | None:
        """How many batches its statistics are to be gathered from at most; ``None``: from all there are."""
        return None

    def gather(self, active: bool) -> None:
        """Start, or end, replacing statistics by those of the inputs seen meanwhile (nothing without statistics)."""

    def is_finite(self) -> bool:
        """Whether the statistics gathered so far are finite."""
        return True

    def converted(self) -> nn.Module:
        """An ordinary module that computes what this one does in evaluation."""
        raise NotImplementedError


class StudentHook:
    """Base of the forward hooks and pre-hooks that a trainable pass puts on the whole model; see `unhook`."""


@dataclass
class Call:
    """One call of a submodule while the model was captured: its positional arguments, and those by name."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass
class Student:
    """The copy of a model that trainable passes edit.

    Attributes:
        model: the copy; passes exchange its submodules in place.
        calls: every call of a submodule during the capture, by the module's name.
        program: what was captured, of the model as it was given, in evaluation.
    """

    model: nn.Module
    calls: Mapping[str, tuple[Call, ...]]
    program: Program


@dataclass(frozen=True)
class Preparation:
    """What one trainable pass did to a student: a site for each module that it exchanged or looked at and kept."""

    sites: tuple[Site, ...] = ()
    notes: tuple[str, ...] = ()


@runtime_checkable
class TrainablePass(Pass, Protocol):
    """A pass of the tier ``trainable``: `prepare` exchanges modules for progressive ones; training does the rest."""

    @property
    def kind(self) -> str:
        """The kind of site that it is about."""
        ...

    @property
    def subject(self) -> str:
        """What it can exchange, as a phrase for reports."""
        ...

    def prepare(self, student: Student) -> Preparation:
        """Exchange modules of ``student.model`` in place."""
        ...


class Trainable:
    """What passes of the tier ``trainable`` share; a `TrainablePass` may derive from it."""

    name: ClassVar[str]

    def run(self, program: Program) -> PassResult:
        """A graph alone can't be trained.

        Raises:
            OptionError: always.
        """
        raise OptionError(f"{self.name} is a trainable pass: give it to fxopt.prepare, train, then fxopt.convert")


def exchange(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``model`` holds ``old``."""
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


def unhook(model: nn.Module) -> None:
    """Take the hooks of trainable passes off the whole model: they end with the training."""
    before, after = model._forward_pre_hooks_with_kwargs, model._forward_hooks_with_kwargs
    kinds = ((model._forward_pre_hooks, (before,)), (model._forward_hooks, (after, model._forward_hooks_always_called)))
    for hooks, options in kinds:
        for key in [key for key, hook in hooks.items() if isinstance(hook, StudentHook)]:
            for held in (hooks, *options):
                held.pop(key, None)


def inlining(model: nn.Module, name: str) -> str | None:
    """The name of the module around ``name`` that runs it as a part of one captured graph, if there is one."""
    parts = name.split(".")
    above = (".".join(parts[:count]) for count in range(1, len(parts)))
    modules = ((path, model.get_submodule(path)) for path in above)
    return next((path for path, m in modules if isinstance(m, Progressive) and m.inlined), None)


def progressive_modules(model: nn.Module) -> dict[str, Progressive]:
    """The progressive modules of ``model`` by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Progressive)}


def _follow(module: Progressive) -> None:
    if not _HOOKS:
        # Not compiled: they run as they are inside a compiled ``optimizer.step`` too.
        _HOOKS.append(register_optimizer_step_pre_hook(torch.compiler.disable(_before_step)))
        _HOOKS.append(register_optimizer_step_post_hook(torch.compiler.disable(_after_step)))
    _LIVE.add(module)


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    _STEPPING[optimizer] = set()


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    moved = _STEPPING.pop(optimizer, set())
    if _skipped(optimizer):
        return
    owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]} if _LIVE else set()
    for module in list(_LIVE):
        if id(module.driver()) not in owned or id(module) in moved:
            continue
        module.advance()
        for others in _STEPPING.values():
            others.add(id(module))


def _skipped(optimizer: Optimizer) -> bool:
    """Whether a fused optimiser, which a gradient scaler tells of infinite gradients, left its parameters alone."""
    found = getattr(optimizer, "found_inf", None)
    return isinstance(found, Tensor) and bool(found)
