"""What the progressive norms share: the original's parameters, statistics in use and their record, the way they end."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from fxopt.errors import OptionError
from fxopt.passes.norm.channel_affine import ChannelAffine, result_dtype
from fxopt.passes.norm.moments import Moments, merge, moments
from fxopt.passes.norm.recognise import NormModule
from fxopt.passes.norm.token_mask import TokenMask
from fxopt.rewriter.progressive import Progressive
from fxopt.rewriter.settings import check_number, check_switch, check_whole


@dataclass(frozen=True)
class Statistics:
    """How statistics are taken: ``ε``, the momentum of the running ones, over which processes, from how many batches
    of `fxopt.convert`'s data.
    """

    eps: float
    momentum: float
    synchronize: bool
    recalibrate: int | None

    def __post_init__(self) -> None:
        if self.recalibrate is not None:
            check_whole("recalibrate", self.recalibrate, "batches (None: all)", least=1)
        for name in ("momentum", "eps"):
            check_number(name, getattr(self, name))
        check_switch("synchronize", self.synchronize)
        if not 0 < self.momentum <= 1:
            raise OptionError(f"momentum={self.momentum} is not possible; give a number above 0 and up to 1")
        if not self.eps >= 0:
            raise OptionError(f"eps={self.eps} is not possible; give a number of 0 or more")


class RunningNorm(Progressive):
    """A norm with statistics of channels over tokens, which is ``a ⊙ x + b`` in evaluation.

    It holds the parameters and buffers of the original under their names and ``step``, the number of optimiser steps
    taken. Computations are in float32 at least.

    Attributes:
        eps: not a number. Modules that compute the norms inside of them by themselves (in evaluation
            ``nn.TransformerEncoderLayer``) first ask whether these have equal ones.
    """

    eps: Final = math.nan
    step: Tensor
    fresh: Tensor

    def __init__(
        self, original: nn.Module, meaning: NormModule, mask: TokenMask, statistics: Statistics, like: Tensor
    ) -> None:
        super().__init__()
        for name, parameter in original.named_parameters():
            self.register_parameter(name, parameter)
        for name, buffer in original.named_buffers():
            self.state(name, buffer, lasting=name not in original._non_persistent_buffers_set)
        self.meaning, self.mask, self.statistics = meaning, mask, statistics
        self._gathered: Moments | None = None
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=like.device))
        # Whether a forward in training left statistics since the last step.
        self.state("fresh", torch.zeros((), dtype=torch.bool, device=like.device), lasting=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., C]`` to ``[..., C]``."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.training:
            y = self.train_forward(wide)
            self.mask.keep(y)
        elif self._gathered is not None:
            y = self._gathering_forward(wide)
        else:
            scale, shift = self.affine(wide.dtype)
            y = wide * scale + shift
        return y.to(result_dtype(x, self._own(self.meaning.weight), promotes=self.meaning.promotes))

    def train_forward(self, x: Tensor) -> Tensor:
        """What it computes in training."""
        raise NotImplementedError

    def normalised(self, x: Tensor, found: Moments) -> Tensor:
        """What it computes with the statistics ``found``, without any part of the original."""
        raise NotImplementedError

    def affine(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``a`` and ``b`` of evaluation, computed in ``dtype``."""
        raise NotImplementedError

    def keep(self, found: Moments) -> None:
        """Take ``found`` as the statistics of evaluation."""
        raise NotImplementedError

    def _gathering_forward(self, x: Tensor) -> Tensor:
        """Every norm sees its inputs as in training: those above it normalise by the batch at hand.

        Other processes are not asked, as they may not be converting.
        """
        mask = self.mask.over(x)
        self.mask.check_values()
        found = moments(x.double(), mask, synchronize=False)
        assert self._gathered is not None
        self._gathered = merge(self._gathered, found)
        narrow = Moments(*(value.to(x.dtype) for value in found))
        return self.normalised(x, narrow)

    def batches(self) -> int | None:
        """See `Progressive.batches`."""
        return self.statistics.recalibrate

    def is_finite(self) -> bool:
        """See `Progressive.is_finite`."""
        return self._gathered is None or bool((self._gathered.mean + self._gathered.variance).isfinite().all())

    def gather(self, active: bool) -> None:
        """See `Progressive.gather`."""
        if not active and self._gathered is not None and float(self._gathered.tokens) > 0:
            self.keep(self._gathered)
        zeros = torch.zeros(self.meaning.channels, dtype=torch.float64, device=self.step.device)
        self._gathered = Moments(zeros.new_zeros(()), zeros, zeros) if active else None

    def converted(self) -> ChannelAffine:
        """``y = a ⊙ x + b``, from the statistics as they are, in float64, rounded once."""
        with torch.no_grad():
            like = self.clock()
            scale, shift = (value.to(like.dtype) for value in self.affine(torch.float64))
        return ChannelAffine(scale, shift, promotes=self.meaning.promotes).train(self.training)

    def gain(self, dtype: torch.dtype) -> Tensor | None:
        """The original's weight with what is added to it."""
        weight = self._own(self.meaning.weight)
        return None if weight is None else weight.to(dtype) + self.meaning.offset

    def shift(self, dtype: torch.dtype) -> Tensor | None:
        """The original's bias."""
        bias = self._own(self.meaning.bias)
        return None if bias is None else bias.to(dtype)

    def _own(self, name: str | None) -> Tensor | None:
        return None if name is None else getattr(self, name)

    def state(self, name: str, value: Tensor, *, lasting: bool = True) -> None:
        """Register statistics: in the checkpoint if they are ``lasting``, else for one optimiser step."""
        self.register_buffer(name, value, persistent=lasting)
