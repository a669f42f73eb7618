"""A rewritten program as an ordinary nn.Module with the model's own parameter names."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from fxopt.calling import CallForm
from fxopt.errors import OptionError
from fxopt.example import kind_of
from fxopt.folded import Division, divide, is_transformed, renew, undivided
from fxopt.ir.held import version
from fxopt.ir.nodes import is_tensor, tensor
from fxopt.ir.program import Program
from fxopt.report.report import Report
from fxopt.rewriter.pipeline import PipelineResult


@dataclass(frozen=True)
class Captured:
    """A model captured in one mode: the calls it serves, and what rewrites it, with folded weights or without."""

    form: CallForm
    make: Callable[[bool], PipelineResult]


#: Captures a model as it is now: in its present mode, dtype and place.
Build = Callable[[nn.Module], Captured]


@dataclass
class _Mode:
    """What runs in one mode: ``program``, divided if it has folded weights, and ``live`` for calls with gradients."""

    captured: Captured
    program: Program
    report: Report
    division: Division | None
    live: Program | None = None
    versions: tuple[Any, ...] = ()
    #: What `versions` are those of: alive, so that nothing new is taken for it.
    sources: tuple[torch.Tensor, ...] = ()

    def __post_init__(self) -> None:
        signature = self.program.signature
        assert signature is not None
        #: For each input of the program the parameter or buffer that it is, or ``None`` for an argument of the call.
        inputs = self.program.graph.find_nodes(op="placeholder")
        self.bound = [signature.bound.get(node.name) for node in inputs]
        places = iter(range(len(inputs)))
        #: The same, with the place of the argument among those of the call.
        self.operands = [next(places) if name is None else name for name in self.bound]
        self.form = self.captured.form

    def with_gradients(self) -> Program:
        """The program without folded weights."""
        if self.live is None:
            self.live = self.program if self.division is None else self.captured.make(False).program
            self.live.generated()
        return self.live


class RewrittenModule(nn.Module):
    """A model after structural rewriting.

    It holds copies of the model's parameters and buffers under their original names, takes the same arguments and gives
    the same outputs. The graph depends on the mode (dropout, batch statistics): switching with `train` or `eval`
    rewrites the model for that mode at the next call, and ``.to()``, ``.half()`` and the like at once. Use it with
    ``state_dict``, ``torch.compile``, ``torch.export``, ``torch.save``.

    It serves the calls that it was rewritten for: tensors of those dtypes and sizes (``dynamic_shapes`` says which
    sizes may differ), and everything that is no tensor as it was. Another call raises `CallError`: the graph would
    give something else.

    Weights that a pass folded into others (evaluation mode only) are computed once, in buffers below ``folded_weights``
    that are no part of the state dict, and again when a weight that they are made of has changed. Code compiled by
    ``torch.compile`` reads the buffers as they are: `load_state_dict`, ``.to()``, `train` and `eval` renew them, after
    any other change of a weight `renew_folded_weights` does. A call that records gradients of such weights runs the
    program without folded weights, so that they reach the weights themselves; call under ``torch.no_grad()`` for speed.
    So does a call with weights in a functional transform (``torch.func.vmap`` over several models, ``jvp``).
    """

    folded_weights: nn.Module
    _model: nn.Module
    _frozen = False

    def __init__(self, model: nn.Module, build: Build) -> None:
        super().__init__()
        with torch.inference_mode(False):  # so that in-place changes of the copies are counted
            skeleton = copy.deepcopy(model)
        # Under all their names, which `named_children` would leave out, and whatever these are.
        self._modules.update(skeleton._modules)
        self._parameters.update(skeleton._parameters)
        self._buffers.update(skeleton._buffers)
        self._non_persistent_buffers_set.update(skeleton._non_persistent_buffers_set)
        self.training = model.training
        # Not registered: its parameters are this module's own, under this module's names.
        object.__setattr__(self, "_model", skeleton)
        self._build, self._kind = build, kind_of(model)
        self._modes: dict[bool, _Mode] = {}
        self._told: Report | None = None
        self._folder = next(n for i in range(len(self._modules) + 1) if (n := _folder(i)) not in self._modules)
        self._modules[self._folder] = nn.Module()
        self.register_load_state_dict_post_hook(_renew)  # type: ignore[no-untyped-call]
        self._prepare()

    @property
    def report(self) -> Report:
        """What the passes did with the model in its current mode: every site rewritten, or kept with the reason."""
        return self._told if self._told is not None else self._mode().report

    @report.setter
    def report(self, report: Report) -> None:
        self._told = report

    def program(self) -> Program:
        """The rewritten program that a call would run now: of the current mode, with or without folded weights."""
        mode = self._mode()
        return mode.with_gradients() if self._records_gradients(mode) else mode.program

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the rewritten program on the arguments of the original model.

        Raises:
            CallError: the program is not that of this call.
        """
        mode = self._mode()
        given = mode.form.flat(args, kwargs)
        operands = [given[place] if isinstance(place, int) else self._state(place) for place in mode.operands]
        if mode.division is None or self._records_gradients(mode):
            results = mode.with_gradients().module(*operands)
        else:
            results = mode.division.rest(*operands, *self._folded(mode.division))
        assert mode.program.signature is not None
        return pytree.tree_unflatten(results, mode.program.signature.out_spec)

    def _prepare(self) -> None:
        """Make what a call needs now, as a call may be traced."""
        mode = self._mode()
        if mode.division is None or any(parameter.requires_grad for parameter in self.parameters()):
            mode.with_gradients()
        self.renew_folded_weights()

    def renew_folded_weights(self) -> None:
        """Compute the folded weights of the current mode anew if a weight that they are made of has changed."""
        mode = self._modes.get(self.training)
        if mode is None or mode.division is None:
            return
        sources = tuple(self._state(name) for name in mode.division.sources)
        versions = tuple(map(version, (*sources, *mode.division.constants)))
        if versions == mode.versions:
            return
        kept = self._modules[self._folder]
        assert kept is not None
        before = [getattr(kept, name, None) for name in mode.division.names]
        with torch.inference_mode(False), torch.no_grad():
            values = renew(before, mode.division.prologue(*(source.detach() for source in sources)))
        for name, value in zip(mode.division.names, values, strict=True):
            kept.register_buffer(name, value, persistent=False)
        mode.versions, mode.sources = versions, sources

    def freeze(self) -> RewrittenModule:
        """Give up the weights that only folded ones are made of: they take no memory any more. For deployment.

        The folded weights join the ``state_dict`` in their place. The module can't be trained any more, nor load a
        checkpoint of the original. Returns the module itself.

        Raises:
            OptionError: the module is in training mode.
        """
        if self.training:
            raise OptionError("freeze() keeps the weights of the evaluation mode only; call eval() before")
        mode = self._mode()
        if mode.division is not None:
            self.renew_folded_weights()
            program = undivided(mode.program, mode.division, self._folder)
            self._modes[False] = replace(mode, program=program, division=None, live=None)
            self._drop(mode.division.sources, self._modes[False].bound)
            self.get_submodule(self._folder)._non_persistent_buffers_set.clear()
        self._modes[False].with_gradients()
        self._modes.pop(True, None)
        self._frozen = True
        return self

    def _drop(self, sources: tuple[str, ...], kept: list[str | None]) -> None:
        """Remove the parameters and buffers ``sources``, under all their names, but for those that are ``kept``."""
        needed = {id(self._state(name)) for name in kept if name is not None}
        dropped = {id(self._state(name)) for name in sources} - needed
        for module in (*self.modules(), *self._model.modules()):
            for state in (module._parameters, module._buffers):
                state.update({name: None for name, value in state.items() if id(value) in dropped})

    def train(self, mode: bool = True) -> RewrittenModule:
        """As of any module; see the class for what it does to folded weights.

        Raises:
            OptionError: the module was frozen.
        """
        if mode and self._frozen:
            raise OptionError("this module was frozen: its weights are folded for good; train the original")
        super().train(mode)
        self.renew_folded_weights()
        return self

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> RewrittenModule:
        places = _places(self)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        before, self._kind = self._kind, kind_of(self)
        if self._frozen:
            mode = self._modes[False]
            _check_dtype(mode.program, before.dtype, self._kind.dtype)
            mode.form = mode.form.of_dtype(before.dtype, self._kind.dtype)
        elif places != _places(self):
            self._modes.clear()  # a graph may name the dtype and the place of what it makes
            self._modules[self._folder] = nn.Module()  # in the new precision other weights may be folded, or none
            self._prepare()
        self.renew_folded_weights()
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> RewrittenModule:
        """A copy that need not be rewritten again, as what was unpickled must be."""
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def __getstate__(self) -> dict[str, Any]:
        if self._frozen:
            raise OptionError("a frozen module can't be pickled; save its state_dict(), or torch.export.export() of it")
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return {**state, "_modes": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._prepare()

    def _mode(self) -> _Mode:
        modes = self._modes
        if self.training not in modes:
            self._share_state()
            with torch.random.fork_rng():
                captured = self._build(self._model.train(self.training))
                result = captured.make(not self.training)
            program = result.program
            modes[self.training] = _Mode(captured, program, Report.of(result), divide(program))
        return modes[self.training]

    def _records_gradients(self, mode: _Mode) -> bool:
        if mode.division is None:
            return False
        sources = [self._state(name) for name in mode.division.sources]
        recorded = torch.is_grad_enabled() and any(source.requires_grad for source in sources)
        return recorded or any(map(is_transformed, sources))

    def _folded(self, division: Division) -> list[torch.Tensor]:
        if not torch.compiler.is_compiling():
            self.renew_folded_weights()
        return [self._state(f"{self._folder}.{name}") for name in division.names]

    def _state(self, target: str) -> torch.Tensor:
        """The parameter or buffer ``target``; not by attributes, of which this class has some that a model may have."""
        *path, name = target.split(".")
        owner: Any = self
        for part in path:
            owner = owner._modules[part]
        found: torch.Tensor = owner._parameters[name] if name in owner._parameters else owner._buffers[name]
        return found

    def _share_state(self) -> None:
        """Point the skeleton at this module's own top-level state, which ``.to()`` and loading may have replaced."""
        model = self._model
        model._parameters.update(self._parameters)
        model._buffers.update(self._buffers)
        model._modules.update({name: module for name, module in self._modules.items() if name in model._modules})


def _folder(number: int) -> str:
    return f"folded_weights_{number}" if number else "folded_weights"


def _places(module: nn.Module) -> list[tuple[torch.dtype, torch.device]]:
    """What a program may name of its state."""
    return [(state.dtype, state.device) for state in (*module.parameters(), *module.buffers())]


def _renew(module: RewrittenModule, keys: Any) -> None:
    module.renew_folded_weights()


def _check_dtype(program: Program, before: torch.dtype, now: torch.dtype) -> None:
    """A frozen program moves to another precision if it names none."""
    if before != now and any(map(_names_dtype, program.graph.nodes)):
        raise OptionError(
            f"this module was frozen in {before}, which its program has written into it, and is now in {now}: rewrite "
            "the model in that precision, then freeze it"
        )


def _names_dtype(node: Node) -> bool:
    if node.op == "get_attr":
        return is_tensor(node) and tensor(node).dtype.is_floating_point
    return re.search(r"float\d", str((node.args, node.kwargs))) is not None
