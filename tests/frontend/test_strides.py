"""Programs in which tensors are laid out otherwise than fake ones say."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import fxopt


class Tokens(nn.Module):
    """Batch norm over the channels of tokens, in training, then tokens of all samples in one row."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x.transpose(1, 2)).transpose(1, 2) + x
        return torch.mm(y.reshape(-1, 4), self.linear.weight.t())


def test_a_reshape_stays_one_in_training() -> None:
    torch.manual_seed(0)
    model, x = Tokens().train(), torch.randn(2, 6, 4)
    rewritten = fxopt.rewrite(model, (x,), strict=True)
    expected = copy.deepcopy(model)(x)
    torch.testing.assert_close(rewritten(x), expected)
