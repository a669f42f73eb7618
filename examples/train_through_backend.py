"""Training through the backend: a small character model learns three sonnets of Shakespeare.

The first steps are taken three times: by eager, through the backend, and in float64. The losses of all characters of
those steps must be as close to float64 as eager's are, which needs the gradients to be right too.

    python examples/train_through_backend.py
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import fxopt
from fxopt.testing import assert_within_budget

TEXT = (Path(__file__).parent / "data" / "sonnets.txt").read_text(encoding="utf-8")
ALPHABET = sorted(set(TEXT))
COMPARED_STEPS = 4


class Block(nn.Module):
    """Causal attention written out, and a feed-forward layer."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.feed_norm = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.out = nn.Linear(channels, channels)
        self.feed = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))

    def forward(self, x_BSC: Tensor) -> Tensor:
        """``[B, S, C]`` to ``[B, S, C]``."""
        batch, length, channels = x_BSC.shape
        packed = self.qkv(self.norm(x_BSC)).view(batch, length, 3, self.heads, -1)
        q_BHSD, k_BHSD, v_BHSD = packed.permute(2, 0, 3, 1, 4)
        future_SS = torch.ones(length, length, dtype=torch.bool, device=x_BSC.device).triu(1)
        scores_BHSS = (q_BHSD @ k_BHSD.transpose(-2, -1)) * q_BHSD.shape[-1] ** -0.5
        weights_BHSS = scores_BHSS.masked_fill(future_SS, -torch.inf).softmax(-1)
        x_BSC = x_BSC + self.out((weights_BHSS @ v_BHSD).transpose(1, 2).reshape(batch, length, channels))
        output_BSC: Tensor = x_BSC + self.feed(self.feed_norm(x_BSC))
        return output_BSC


class CharacterModel(nn.Module):
    """Two blocks over characters; gives the loss of every prediction."""

    def __init__(self, channels: int = 64, heads: int = 4, longest: int = 64) -> None:
        super().__init__()
        self.characters = nn.Embedding(len(ALPHABET), channels)
        self.positions = nn.Parameter(torch.randn(longest, channels) * 0.02)
        self.blocks = nn.Sequential(Block(channels, heads), Block(channels, heads))
        self.head = nn.Linear(channels, len(ALPHABET))

    def forward(self, text_BT: Tensor) -> Tensor:
        """Losses ``[B, T − 1]`` of predicting each of the characters ``[B, T]`` from those before it."""
        x_BSC = self.characters(text_BT[:, :-1]) + self.positions[: text_BT.shape[1] - 1]
        logits_BSV = self.head(self.blocks(x_BSC))
        return nn.functional.cross_entropy(logits_BSV.transpose(1, 2), text_BT[:, 1:], reduction="none")


def excerpts(steps: int, batch: int = 16, length: int = 65) -> Iterator[Tensor]:
    """Random excerpts ``[B, T]`` of the text, the same in every run."""
    indices = torch.tensor([ALPHABET.index(character) for character in TEXT])
    draw = torch.Generator().manual_seed(1)
    for _ in range(steps):
        starts = torch.randint(len(indices) - length, (batch, 1), generator=draw)
        yield indices[starts + torch.arange(length)]


def train(model: nn.Module, losses_of: Callable[[Tensor], Tensor], steps: int) -> list[Tensor]:
    """Train ``model``, whose losses ``losses_of`` computes; return the losses ``[B, S]`` of every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    history = []
    for text_BT in excerpts(steps):
        losses_BS = losses_of(text_BT)
        optimizer.zero_grad()
        losses_BS.mean().backward()
        optimizer.step()
        history.append(losses_BS.detach())
    return history


def main(base: str = "inductor", steps: int = 200) -> list[float]:
    """Train through the backend, compare the first steps, and return the mean loss of every step."""
    torch.manual_seed(0)
    model = CharacterModel()
    eager, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    print(fxopt.explain(model, next(excerpts(1))), "\n")

    history = train(model, torch.compile(model, backend="fxopt", options={"base": base}), steps)
    reference = train(exact, exact, COMPARED_STEPS)
    for report in assert_within_budget(history[:COMPARED_STEPS], train(eager, eager, COMPARED_STEPS), reference):
        print(report)

    means = [float(losses.mean()) for losses in history]
    print(f"\nmean loss: {means[0]:.3f} at first, {means[-1]:.3f} after {steps} steps")
    if not means[-1] < 0.8 * means[0]:
        raise RuntimeError("the loss did not fall by a fifth: nothing was learnt")
    return means


if __name__ == "__main__":
    main()
