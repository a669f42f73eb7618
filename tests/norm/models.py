"""Small models with norms, and a training loop, for the tests of trainable passes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

import fxopt
from fxopt.passes import RepBatchNorm, UnifiedNorm

CHANNELS = 8
#: Passes whose schedules are over, or well under way, after a few steps.
SHORT: dict[str, fxopt.Pass] = {
    "rep-batch-norm": RepBatchNorm(steps=4, warmup=2),
    "unified-norm": UnifiedNorm(warmup=3, window=2, filter_outliers=True),
}


class Block(nn.Module):
    """A feed-forward layer behind a LayerNorm, and a linear one behind an RMSNorm."""

    def __init__(self, channels: int = CHANNELS) -> None:
        super().__init__()
        self.norm, self.root = nn.LayerNorm(channels), nn.RMSNorm(channels)
        self.up, self.down = nn.Linear(channels, 2 * channels), nn.Linear(2 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(torch.relu(self.up(self.norm(x)))) + self.down(self.up(self.root(x)))
        return y


class Encoder(nn.Module):
    """Two blocks and a norm; a mask of tokens may be given."""

    def __init__(self, channels: int = CHANNELS) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(channels), Block(channels)])
        self.last = nn.LayerNorm(channels)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.last(x)
        return y


class One(nn.Module):
    """One norm, whatever it is, and a linear layer."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.linear = norm, nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(self.norm(x))
        return y


def encoder(seed: int = 0) -> Encoder:
    """An encoder whose norms have weights and biases unlike 1 and 0."""
    torch.manual_seed(seed)
    model = Encoder()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def inputs(count: int, seed: int = 1, batch: int = 4, length: int = 5) -> list[Tensor]:
    """``count`` batches ``[batch, length, CHANNELS]`` with channels of unlike mean and size."""
    generator = torch.Generator().manual_seed(seed)
    scale, shift = torch.linspace(0.5, 3, CHANNELS), torch.linspace(-2, 1, CHANNELS)
    return [torch.randn(batch, length, CHANNELS, generator=generator) * scale + shift for _ in range(count)]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW, which has a state to resume."""
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def train(model: Any, optimizer: torch.optim.Optimizer, batches: Iterable[Tensor]) -> list[float]:
    """One step a batch; the losses."""
    losses = []
    for x in batches:
        loss = (model(x) - x.cos()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def trained(chosen: fxopt.Pass, steps: int = 8) -> nn.Module:
    """A student after ``steps`` steps."""
    student = fxopt.prepare(encoder(), (inputs(1)[0],), passes=[chosen]).train()
    train(student, optimizer_of(student), inputs(steps))
    return student
