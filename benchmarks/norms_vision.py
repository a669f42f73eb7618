"""LayerNorm, BatchNorm in its place, RepBatchNorm, UnifiedNorm, and linear attention in a small transformer of digits.

    python -m benchmarks.norms_vision [--digits digits.csv.gz] [--tiny] [--output results.json]

The 1,797 scanned digits that come with scikit-learn (``pip install scikit-learn``; or give its file ``digits.csv.gz``
with ``--digits``), enlarged from 8 x 8 to 32 x 32 and cut into 64 patches. A pre-norm transformer without class token
learns three fifths of them, moved and scaled at random; the score is the percentage of the others that the converted
model gets right. Every variant starts from the same weights and sees the same images, for each of three seeds, which
also divide the images.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import affine_grid, cross_entropy, grid_sample, interpolate, scaled_dot_product_attention

import fxopt
from benchmarks.norm_training import NORMS, Inputs, Settings, Task, Variants, parser_of, report, run_all, save
from benchmarks.progress import Progress

_IMAGES: Final = 1797
_TRAINED: Final = 1079  # three fifths
_CLASSES: Final = 10
_CALIBRATED: Final = 16


#: The norms; UnifiedNorm filters outliers, as is meant for images. The last one keeps LayerNorm.
_KNOWN: Final[Variants] = {
    **NORMS,
    "UnifiedNorm": lambda steps: [fxopt.passes.UnifiedNorm(warmup=steps // 10, filter_outliers=True)],
    "SimplifiedLinearAttention": lambda steps: [fxopt.passes.SimplifiedLinearAttention()],
}


@dataclass(frozen=True)
class Sizes:
    """Of the transformer and of its batches."""

    channels: int = 128
    layers: int = 6
    heads: int = 4
    patch: int = 4
    image: int = 32
    batch: int = 128

    @property
    def tokens(self) -> int:
        """Patches of an image."""
        return (self.image // self.patch) ** 2


TINY: Final = Sizes(channels=48, layers=3, heads=3, batch=64)


class Block(nn.Module):
    """Attention and a feed-forward layer, each behind a norm."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        channels = sizes.channels
        self.heads = sizes.heads
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.up, self.down = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)

    def forward(self, x_BNC: Tensor) -> Tensor:
        """``[B, N, C]`` to ``[B, N, C]``."""
        packed = self.qkv(self.norm1(x_BNC)).unflatten(-1, (3, self.heads, -1))
        q_BHND, k_BHND, v_BHND = packed.permute(2, 0, 3, 1, 4).unbind(0)
        mixed_BHND = scaled_dot_product_attention(q_BHND, k_BHND, v_BHND)
        x_BNC = x_BNC + self.out(mixed_BHND.transpose(1, 2).flatten(2))
        fed_BNC: Tensor = self.down(nn.functional.gelu(self.up(self.norm2(x_BNC))))
        return x_BNC + fed_BNC


