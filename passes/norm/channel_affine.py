"""A scale and a shift for each channel: what a norm with running statistics is once training is over."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor, nn


class ChannelAffine(nn.Module):
    """``y = x * weight + bias`` over the last axis.

    ``weight`` and ``bias`` are ``[C]``. The result has the dtype of ``x``, or with ``promotes`` the one that ``x`` and
    the weight promote to. ``eps`` is not a number, as that of the norm in whose place it stands.
    """

    eps: Final = math.nan

    def __init__(self, weight: Tensor, bias: Tensor, *, promotes: bool = False) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.promotes = promotes

    def forward(self, x: Tensor) -> Tensor:
        """``[..., C]`` to ``[..., C]``."""
        y = x * self.weight + self.bias
        return y if self.promotes else y.to(x.dtype)

    def extra_repr(self) -> str:
        """The number of channels."""
        return str(self.weight.numel())


def result_dtype(x: Tensor, weight: Tensor | None, *, promotes: bool) -> torch.dtype:
    """The dtype that a norm of ``x`` gives."""
    return torch.promote_types(x.dtype, weight.dtype) if promotes and weight is not None else x.dtype
