"""The module that `UnifiedNorm` puts in the place of a norm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fxopt.passes.norm.moments import Moments, average, average_of, count_of
from fxopt.passes.norm.recognise import NormModule
from fxopt.passes.norm.running import RunningNorm, Statistics
from fxopt.passes.norm.token_mask import TokenMask, is_backward

#: Gradients are not scaled during the first steps, and never by more than this factor or its inverse.
_UNSCALED_STEPS: Final = 1000
_LARGEST_SCALE: Final = 5.0


@dataclass(frozen=True)
class Smoothing:
    """Steps before smoothing starts, how many steps it looks back, and whether steps with outliers are left out."""

    warmup: int
    window: int
    filter_outliers: bool


class _State(NamedTuple):
    """The buffers that forward and backward read and record in; see `UnifiedNormalisation`."""

    step: Tensor
    running: Tensor
    second_WC: Tensor
    batch_second: Tensor
    gradient_WC: Tensor
    gradient_average: Tensor
    batch_gradient: Tensor
    fresh: Tensor


class UnifiedNormalisation(RunningNorm):
    """``γ ⊙ x / √(v + ε) + β``, ``v`` a second moment of each channel, smoothed over steps in training.

    Forward and backward leave what they computed in the row ``step % window`` of a window and in ``batch_…``; the same
    forward computed again leaves the same. The next step of the optimiser moves on.
    """

    running_second: Tensor
    second_window: Tensor
    batch_second: Tensor
    gradient_window: Tensor
    gradient_average: Tensor
    batch_gradient: Tensor

    def __init__(
        self,
        original: nn.Module,
        meaning: NormModule,
        mask: TokenMask,
        statistics: Statistics,
        like: Tensor,
        smoothing: Smoothing,
    ) -> None:
        super().__init__(original, meaning, mask, statistics, like)
        self.smoothing = smoothing
        ones = torch.ones(meaning.channels, dtype=like.dtype, device=like.device)
        self._weight, self._bias = meaning.weight or "weight", meaning.bias or "bias"
        self._make(self._weight, ones)
        self._make(self._bias, torch.zeros_like(ones))
        wide = ones.to(torch.promote_types(like.dtype, torch.float32))
        rows = wide.expand(smoothing.window, -1)
        self.state("running_second", wide.clone())
        self.state("second_window", rows.clone())
        self.state("batch_second", wide.clone(), lasting=False)
        self.state("gradient_window", torch.zeros_like(rows))
        self.state("gradient_average", torch.zeros_like(wide))
        self.state("batch_gradient", torch.zeros_like(wide), lasting=False)

    def _make(self, name: str, start: Tensor) -> None:
        """The parameter ``name``, where the original has none: from its buffer of that name, or else ``start``."""
        if name not in self._parameters:
            start = self._buffers.pop(name, None) if name in self._buffers else start  # type: ignore[assignment]
            self._non_persistent_buffers_set.discard(name)
            self.register_parameter(name, nn.Parameter(start.detach().clone()))

    def clock(self) -> Tensor:
        """See `Progressive.clock`."""
        return self.get_parameter(self._weight)

    def remaining(self) -> float:
        """Nothing of the original is left from the start."""
        return 0.0

    def untouched(self) -> bool:
        """See `Progressive.untouched`."""
        return bool((self.running_second == 1).all())

    def advance(self) -> None:
        """See `Progressive.advance`."""
        with torch.no_grad():
            fresh = self.fresh.to(self.running_second.dtype)
            self.running_second.lerp_(self.batch_second, fresh * self.statistics.momentum)
            self.gradient_average.lerp_(self.batch_gradient, fresh)
            self.fresh.zero_()
            self.step.add_(1)

    def train_forward(self, x: Tensor) -> Tensor:
        """See `RunningNorm.train_forward`."""
        state = _State(
            self.step, self.running_second, self.second_window, self.batch_second, self.gradient_window,
            self.gradient_average, self.batch_gradient, self.fresh,
        )  # fmt: skip
        apply: Callable[..., Tensor] = _Smoothed.apply
        return self._scaled(apply(x, self.mask.over(x), *state, self.smoothing, self.statistics))

    def normalised(self, x: Tensor, found: Moments) -> Tensor:
        """``γ ⊙ x / √(v + ε) + β``."""
        return self._scaled(x * torch.rsqrt(found.variance + found.mean.square() + self.statistics.eps))

    def affine(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``a = γ / √(v + ε)`` and ``b = β``."""
        root = torch.rsqrt(self.running_second.to(dtype) + self.statistics.eps)
        return (self.clock().to(dtype) + self.meaning.offset) * root, self.get_parameter(self._bias).to(dtype)

    def keep(self, found: Moments) -> None:
        """See `RunningNorm.keep`."""
        self.running_second.copy_(found.variance + found.mean.square())

    def _scaled(self, normal: Tensor) -> Tensor:
        dtype = normal.dtype
        return normal * (self.clock().to(dtype) + self.meaning.offset) + self.get_parameter(self._bias).to(dtype)

    def extra_repr(self) -> str:
        """Channels and smoothing."""
        return f"{self.meaning.channels}, warmup={self.smoothing.warmup}, window={self.smoothing.window}"


