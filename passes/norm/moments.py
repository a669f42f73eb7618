"""Statistics of channels over the tokens that count, in this process or in all of them, with their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Moments(NamedTuple):
    """The number of tokens ``[]``, their mean ``[C]``, and their variance ``[C]`` without Bessel's correction."""

    tokens: Tensor
    mean: Tensor
    variance: Tensor


def moments(x: Tensor, mask: Tensor | None, *, synchronize: bool) -> Moments:
    """Mean and variance of each channel of ``x [..., C]`` over all other axes.

    Args:
        x: any leading axes, computed in its own dtype.
        mask: booleans ``[..., 1]``, true where a token counts; ``None``: all count.
        synchronize: whether the tokens of all processes of the default group count, where there are several.

    Returns:
        Zeros where no token counts.
    """
    axes = tuple(range(x.dim() - 1))
    if mask is None and x.numel():
        variance, mean = torch.var_mean(x, axes, correction=0)
        found = Moments(count_of(x, mask), mean, variance)
    else:
        found = _masked(x, mask, axes)
    return _over_processes(found) if synchronize and _several_processes() else found


def average(x: Tensor, mask: Tensor | None, *, synchronize: bool) -> tuple[Tensor, Tensor]:
    """Number of tokens that count, and the mean ``[C]`` of ``x [..., C]`` over them; no gradient flows through it."""
    axes = tuple(range(x.dim() - 1))
    kept = x if mask is None else torch.where(mask, x, 0)
    return average_of(kept.sum(axes), count_of(x, mask), synchronize=synchronize)


def average_of(total: Tensor, count: Tensor, *, synchronize: bool) -> tuple[Tensor, Tensor]:
    """``count`` and ``total [C] / count``, both first added up over the processes; no gradient flows through it."""
    packed = torch.cat((count.reshape(1), total))
    if synchronize and _several_processes():
        dist.all_reduce(packed)
    return packed[0], packed[1:] / packed[0].clamp(min=1)


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of the tokens of both."""
    count = a.tokens + b.tokens
    share = b.tokens / count.clamp(min=1)
    apart = b.mean - a.mean
    spread = (1 - share) * a.variance + share * b.variance + share * (1 - share) * apart.square()
    return Moments(count, a.mean + share * apart, spread)


def count_of(x: Tensor, mask: Tensor | None) -> Tensor:
    """How many tokens of ``x [..., C]`` count, in the dtype of ``x``."""
    if mask is None:
        return x.new_full((), x.shape[:-1].numel())
    return mask.expand(*x.shape[:-1], 1).sum().to(x.dtype)


def _masked(x: Tensor, mask: Tensor | None, axes: tuple[int, ...]) -> Moments:
    """What does not count may be anything, NaN too; there may be no token at all."""
    keep = torch.ones_like(x[..., :1], dtype=torch.bool) if mask is None else mask
    count = count_of(x, mask)
    number = count.clamp(min=1)
    mean = torch.where(keep, x, 0).sum(axes) / number
    variance = torch.where(keep, x - mean, 0).square().sum(axes) / number
    return Moments(count, mean, variance)


def _several_processes() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _over_processes(own: Moments) -> Moments:
    """The moments of all processes' tokens, from one collective call."""
    packed = torch.cat((own.tokens.reshape(1), own.mean, own.variance))
    gather: Callable[[Tensor], Tensor] = _Gather.apply
    all_RK = gather(packed)
    count_R1, mean_RC, variance_RC = all_RK.split((1, own.mean.numel(), own.mean.numel()), dim=1)
    count = count_R1.sum()
    share_R1 = count_R1 / count.clamp(min=1)
    mean = (share_R1 * mean_RC).sum(0)
    variance = (share_R1 * (variance_RC + (mean_RC - mean).square())).sum(0)
    return Moments(count, mean, variance)


class _Gather(torch.autograd.Function):
    """``[K]`` of every process as ``[R, K]``; gradients of all processes flow back to where each row came from.

    The rows meet in a sum with zeros, the one collective that every backend has.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        rows = own.new_zeros(dist.get_world_size(), own.numel())
        rows[dist.get_rank()] = own
        dist.all_reduce(rows)
        return rows

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total[dist.get_rank()]
