"""Small models with softmax attention in several spellings, and a training loop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

CHANNELS, HEADS, TOKENS = 16, 2, 9


class Heads(nn.Module):
    """Projections to heads and back; subclasses mix ``[B, H, N, D]``."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(CHANNELS, 3 * CHANNELS), nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y: Tensor = self.proj(self.mix(q, k, v, mask).transpose(1, 2).reshape(batch, tokens, -1))
        return y

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        raise NotImplementedError


class Written(Heads):
    """The attention written out, with a dropout of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.1)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        y: Tensor = self.drop(((q @ k.mT) * q.shape[-1] ** -0.5).softmax(-1)) @ v
        return y


class Called(Heads):
    """PyTorch's own, with a mask of keys ``[B, N]`` where one is given."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return scaled_dot_product_attention(q, k, v, None if mask is None else mask[:, None, None, :])


class Causal(Heads):
    """PyTorch's own, causal."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True)


class Biased(Heads):
    """With a learned bias for each pair of tokens, as Swin's windows have it."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(HEADS, TOKENS, TOKENS))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        y: Tensor = (q @ k.mT * 0.5 + self.bias).softmax(-1) @ v
        return y


class Capped(Heads):
    """With scores that a hyperbolic tangent bounds."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return torch.tanh(q @ k.mT * 0.5).softmax(-1) @ v


class Negative(Heads):
    """With a negative scale."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return (q @ k.mT * -0.5).softmax(-1) @ v


class Windowed(Heads):
    """Each token sees its neighbours."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        place = torch.arange(q.shape[2])
        far = (place[:, None] - place).abs() > 2
        return (q @ k.mT).masked_fill(far, -torch.inf).softmax(-1) @ v


class Returning(Heads):
    """Gives its weights away as well."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.mT).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2)), weights


def _sharpened(y: Tensor, weights: Tensor) -> Tensor:
    return y * weights.amax(-1).mean(1)[..., None]


class Mixer(nn.Module):
    """Norms, two attentions on the residual stream, and a head for each token."""

    def __init__(self, kind: type[Heads] = Written) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(CHANNELS), nn.LayerNorm(CHANNELS)])
        self.layers = nn.ModuleList([kind(), kind()])
        self.head = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for norm, layer in zip(self.norms, self.layers, strict=True):
            mixed = layer(norm(x), mask)
            x = x + (_sharpened(*mixed) if isinstance(mixed, tuple) else mixed)
        y: Tensor = self.head(x)
        return y


def mixer(kind: type[Heads] = Written, seed: int = 0) -> Mixer:
    """A model with drawn weights."""
    torch.manual_seed(seed)
    return Mixer(kind)


def inputs(count: int, seed: int = 1, batch: int = 4, tokens: int = TOKENS) -> list[Tensor]:
    """``count`` batches ``[batch, tokens, CHANNELS]``."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, tokens, CHANNELS, generator=generator) for _ in range(count)]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW, which has a state to resume."""
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def train(model: Any, optimizer: torch.optim.Optimizer, batches: Iterable[Tensor]) -> list[float]:
    """One step a batch, with dropout drawn from the number of the batch; the losses."""
    losses = []
    for x in batches:
        torch.manual_seed(int(x.abs().sum() * 1000))
        loss = (model(x) - x.cos()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