class _Smoothed(torch.autograd.Function):
    """``z = x / √(v + ε)`` with smoothed ``v``, and in the backward pass a smoothed mean of ``g·z``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor | None, *rest: Any) -> Tensor:
        state, (smoothing, statistics) = _State(*rest[:-2]), rest[-2:]
        second = _second(x, mask, state, smoothing, statistics)
        inverse = torch.rsqrt(second + statistics.eps)
        z = x * inverse
        count = count_of(x, mask)
        scale = _scale(second, state, smoothing, statistics)
        ctx.save_for_backward(z, inverse * scale, count, *(() if mask is None else (mask,)))
        ctx.state, ctx.smoothing, ctx.statistics = state, smoothing, statistics
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (z, factor, count, *mask) = gradients, ctx.saved_tensors
        state: _State = ctx.state
        total = (g * z).sum(tuple(range(g.dim() - 1)))
        _, mean = average_of(total, count, synchronize=ctx.statistics.synchronize)
        smoothed = _smoothed_gradient(mean, state, ctx.smoothing, ctx.statistics)
        own = smoothed * z
        own = torch.where(mask[0], own, 0) if mask else own
        return ((g - own) * factor, *[None] * (len(state) + 3))


def _second(x: Tensor, mask: Tensor | None, state: _State, smoothing: Smoothing, statistics: Statistics) -> Tensor:
    """The second moment ``[C]`` to divide by, recorded for the next step."""
    count, own = average(x.square(), mask, synchronize=statistics.synchronize)
    running = state.running.to(x.dtype)
    counts = count > 0
    own = torch.where(counts, own, running)
    window = torch.where(_row(state, smoothing), own, state.second_WC.to(x.dtype))
    geometric = (window + statistics.eps).log().mean(0).exp() - statistics.eps
    smooth = _is_smooth(state, smoothing)
    if smoothing.filter_outliers:
        apart = window.mean(0) - geometric
        outlier = smooth & (apart > smoothing.window * window.sqrt().var(correction=0)).any()
        smooth = smooth & ~outlier
        window = torch.where(_row(state, smoothing) & outlier, running, window)
    used = torch.where(smooth, geometric, own)
    if not is_backward():
        state.second_WC.copy_(window)
        state.batch_second.copy_(used)
        state.fresh.copy_(counts)
    return used


def _smoothed_gradient(mean: Tensor, state: _State, smoothing: Smoothing, statistics: Statistics) -> Tensor:
    window = torch.where(_row(state, smoothing), mean, state.gradient_WC.to(mean.dtype))
    average = torch.lerp(state.gradient_average.to(mean.dtype), window.mean(0), statistics.momentum)
    smoothed = torch.where(_is_smooth(state, smoothing), average, mean)
    state.gradient_WC.copy_(window)
    state.batch_gradient.copy_(smoothed)
    return smoothed


def _scale(second: Tensor, state: _State, smoothing: Smoothing, statistics: Statistics) -> Tensor:
    """``√((v + ε) / (v_running + ε))`` within bounds, 1 in the first steps."""
    running = state.running.to(second.dtype)
    ratio = ((second + statistics.eps) / (running + statistics.eps)).sqrt().clamp(1 / _LARGEST_SCALE, _LARGEST_SCALE)
    return torch.where(state.step < max(_UNSCALED_STEPS, smoothing.warmup), 1.0, ratio)


def _row(state: _State, smoothing: Smoothing) -> Tensor:
    """``[W, 1]``: which row of the windows belongs to this step."""
    rows = torch.arange(smoothing.window, device=state.step.device)
    return (rows == state.step % smoothing.window)[:, None]


def _is_smooth(state: _State, smoothing: Smoothing) -> Tensor:
    """Whether the warm-up is over and the windows are full."""
    return state.step >= max(smoothing.warmup, smoothing.window - 1)
