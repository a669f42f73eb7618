"""A rewritten program as an ordinary nn.Module with the model's own parameter names."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from fxopt.errors import OptionError
from fxopt.example import kind_of
from fxopt.folded import Division, divide, is_transformed, renew, undivided, version
from fxopt.ir.nodes import is_tensor, tensor
from fxopt.ir.program import Program
from fxopt.report.report import Report

#: Captures a model in its present mode; what comes back makes the program, with weights that may be folded or not.
Build = Callable[[nn.Module], Callable[[bool], Program]]


@dataclass
class _Mode:
    """What runs in one mode: ``program``, divided if it has folded weights, and ``live`` for calls with gradients."""

    make: Callable[[bool], Program]
    program: Program
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
        self.form, self.out_spec = signature.form, signature.out_spec

    def with_gradients(self) -> Program:
        """The program without folded weights."""
        if self.live is None:
            self.live = self.program if self.division is None else self.make(False)
            self.live.generated()
        return self.live


class RewrittenModule(nn.Module):
    """A model after structural rewriting.

    It holds copies of the model's parameters and buffers under their original names, takes the same arguments and gives
    the same outputs. The graph depends on the mode (dropout, batch statistics): switching with `train` or `eval`
    rewrites the model for that mode at the next call; moving to another precision or device rewrites it at once, with
    example arguments moved likewise. Use it with ``state_dict``, ``.to()``, ``torch.compile``,
    ``torch.export``.

    Weights that a pass folded into others (evaluation mode only) are computed once, in buffers below ``folded_weights``
    that are no part of the state dict, and again when a weight that they are made of has changed. Code compiled by
    ``torch.compile`` reads the buffers as they are: `load_state_dict`, ``.to()``, `train` and `eval` renew them, after
    any other change of a weight `renew_folded_weights` does. A call that records gradients of such weights runs the
    program without folded weights, so that they reach the weights themselves; call under ``torch.no_grad()`` for speed.
    So does a call with weights in a functional transform (``torch.func.vmap`` over several models, ``jvp``).

    Attributes:
        report: what became of the model; only where `fxopt.convert` made this.
    """

    report: Report
    _model: nn.Module
    _build: Build
    _modes: dict[bool, _Mode]

    def __init__(self, model: nn.Module, build: Build) -> None:
        super().__init__()
        with torch.inference_mode(False):  # so that in-place changes of the copies are counted
            skeleton = copy.deepcopy(model)
        for name, child in skeleton.named_children():
            self.add_module(name, child)
        for name, parameter in skeleton.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in skeleton.named_buffers(recurse=False):
            self.register_buffer(name, buffer, persistent=name not in skeleton._non_persistent_buffers_set)
        self.training = model.training
        # Not registered: its parameters are this module's own, under this module's names.
        object.__setattr__(self, "_model", skeleton)
        object.__setattr__(self, "_build", build)
        object.__setattr__(self, "_modes", {})
        self.folded_weights = nn.Module()
        self.register_load_state_dict_post_hook(lambda module, keys: module.renew_folded_weights())  # type: ignore[no-untyped-call]
        self._start()
        self.renew_folded_weights()

    def program(self) -> Program:
        """The rewritten program that a call would run now: of the current mode, with or without folded weights."""
        mode = self._mode()
        return mode.with_gradients() if self._records_gradients(mode) else mode.program

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the rewritten program on the arguments of the original model.

        Raises:
            CaptureError: the arguments are others than it was rewritten for: in structure, in a number, string or flag,
                or in a size that is not symbolic.
        """
        mode = self._mode()
        inputs = iter(mode.form.flat(args, kwargs))
        operands = [next(inputs) if name is None else self._state(name) for name in mode.bound]
        if mode.division is None or self._records_gradients(mode):
            results = mode.with_gradients().module(*operands)
        else:
            results = mode.division.rest(*operands, *self._folded(mode.division))
        return pytree.tree_unflatten(results, mode.out_spec)

    def renew_folded_weights(self) -> None:
        """Compute the folded weights of the current mode anew if a weight that they are made of has changed."""
        mode = self._modes.get(self.training)
        if mode is None or mode.division is None:
            return
        sources = tuple(self._state(name) for name in mode.division.sources)
        versions = tuple(map(version, (*sources, *mode.division.constants)))
        if versions == mode.versions:
            return
        kept = self.folded_weights
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
            program = undivided(mode.program, mode.division, "folded_weights")
            self._modes[False] = _Mode(mode.make, program, None)
            self._drop(mode.division.sources, self._modes[False].bound)
            self.folded_weights._non_persistent_buffers_set.clear()
        self._modes[False].with_gradients()
        self._modes.pop(True, None)
        object.__setattr__(self, "_frozen", True)
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
        if mode and self.__dict__.get("_frozen"):
            raise OptionError("this module was frozen: its weights are folded for good; train the original")
        super().train(mode)
        if "_modes" in self.__dict__:
            self.renew_folded_weights()
        return self

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> RewrittenModule:
        before = kind_of(self)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        now = kind_of(self)
        if self.__dict__.get("_frozen"):
            _check_dtype(self._modes[False].program, before, now)
        elif (before.dtype, before.device) != (now.dtype, now.device):
            self._start()
        self.renew_folded_weights()
        return self

    def _start(self) -> None:
        """Rewrite the model for the mode, precision and device that it is in: a program has all three written into it,
        as dtypes that it casts to and devices that it makes constants on.
        """
        self._modes.clear()
        self.folded_weights._buffers.clear()
        self.folded_weights._non_persistent_buffers_set.clear()
        mode = self._mode()
        if mode.division is None or any(parameter.requires_grad for parameter in self.parameters()):
            mode.with_gradients()  # now, as a call may be traced

    def _mode(self) -> _Mode:
        modes = self._modes
        if self.training not in modes:
            self._share_state()
            with torch.random.fork_rng():
                make = self._build(self._model.train(self.training))
                program = make(not self.training)
            modes[self.training] = _Mode(make, program, divide(program))
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
        return [getattr(self.folded_weights, name) for name in division.names]

    def _state(self, target: str) -> torch.Tensor:
        value: Any = self
        for part in target.split("."):
            value = getattr(value, part)
        return value  # type: ignore[no-any-return]

    def _share_state(self) -> None:
        """Point the skeleton at this module's own top-level state, which ``.to()`` and loading may have replaced."""
        model = self._model
        model._parameters.update(self._parameters)
        model._buffers.update(self._buffers)
        model._modules.update({name: module for name, module in self._modules.items() if name in model._modules})


def _check_dtype(program: Program, before: torch.Tensor, now: torch.Tensor) -> None:
    """A frozen program moves to another precision if it names none."""
    if before.dtype != now.dtype and any(map(_names_dtype, program.graph.nodes)):
        raise OptionError(
            f"this module was frozen in {before.dtype}, which its program has written into it, and is now in "
            f"{now.dtype}: rewrite the model in that precision, then freeze it"
        )


def _names_dtype(node: Node) -> bool:
    if node.op == "get_attr":
        return is_tensor(node) and tensor(node).dtype.is_floating_point
    return re.search(r"float\d", str((node.args, node.kwargs))) is not None
