"""A trainable pass: softmax attention gives way to linear attention while a small character model learns three sonnets.

The sum over earlier characters costs as much for each of them as for the first, however long the text; what it gives is
another function than softmax attention, so the model is trained with it. With a schedule training starts as the
original: ``λ·softmax attention + (1 − λ)·linear attention``, where λ falls with the steps of the optimiser.

    python examples/train_linear_attention.py
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention

import fxopt

TEXT = (Path(__file__).parent / "data" / "sonnets.txt").read_text(encoding="utf-8")
ALPHABET = sorted(set(TEXT))
BATCH, LENGTH, CHANNELS, HEADS = 16, 32, 48, 3


class Attention(nn.Module):
    """Causal softmax attention with its projections: the module that is exchanged."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(CHANNELS, 3 * CHANNELS), nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x_BSC: Tensor) -> Tensor:
        """``[B, S, C]`` to ``[B, S, C]``."""
        q_BHSD, k_BHSD, v_BHSD = self.qkv(x_BSC).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed_BHSD = scaled_dot_product_attention(q_BHSD, k_BHSD, v_BHSD, is_causal=True)
        output_BSC: Tensor = self.out(mixed_BHSD.transpose(1, 2).flatten(2))
        return output_BSC


class Block(nn.Module):
    """Attention and a feed-forward layer, each behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.feed_norm = nn.LayerNorm(CHANNELS), nn.LayerNorm(CHANNELS)
        self.attention = Attention()
        self.up, self.down = nn.Linear(CHANNELS, 4 * CHANNELS), nn.Linear(4 * CHANNELS, CHANNELS)

    def forward(self, x_BSC: Tensor) -> Tensor:
        """``[B, S, C]`` to ``[B, S, C]``."""
        x_BSC = x_BSC + self.attention(self.norm(x_BSC))
        output_BSC: Tensor = x_BSC + self.down(gelu(self.up(self.feed_norm(x_BSC))))
        return output_BSC


class CharacterModel(nn.Module):
    """Logits ``[B, S, V]`` of the character after each of ``[B, S]``."""

    def __init__(self) -> None:
        super().__init__()
        self.characters = nn.Embedding(len(ALPHABET), CHANNELS)
        self.positions = nn.Parameter(torch.randn(LENGTH, CHANNELS) * 0.02)
        self.blocks = nn.Sequential(Block(), Block())
        self.norm, self.head = nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, len(ALPHABET))

    def forward(self, text_BS: Tensor) -> Tensor:
        """See the class."""
        x_BSC = self.characters(text_BS) + self.positions[: text_BS.shape[1]]
        logits_BSV: Tensor = self.head(self.norm(self.blocks(x_BSC)))
        return logits_BSV


def excerpts(seed: int = 1) -> Iterator[Tensor]:
    """Random excerpts ``[B, S + 1]`` of the text, the same in every run."""
    indices = torch.tensor([ALPHABET.index(character) for character in TEXT])
    draw = torch.Generator().manual_seed(seed)
    while True:
        yield indices[torch.randint(len(indices) - LENGTH, (BATCH, 1), generator=draw) + torch.arange(LENGTH + 1)]


def loss_of(model: nn.Module, text: Tensor) -> Tensor:
    """Mean cross entropy of predicting every character from those before it."""
    return cross_entropy(model(text[:, :-1]).transpose(1, 2), text[:, 1:])


def train(student: nn.Module, texts: Iterable[Tensor]) -> list[float]:
    """A loop like any other: λ follows ``optimizer.step()`` by itself."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    losses = []
    for text in texts:
        loss = loss_of(student, text)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def influence(model: nn.Module, text_BS: Tensor) -> tuple[float, float]:
    """How far the logits before, and from, the middle move where the characters from there on are others."""
    middle = text_BS.shape[1] // 2
    other_BS = torch.cat((text_BS[:, :middle], text_BS[:, middle:].flip(1)), 1)
    with torch.no_grad():
        moved_S = (model(text_BS) - model(other_BS)).abs().amax((0, 2))
    return float(moved_S[:middle].max()), float(moved_S[middle:].max())


def main(steps: int = 300) -> tuple[list[float], fxopt.Report]:
    """Train, convert, and show that no character knows those behind it; return losses and report of the conversion."""
    torch.manual_seed(0)
    passes = [fxopt.passes.LinearAttention(warmup=steps // 10, steps=steps // 2)]
    student = fxopt.prepare(CharacterModel(), (next(excerpts())[:, :-1],), passes=passes).train()
    print(fxopt.prepared(student).report, "\n")
    losses = train(student, islice(excerpts(), steps))
    print(f"loss: {losses[0]:.3f} at first, {losses[-1]:.3f} after {steps} steps")

    fast = fxopt.convert(student)
    print(f"\n{fast.report}\n")
    with torch.no_grad():
        before, after = (float(loss_of(model.eval(), next(excerpts(seed=3)))) for model in (student, fast))
    print(f"loss on another excerpt: {before:.3f} of the student, {after:.3f} converted")
    earlier, later = influence(fast, next(excerpts(seed=3))[:, :-1])
    print(f"other characters in the second half move logits of the first by {earlier}, of the second by {later:.2f}")
    return losses, fast.report


if __name__ == "__main__":
    main()
