"""A rewritten program as an ordinary nn.Module with the model's own parameter names."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxopt.errors import CaptureError
from fxopt.ir.program import Program
from fxopt.report.report import Report


class RewrittenModule(nn.Module):
    """A model after structural rewriting.

    It holds copies of the model's parameters and buffers under their original names, takes the same arguments and gives
    the same outputs. The graph depends on the mode (dropout, batch statistics): switching with `train` or `eval`
    rewrites the model for that mode at the next call. Use it with ``state_dict``, ``.to()``, ``torch.compile``,
    ``torch.export``.

    Attributes:
        report: what became of the model; only where `fxopt.convert` made this.
    """

    report: Report

    def __init__(self, model: nn.Module, build: Callable[[nn.Module], Program]) -> None:
        super().__init__()
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
        object.__setattr__(self, "_programs", {})
        self.program()

    def program(self) -> Program:
        """The rewritten program of the current mode."""
        programs: dict[bool, Program] = self._programs  # type: ignore[assignment]
        if self.training not in programs:
            self._share_state()
            with torch.random.fork_rng():
                programs[self.training] = self._build(self._model.train(self.training))  # type: ignore[operator,union-attr]
        return programs[self.training]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the rewritten program on the arguments of the original model."""
        program = self.program()
        signature = program.signature
        assert signature is not None
        flat, spec = pytree.tree_flatten((args, kwargs))
        if spec != signature.in_spec:
            raise CaptureError(
                f"this module was rewritten for arguments of the structure {signature.in_spec}, called with {spec}; "
                "call it as in rewrite(), or rewrite it for this call"
            )
        state = {name: self._state(target) for name, target in signature.bound.items()}
        inputs = iter(flat)
        operands = [
            state[node.name] if node.name in state else next(inputs)
            for node in program.graph.find_nodes(op="placeholder")
        ]
        return pytree.tree_unflatten(program.module(*operands), signature.out_spec)

    def _state(self, target: str) -> torch.Tensor:
        value: Any = self
        for part in target.split("."):
            value = getattr(value, part)
        return value  # type: ignore[no-any-return]

    def _share_state(self) -> None:
        """Point the skeleton at this module's own top-level state, which ``.to()`` and loading may have replaced."""
        model: nn.Module = self._model  # type: ignore[assignment]
        model._parameters.update(self._parameters)
        model._buffers.update(self._buffers)
        model._modules.update({name: module for name, module in self._modules.items() if name in model._modules})