class VisionTransformer(nn.Module):
    """Logits ``[B, 10]`` of images ``[B, 1, H, W]``, from the mean of all tokens."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, sizes.channels, sizes.patch, sizes.patch)
        self.positions = nn.Parameter(torch.randn(sizes.tokens, sizes.channels) * 0.02)
        self.blocks = nn.Sequential(*(Block(sizes) for _ in range(sizes.layers)))
        self.norm = nn.LayerNorm(sizes.channels)
        self.head = nn.Linear(sizes.channels, _CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        x_BNC = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(x_BNC)).mean(1))
        return logits


class Digits:
    """The images ``[1797, 1, 32, 32]`` and their labels, divided by the seed, and batches of them."""

    def __init__(self, images: Tensor, labels: Tensor, sizes: Sizes, device: str) -> None:
        large = interpolate(images[:, None], size=(sizes.image, sizes.image), mode="bilinear")
        self.images = ((large - large.mean()) / large.std()).to(device)
        self.labels, self.sizes, self.device = labels.to(device), sizes, device

    def batches(self, seed: int) -> Iterator[tuple[Inputs, Tensor]]:
        """Random images of the training part, each moved by up to two of its 32 pixels and scaled by up to a tenth."""
        order = self._order(seed)[:_TRAINED]
        draw = torch.Generator(self.device).manual_seed(seed)
        while True:
            chosen = order[torch.randint(_TRAINED, (self.sizes.batch,), generator=draw, device=self.device)]
            yield (self._moved(self.images[chosen], draw),), self.labels[chosen]

    def calibration(self, seed: int) -> Iterable[Inputs]:
        """Some of them for statistics."""
        batches = self.batches(seed)
        return [next(batches)[0] for _ in range(_CALIBRATED)]

    def score(self, model: nn.Module, seed: int) -> float:
        """Percentage of the other images that ``model`` gets right, in batches of the size that it was trained with."""
        rest = self._order(seed)[_TRAINED:]
        padded = torch.cat((rest, rest[: -len(rest) % self.sizes.batch]))
        with torch.no_grad():
            right = [
                model(self.images[part]).argmax(-1) == self.labels[part] for part in padded.split(self.sizes.batch)
            ]
        return 100 * float(torch.cat(right)[: len(rest)].float().mean())

    def _order(self, seed: int) -> Tensor:
        return torch.randperm(_IMAGES, generator=torch.Generator().manual_seed(seed)).to(self.device)

    def _moved(self, images: Tensor, draw: torch.Generator) -> Tensor:
        count = len(images)
        moves = (torch.rand(count, 2, 1, generator=draw, device=self.device) - 0.5) * (8 / self.sizes.image)
        scales = 1 + (torch.rand(count, 1, 1, generator=draw, device=self.device) - 0.5) / 5
        turns = torch.cat((scales * torch.eye(2, device=self.device), moves), dim=2)
        grid = affine_grid(turns, list(images.shape), align_corners=False)
        return grid_sample(images, grid, padding_mode="border", align_corners=False)


def read_digits(path: Path | None) -> tuple[Tensor, Tensor]:
    """Images ``[1797, 8, 8]`` and labels, from the file of scikit-learn or from scikit-learn itself."""
    if path is None:
        path = _installed()
    with gzip.open(path, "rt") as file:
        rows = torch.tensor([[float(number) for number in row] for row in csv.reader(file)])
    return rows[:, :64].reshape(-1, 8, 8), rows[:, 64].long()


def _installed() -> Path:
    try:
        import sklearn
    except ImportError as error:
        raise SystemExit("the digits come with scikit-learn: pip install scikit-learn, or give --digits") from error
    return Path(sklearn.__file__).parent / "datasets" / "data" / "digits.csv.gz"


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, train, print the table, write the results."""
    parser = parser_of(__doc__, _KNOWN, list(_KNOWN))
    parser.add_argument("--digits", type=Path, help="scikit-learn's digits.csv.gz; by default the installed one")
    options = parser.parse_args(arguments)
    sizes = TINY if options.tiny else Sizes()
    steps = options.steps or (200 if options.tiny else 2000)
    settings = Settings(steps, options.rate, max(1, steps // 20), options.device, compiled=not options.tiny)
    digits = Digits(*read_digits(options.digits), sizes, options.device)
    task = Task(
        lambda: VisionTransformer(sizes), digits.batches, cross_entropy, digits.score, digits.calibration,
        higher_is_better=True,
    )  # fmt: skip
    # In bfloat16 PyTorch 2.11's fused backward gives NaN here where logits are large, which its plain one does not.
    with sdpa_kernel(SDPBackend.MATH):
        runs = run_all(task, settings, {norm: _KNOWN[norm] for norm in options.norms}, options.seeds, Progress())
    title = f"Digits that were not trained, % right, {steps} steps, seeds {options.seeds}"
    print(report(title, runs, task, steps))
    if options.output:
        save(options.output, title, runs, {"sizes": vars(sizes)}, settings)


if __name__ == "__main__":
    main()
