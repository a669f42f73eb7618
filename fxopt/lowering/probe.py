"""A residual norm as a program of its own, with what stands around it: what is measured in its place.

Both ways to run it are compiled by Inductor as the rest of the graph will be: sum and norm in plain PyTorch, which it
fuses, and calls of the generated kernels with what is left to compute around them. In training the backward is a
program of its own, as it is behind autograd: gradients that arrive are added up, the gradient of the sum is added up
over the rows where a bias waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from operator import add
from typing import Any, Final

import torch
from torch import Tensor
from torch._guards import tracing
from torch.fx.experimental.proxy_tensor import make_fx

from fxopt.codegen.norm.residual_norm import plain
from fxopt.codegen.norm.residual_norm.config import split_config
from fxopt.codegen.norm.residual_norm.reference import MEANINGS
from fxopt.lowering.base import compile_base
from fxopt.lowering.options import Options
from fxopt.lowering.surroundings import Surroundings

#: The name under which the meaning, as Inductor fuses it, stands among the candidates.
PLAIN: Final = "aten"
Operands = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Base:
    """How the rest of the graph is compiled: the options of the base compiler, and the mode of torch.compile."""

    options: Options = field(default_factory=Options)
    mode: str | None = None

    def compile(self, function: Callable[..., Any], given: Sequence[Tensor]) -> Callable[[], Any]:
        """``function`` of ``given`` as Inductor compiles it, whatever base was asked for; a call of that."""
        # CUDA graphs are the measurement's own.
        settings = {**dict(self.options.inductor), "triton.cudagraphs": False, "triton.cudagraph_trees": False}
        options = replace(self.options, base="inductor", inductor=tuple(sorted(settings.items())))
        # Nothing here belongs to the graph that is being compiled.
        with ExitStack() as apart:
            apart.enter_context(tracing(None))
            apart.enter_context(torch.no_grad())
            module = make_fx(function, tracing_mode="fake")(*given)
            compiled = compile_base(module, list(given), options, self.mode)

        def run() -> Any:
            with torch.no_grad():
                return compiled(*given)

        return run

    def __str__(self) -> str:
        return f"{self.mode or 'default'} {sorted(dict(self.options.inductor).items())!r}"


@dataclass(frozen=True)
class Probe:
    """One residual norm, its surroundings and real operands.

    Attributes:
        kind: ``"layer_norm"`` or ``"rms_norm"``.
        settings: eps, the dtype that is computed in, and whether weight and bias come after rounding.
        operands: x, residual, weight and bias.
        around: what stands around it.
        wanted: whether weight and bias need gradients.
        training: whether there is a backward.
    """

    kind: str
    settings: tuple[float, torch.dtype, bool]
    operands: Operands
    around: Surroundings
    wanted: tuple[bool, bool]
    training: bool

    def calls(self, name: str, base: Base) -> tuple[Callable[[], Any], ...]:
        """What to time of a candidate, ``aten`` or ``triton-<config>``: its forward, and its backward in training."""
        config = _config(name)
        forward = partial(self._generated(config), *self.operands) if config else self._fused(base)
        return (forward, self._backward(config, base)) if self.training else (forward,)

    def launches(self, name: str) -> tuple[Callable[[], Any], ...]:
        """Calls of the generated kernels alone, those of ``triton-<config>``."""
        forward = partial(self._generated(_config(name)), *self.operands)
        if not self.training:
            return (forward,)
        function, operands = self._gradients(_config(name), Surroundings(True, 1, self.around.sum_gradients and 1))
        return forward, partial(function, *operands)

    def _fused(self, base: Base) -> Callable[[], Any]:
        given = [x for x in self.operands if x is not None]
        return base.compile(lambda *tensors: self._plain(*self._placed(tensors)), given)

    def _placed(self, tensors: Sequence[Tensor]) -> Operands:
        """``tensors`` with ``None`` for the weights that there aren't."""
        rest = iter(tensors)
        x, residual, weight, bias = (None if x is None else next(rest) for x in self.operands)
        assert x is not None and residual is not None
        return x, residual, weight, bias

    def _plain(self, x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, ...]:
        eps, dtype, scale_after_cast = self.settings
        alike = all(w is None or w.dtype == x.dtype for w in (residual, weight, bias))
        weights = (weight,) if self.kind == "rms_norm" else (weight, bias)
        if not self.training:
            normal, total = MEANINGS[self.kind](x, residual, *weights, eps, dtype, scale_after_cast)
            return (normal, total) if self.around.sum_read else (normal,)
        if self.kind == "layer_norm" and alike and not scale_after_cast:
            total = x + residual
            return (total, *torch.native_layer_norm(total, [x.shape[-1]], weight, bias, eps))
        found = plain.forward(x, residual, weight, bias, self.kind, eps, scale_after_cast)
        return tuple(result for result in found if result is not None)

    def _generated(self, config: str) -> Callable[..., tuple[Tensor, ...]]:
        eps, _, scale_after_cast = self.settings
        wanted = (self.training or self.around.sum_read, self.training)

        def forward(*operands: Tensor | None) -> tuple[Tensor, ...]:
            call = torch.ops.fxopt.residual_norm_forward_launch
            found: tuple[Tensor, ...] = call(*operands, self.kind, eps, scale_after_cast, config, *wanted)
            return found

        return forward

    def _backward(self, config: str, base: Base) -> Callable[[], Any]:
        function, operands = self._gradients(config, self.around)
        alone = self.around.gradients == 1 and self.around.sum_gradients <= 1 and not self.around.biases
        return partial(function, *operands) if config and alone else base.compile(function, operands)

    def _gradients(self, config: str, around: Surroundings) -> tuple[Callable[..., list[Tensor]], list[Tensor]]:
        """The backward amid ``around``, and what it is called on."""
        eps, _, scale_after_cast = self.settings
        weight, bias = self.operands[2:]
        normal, total, mean, scale = plain.forward(*self.operands, self.kind, eps, scale_after_cast)
        mean = scale.new_empty(0) if mean is None else mean
        weights = [w for w in (weight, bias) if w is not None]
        arriving = [torch.randn_like(normal) for _ in range(around.gradients)]
        arriving += [torch.randn_like(total) for _ in range(around.sum_gradients)]

        def backward(total: Tensor, mean: Tensor, scale: Tensor, *rest: Tensor) -> list[Tensor]:
            given = iter(rest)
            w, b = (None if x is None else next(given) for x in (weight, bias))
            incoming = list(given)
            dnormal = reduce(add, incoming[: around.gradients])
            dsum = reduce(add, incoming[around.gradients :]) if around.sum_gradients else None
            operands = (dnormal, dsum, total, mean, scale, w, b, list(self.wanted), self.kind)
            if config:
                call = torch.ops.fxopt.residual_norm_backward_launch
                found = call(*operands, eps, scale_after_cast, split_config(config)[1])
            else:
                found = plain.backward(*operands, scale_after_cast)
            return [*found, found[0].flatten(0, -2).sum(0)] if around.biases else list(found)

        return backward, [total, mean, scale, *weights, *arriving]


def _config(name: str) -> str:
    return "" if name == PLAIN else name.removeprefix("triton-")
