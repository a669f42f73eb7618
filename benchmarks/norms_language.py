"""LayerNorm, BatchNorm put in its place, RepBatchNorm and UnifiedNorm in a small decoder of text, byte by byte.

    python -m benchmarks.norms_language --text corpus.txt [--tiny] [--output results.json]

A pre-norm decoder learns to predict the next byte of nine tenths of a text; the score is the loss, in nats a byte, of
the converted model on the last tenth. Every norm starts from the same weights and sees the same batches, for each of
three seeds. Any text file will do; the excerpt that comes with the examples only shows that the script runs.

``--norms LayerNorm LinearAttention`` trains the same decoder with its LayerNorms and causal linear attention, beside
softmax attention; ``"RepBatchNorm from zero"`` is the other one that is trained when named.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import fxopt
from benchmarks.norm_training import NORMS, Inputs, Settings, Task, Variants, parser_of, report, run_all, save
from benchmarks.progress import Progress

_EXCERPT: Final = Path(__file__).parent.parent / "examples" / "data" / "sonnets.txt"
_BYTES: Final = 256
_EVALUATED: Final = 16  # batches of the last tenth
_CALIBRATED: Final = 16  # batches of the rest


@dataclass(frozen=True)
class Sizes:
    """Of the decoder and of its batches."""

    channels: int = 256
    layers: int = 6
    heads: int = 4
    length: int = 256
    batch: int = 64
    dropout: float = 0.2


#: The norms, and what is trained when named: RepBatchNorm as LLaMA models are begun with it, and linear attention.
_FROM_ZERO: Final = "RepBatchNorm from zero"
_KNOWN: Final[Variants] = {
    **NORMS,
    _FROM_ZERO: lambda steps: [
        fxopt.passes.RepBatchNorm(steps=steps * 7 // 10, warmup=steps // 10, alpha=0.0, start=0.0)
    ],
    "LinearAttention": lambda steps: [fxopt.passes.LinearAttention()],
}
TINY: Final = Sizes(channels=64, layers=2, heads=2, length=64, batch=16, dropout=0.0)


class Block(nn.Module):
    """Causal attention and a feed-forward layer, each behind a norm."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        channels = sizes.channels
        self.heads = sizes.heads
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.up, self.down = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.drop = nn.Dropout(sizes.dropout)

    def forward(self, x_BSC: Tensor) -> Tensor:
        """``[B, S, C]`` to ``[B, S, C]``."""
        packed = self.qkv(self.norm1(x_BSC)).unflatten(-1, (3, self.heads, -1))
        q_BHSD, k_BHSD, v_BHSD = packed.permute(2, 0, 3, 1, 4).unbind(0)
        mixed_BHSD = scaled_dot_product_attention(q_BHSD, k_BHSD, v_BHSD, is_causal=True)
        x_BSC = x_BSC + self.drop(self.out(mixed_BHSD.transpose(1, 2).flatten(2)))
        fed_BSC: Tensor = self.drop(self.down(nn.functional.gelu(self.up(self.norm2(x_BSC)))))
        return x_BSC + fed_BSC


class Decoder(nn.Module):
    """Logits ``[B, S, 256]`` of the byte after each of ``[B, S]``."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.bytes = nn.Embedding(_BYTES, sizes.channels)
        self.positions = nn.Parameter(torch.randn(sizes.length, sizes.channels) * 0.02)
        self.blocks = nn.Sequential(*(Block(sizes) for _ in range(sizes.layers)))
        self.norm = nn.LayerNorm(sizes.channels)
        self.head = nn.Linear(sizes.channels, _BYTES)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, text_BS: Tensor) -> Tensor:
        """See the class."""
        x_BSC = self.bytes(text_BS) + self.positions[: text_BS.shape[1]]
        logits_BSV: Tensor = self.head(self.norm(self.blocks(x_BSC)))
        return logits_BSV


class Corpus:
    """The bytes of a text, the last tenth held out, and batches of it."""

    def __init__(self, path: Path, sizes: Sizes, device: str) -> None:
        data = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).to(device, torch.int64)
        held_out = max(len(data) // 10, sizes.length + 2)
        self.train, self.held_out = data[:-held_out], data[-held_out:]
        self.sizes, self.device = sizes, device

    def batches(self, seed: int) -> Iterator[tuple[Inputs, Tensor]]:
        """Random excerpts of the training part, and the bytes after each byte."""
        draw = torch.Generator(self.device).manual_seed(seed)
        while True:
            yield self._excerpts(self.train, draw)

    def calibration(self, seed: int) -> Iterable[Inputs]:
        """Some of them for statistics."""
        batches = self.batches(seed + 500)
        return [next(batches)[0] for _ in range(_CALIBRATED)]

    def score(self, model: nn.Module, seed: int) -> float:
        """Mean loss on excerpts of the held-out part, the same for every model."""
        draw = torch.Generator(self.device).manual_seed(0)
        with torch.no_grad():
            losses = [loss(model(*args), text) for args, text in (self._excerpts(self.held_out, draw)
                                                                  for _ in range(_EVALUATED))]  # fmt: skip
        return float(torch.stack(losses).mean())

    def _excerpts(self, text: Tensor, draw: torch.Generator) -> tuple[Inputs, Tensor]:
        span = torch.arange(self.sizes.length + 1, device=self.device)
        most = len(text) - self.sizes.length
        starts = torch.randint(most, (self.sizes.batch, 1), generator=draw, device=self.device)
        rows = text[starts + span]
        return (rows[:, :-1],), rows[:, 1:]


def loss(logits_BSV: Tensor, text_BS: Tensor) -> Tensor:
    """Mean cross entropy."""
    return cross_entropy(logits_BSV.flatten(0, 1).float(), text_BS.flatten())


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, train, print the table, write the results."""
    parser = parser_of(__doc__, _KNOWN, list(NORMS))
    parser.add_argument("--text", type=Path, default=_EXCERPT, help="any text file")
    parser.add_argument("--dropout", type=float, help="of the decoder (default 0.2; 0 with --tiny)")
    options = parser.parse_args(arguments)
    usual = TINY if options.tiny else Sizes()
    sizes = replace(usual, dropout=usual.dropout if options.dropout is None else options.dropout)
    steps = options.steps or (300 if options.tiny else 1200)
    settings = Settings(steps, options.rate, max(1, steps // 20), options.device, compiled=not options.tiny)
    corpus = Corpus(options.text, sizes, options.device)
    task = Task(lambda: Decoder(sizes), corpus.batches, loss, corpus.score, corpus.calibration)
    runs = run_all(task, settings, {norm: _KNOWN[norm] for norm in options.norms}, options.seeds, Progress())
    title = f"Loss in nats a byte on the last tenth of {options.text.name}, {steps} steps, seeds {options.seeds}"
    print(report(title, runs, task, steps))
    if options.output:
        save(options.output, title, runs, {"sizes": vars(sizes), "text": options.text.name}, settings)


if __name__ == "__main__":
    main()
