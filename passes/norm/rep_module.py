"""The module that `RepBatchNorm` puts in the place of a norm."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, rms_norm

from fxopt.passes.norm.moments import Moments, moments
from fxopt.passes.norm.recognise import NormModule
from fxopt.passes.norm.running import RunningNorm, Statistics
from fxopt.passes.norm.token_mask import TokenMask, is_backward


@dataclass(frozen=True)
class Transition:
    """When ``λ`` falls, where ``α`` starts, and the multiple of the original's weight and bias that BN starts with."""

    steps: int
    warmup: int
    alpha: float | None
    start: float


class RepNorm(RunningNorm):
    """``λ·norm(x) + (1 − λ)·(BN(x) + α·x)`` in training, ``BN(x) + α·x = a ⊙ x + b`` in evaluation.

    ``λ`` is 1 for ``warmup`` optimiser steps and then falls to 0 in ``steps`` more; ``BN`` has its own ``batch_weight``
    and ``batch_bias``. A forward in training leaves its statistics in ``batch_mean`` and ``batch_variance``, where the
    same forward computed again leaves the same; the next step of the optimiser takes them into the running ones.
    """

    running_mean: Tensor
    running_var: Tensor
    batch_mean: Tensor
    batch_variance: Tensor

    def __init__(
        self,
        original: nn.Module,
        meaning: NormModule,
        mask: TokenMask,
        statistics: Statistics,
        like: Tensor,
        transition: Transition,
    ) -> None:
        super().__init__(original, meaning, mask, statistics, like)
        self.steps, self.warmup = transition.steps, transition.warmup
        ones = torch.ones(meaning.channels, dtype=like.dtype, device=like.device)
        gain, shift = self.gain(like.dtype), self.shift(like.dtype)
        gain, shift = (ones if gain is None else gain), (torch.zeros_like(ones) if shift is None else shift)
        self.batch_weight = nn.Parameter(transition.start * gain.detach())
        self.batch_bias = nn.Parameter(transition.start * shift.detach())
        self.alpha = None if transition.alpha is None else nn.Parameter(ones[:1] * transition.alpha)
        wide = ones.to(torch.promote_types(like.dtype, torch.float32))
        self.state("running_mean", torch.zeros_like(wide))
        self.state("running_var", wide.clone())
        self.state("batch_mean", torch.zeros_like(wide), lasting=False)
        self.state("batch_variance", wide.clone(), lasting=False)

    def clock(self) -> Tensor:
        """See `Progressive.clock`."""
        return self.batch_weight

    def share(self, dtype: torch.dtype) -> Tensor:
        """``λ [] = 1 − clamp(step − warmup, 0, steps) / steps``; 0 if ``steps`` is, after the warm-up."""
        left = self.steps - (self.step - self.warmup).clamp(0, self.steps)
        if self.steps:
            return left.to(dtype) / self.steps
        return (self.step < self.warmup).to(dtype)

    def remaining(self) -> float:
        """See `Progressive.remaining`."""
        return float(self.share(torch.float64))

    def untouched(self) -> bool:
        """See `Progressive.untouched`."""
        return bool((self.running_mean == 0).all() & (self.running_var == 1).all())

    def advance(self) -> None:
        """See `Progressive.advance`."""
        with torch.no_grad():
            rate = self.fresh.to(self.running_mean.dtype) * self.statistics.momentum
            self.running_mean.lerp_(self.batch_mean, rate)
            self.running_var.lerp_(self.batch_variance, rate)
            self.fresh.zero_()
            self.step.add_(1)

    def train_forward(self, x: Tensor) -> Tensor:
        """See `RunningNorm.train_forward`."""
        mask = self.mask.over(x)
        found = moments(x, mask, synchronize=self.statistics.synchronize)
        if mask is not None:
            any_counts = found.tokens > 0
            mean = torch.where(any_counts, found.mean, self.running_mean.to(x.dtype))
            found = Moments(found.tokens, mean, torch.where(any_counts, found.variance, self.running_var.to(x.dtype)))
        if not is_backward():
            self.batch_mean.copy_(found.mean.detach())
            self.batch_variance.copy_(found.variance.detach())
            self.fresh.copy_(found.tokens > 0)
        share = self.share(x.dtype)
        return share * self._original(x) + (1 - share) * self.normalised(x, found)

    def normalised(self, x: Tensor, found: Moments) -> Tensor:
        """``BN(x) + α·x``."""
        normal = (x - found.mean) * torch.rsqrt(found.variance + self.statistics.eps)
        y = normal * self.batch_weight.to(x.dtype) + self.batch_bias.to(x.dtype)
        return y if self.alpha is None else y + self.alpha.to(x.dtype) * x

    def affine(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``a = s + α`` and ``b = β − s·μ`` with ``s = γ / √(σ² + ε)``."""
        slope = self.batch_weight.to(dtype) * torch.rsqrt(self.running_var.to(dtype) + self.statistics.eps)
        shift = self.batch_bias.to(dtype) - slope * self.running_mean.to(dtype)
        return (slope if self.alpha is None else slope + self.alpha.to(dtype)), shift

    def keep(self, found: Moments) -> None:
        """See `RunningNorm.keep`."""
        self.running_mean.copy_(found.mean)
        self.running_var.copy_(found.variance)

    def _original(self, x: Tensor) -> Tensor:
        sizes, gain = (self.meaning.channels,), self.gain(x.dtype)
        if self.meaning.kind == "RMSNorm":
            return rms_norm(x, sizes, gain, self.meaning.eps)
        return layer_norm(x, sizes, gain, self.shift(x.dtype), self.meaning.eps)

    def extra_repr(self) -> str:
        """Channels and schedule."""
        return f"{self.meaning.channels}, warmup={self.warmup}, steps={self.steps}"
