"""A trainable pass: LayerNorms give way to BatchNorms while a small character model learns three sonnets.

`fxopt.prepare` makes the student, any loop with a PyTorch optimiser trains it, `fxopt.convert` ends with a model that
has no LayerNorm any more. Halfway the run is interrupted, saved and resumed, and must give the same bits as one that
was not.

    python examples/train_rep_batch_norm.py
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

import fxopt

TEXT = (Path(__file__).parent / "data" / "sonnets.txt").read_text(encoding="utf-8")
ALPHABET = sorted(set(TEXT))
BATCH, LENGTH = 16, 32


class Block(nn.Module):
    """A running mean of what came before, and a feed-forward layer, each behind a LayerNorm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.feed_norm = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.mix = nn.Linear(channels, channels)
        self.feed = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))

    def forward(self, x_BSC: Tensor) -> Tensor:
        """``[B, S, C]`` to ``[B, S, C]``."""
        counts_S1 = torch.arange(1, x_BSC.shape[1] + 1, device=x_BSC.device)[:, None]
        x_BSC = x_BSC + self.mix(self.norm(x_BSC)).cumsum(1) / counts_S1
        output_BSC: Tensor = x_BSC + self.feed(self.feed_norm(x_BSC))
        return output_BSC


class CharacterModel(nn.Module):
    """Logits ``[B, S, V]`` of the character after each of ``[B, S]``."""

    def __init__(self, channels: int = 48) -> None:
        super().__init__()
        self.characters = nn.Embedding(len(ALPHABET), channels)
        self.positions = nn.Parameter(torch.randn(LENGTH, channels) * 0.02)
        self.blocks = nn.Sequential(Block(channels), Block(channels))
        self.norm, self.head = nn.LayerNorm(channels), nn.Linear(channels, len(ALPHABET))

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
    return nn.functional.cross_entropy(model(text[:, :-1]).transpose(1, 2), text[:, 1:])


def train(student: nn.Module, optimizer: torch.optim.Optimizer, texts: Iterator[Tensor]) -> list[float]:
    """A loop like any other: the schedule of the norms follows ``optimizer.step()`` by itself."""
    losses = []
    for text in texts:
        loss = loss_of(student, text)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def fresh(steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The student at its start, and its optimiser."""
    torch.manual_seed(0)
    example = next(excerpts())[:, :-1]
    passes = [fxopt.passes.RepBatchNorm(warmup=steps // 10, steps=steps * 7 // 10)]
    student = fxopt.prepare(CharacterModel(), (example,), passes=passes).train()
    return student, torch.optim.AdamW(student.parameters(), lr=3e-3)


def interrupted(steps: int) -> nn.Module:
    """The same training in two runs, of which the second knows what the first saved and nothing else."""
    texts, saved = excerpts(), io.BytesIO()
    student, optimizer = fresh(steps)
    train(student, optimizer, islice(texts, steps // 2))
    torch.save({"student": student.state_dict(), "optimizer": optimizer.state_dict()}, saved)
    saved.seek(0)
    checkpoint = torch.load(saved)
    student, optimizer = fresh(steps)
    student.load_state_dict(checkpoint["student"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    train(student, optimizer, islice(texts, steps - steps // 2))
    return student


def main(steps: int = 300) -> tuple[list[float], fxopt.Report]:
    """Train, resume, convert; return the losses and the report of the conversion."""
    student, optimizer = fresh(steps)
    print(fxopt.prepared(student).report, "\n")
    losses = train(student, optimizer, islice(excerpts(), steps))
    print(f"loss: {losses[0]:.3f} at first, {losses[-1]:.3f} after {steps} steps")

    other = interrupted(steps).state_dict()
    same = all(torch.equal(value, other[name]) for name, value in student.state_dict().items())
    print(f"interrupted and resumed: {'the same bits' if same else 'something else'}")
    if not same:
        raise RuntimeError("the resumed run differs from the uninterrupted one")

    fast = fxopt.convert(student, [text[:, :-1] for text in islice(excerpts(seed=2), 8)])
    print(f"\n{fast.report}\n")
    with torch.no_grad():
        before, after = (float(loss_of(model.eval(), next(excerpts(seed=3)))) for model in (student, fast))
    print(f"loss on another excerpt: {before:.3f} of the student, {after:.3f} converted")
    return losses, fast.report


if __name__ == "__main__":
    main()
