"""Scales and shifts for each channel, among arithmetic on sizes that are symbolic."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fxopt
from tests.norm.support import EXACT, draw

C = 8


class _Counted(nn.Module):
    """Arithmetic on sizes among what could be scales and shifts."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn = nn.Linear(C, C), nn.BatchNorm1d(C)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        place = torch.arange(length) + length
        y = self.bn((self.a(x + length * x) - length).transpose(1, 2)).transpose(1, 2)
        result: Tensor = y / length + (place * place)[:, None]
        return result


def test_symbolic_sizes_are_no_channels() -> None:
    net, lengths = _Counted().double().eval(), torch.export.Dim("length", min=2, max=64)
    rewritten: Any = fxopt.rewrite(
        net, (draw(2, 9, C),), dynamic_shapes=({1: lengths},), passes=["fold-channel-affine"], strict=True
    )
    for length in (9, 23):
        x = draw(2, length, C)
        torch.testing.assert_close(rewritten(x), net(x), rtol=EXACT, atol=EXACT)
