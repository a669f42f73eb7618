"""How the generated backward of an attention is cut into blocks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Final

import torch

from fxopt.codegen.attention.portable.config import Config, padded, read_config, shared_limit
from fxopt.errors import LoweringError

#: What asks for the recomputation in plain PyTorch in place of a configuration.
RECOMPUTE: Final = "recompute"
#: Configurations measured for a site.
_TRIED: Final = 2


@dataclass(frozen=True, slots=True)
class BackwardConfig:
    """The blocks of the kernels, rows by keys each; prints as ``64x128w8s2-128x64w8s2``.

    Both go through lists of the blocks that the mask keeps, or none does (``64x128w8s2list-128x64w8s2list``).

    Attributes:
        keys: of the kernel of dk and dv, which keeps a block of keys and goes through the rows.
        rows: of the kernel of dq, which keeps a block of rows and goes through the keys.
        bands: of the kernels of gradients of bands, which go along diagonals; follows the others after another dash.
    """

    keys: Config
    rows: Config
    bands: Config | None = None

    def __post_init__(self) -> None:
        if self.keys.listed != self.rows.listed or (self.listed and self.bands is not None):
            raise LoweringError(
                f"{self} is no configuration of the backward: lists are for both kernels, and for none along diagonals"
            )
        if self.bands is not None and self.bands.block_m % self.bands.block_n:
            raise LoweringError(
                f"{self} is no configuration of the backward: blocks along diagonals have whole blocks of keys as rows"
            )

    @property
    def listed(self) -> bool:
        """Whether the kernels go through lists of the blocks that the mask keeps."""
        return self.keys.listed

    def __str__(self) -> str:
        return "-".join(str(part) for part in (self.keys, self.rows, self.bands) if part is not None)


def read_backward(text: str) -> BackwardConfig:
    """Read what ``str(BackwardConfig)`` printed; raises `LoweringError` on anything else."""
    parts = text.split("-")
    if len(parts) not in (2, 3) or "tma" in text:
        raise LoweringError(
            f"not a configuration of the backward: {text!r}; an example is '64x128w8s2-128x64w8s2', without tma"
        )
    return BackwardConfig(*map(read_config, parts))


def split_config(config: str) -> tuple[str, str]:
    """Forward and backward in ``"<forward>/<backward>"``; the second is empty where it is missing."""
    forward, _, backward = config.partition("/")
    return forward, backward


#: Best guess first, by padded head dimension: one that does not spill. With three stages it spills a little at 128, and
#: is the faster one more often than not (`benchmarks/results/h100-attention-backward.json`).
_HOPPER: Final[dict[int, tuple[str, ...]]] = {
    16: ("64x128w8s2-128x64w8s2", "64x64w4s2-64x64w4s2"),
    32: ("64x128w8s2-128x64w8s2", "64x64w4s2-64x64w4s2"),
    64: ("64x128w8s2-128x64w8s2", "64x64w4s2-64x64w4s2"),
    128: ("64x128w8s2-128x64w8s3", "64x128w8s3-128x64w8s3", "64x64w8s1-64x64w8s1"),
    256: ("32x64w8s1-64x32w8s1", "32x32w4s1-32x32w4s1"),
}
#: The same where a block holds more than scores: derivatives that are not constant, tiles of captured tensors.
_HOPPER_HEAVY: Final[dict[int, tuple[str, ...]]] = {
    64: ("64x128w8s2-128x64w8s2", "32x128w8s2-128x64w8s2"),
    128: ("32x128w8s2-128x64w8s2", "64x128w8s3-128x64w8s3", "64x64w8s1-64x64w8s1"),
}
_BLACKWELL_HEAVY: Final[dict[int, tuple[str, ...]]] = {
    64: ("64x64w4s2-128x64w8s2", "32x128w8s2-128x64w8s2"),
    128: ("32x128w8s2-128x64w8s2", "64x64w8s2-64x64w4s2", "64x64w8s1-64x64w8s1"),
}
_OTHERS: Final[dict[int, tuple[str, ...]]] = {
    16: ("64x64w4s2-64x64w4s2", "32x64w4s2-64x32w4s2"),
    32: ("64x64w4s2-64x64w4s2", "32x64w4s2-64x32w4s2"),
    64: ("64x64w8s2-64x64w4s2", "32x64w4s2-64x64w4s2"),
    128: ("64x64w8s1-64x64w8s1", "32x64w4s1-64x32w4s1"),
    256: ("32x64w8s1-64x32w8s1", "32x32w8s1-32x32w8s1"),
}
_OTHERS_HEAVY: Final[dict[int, tuple[str, ...]]] = {
    64: ("32x64w8s2-64x64w4s2", "32x64w4s1-64x64w4s2"),
}
#: The same with bands, which are read in another layout than that of the scores.
_SM80_BANDS: Final[dict[int, tuple[str, ...]]] = {
    64: ("32x64w4s1-64x64w4s2", "32x64w4s2-64x64w4s2"),
    128: ("64x64w8s2-64x64w8s2", "64x64w8s1-64x32w8s1"),
}
_SM80_BANDS_DROPPING: Final[dict[int, tuple[str, ...]]] = {64: ("32x64w8s1-64x32w4s1", "32x32w4s1-64x32w4s1")}
#: With dropout, whose random words take registers: those that don't spill.
_LATER_DROPPING: Final[dict[int, tuple[str, ...]]] = {
    16: ("64x64w4s2-64x64w4s2",),
    32: ("64x64w4s2-64x64w4s2",),
    64: ("32x128w8s2-128x64w8s2", "64x128w8s2-128x64w8s2"),
    128: ("32x64w8s2-128x64w8s2", "32x64w8s2-64x64w8s2", "32x32w8s1-32x32w8s1"),
    256: ("32x32w8s1-32x32w8s1",),
}
_SM80_DROPPING: Final[dict[int, tuple[str, ...]]] = {
    16: ("32x64w4s2-64x64w4s2",),
    32: ("32x64w4s2-64x64w4s2",),
    64: ("32x64w4s1-64x64w4s2", "32x64w8s2-64x64w8s2"),
    128: ("32x64w8s2-32x64w8s2", "32x32w8s1-32x32w8s1"),
    256: ("32x32w8s1-32x32w8s1",),
}
_SINGLE: Final[dict[int, tuple[str, ...]]] = {
    16: ("32x32w4s1-32x32w4s1", "16x32w4s1-32x16w4s1"),
    32: ("32x32w4s1-32x32w4s1", "16x32w4s1-32x16w4s1"),
    64: ("32x32w8s1-32x32w8s1", "16x32w4s1-32x16w4s1"),
    128: ("16x32w8s1-32x16w8s1", "16x16w4s1-16x16w4s1"),
    256: ("16x16w8s1-16x16w8s1",),
}

#: The blocks of the kernels of bands, which hold four blocks of numbers in registers.
_DIAGONALS_LEAST: Final = "32x32w8s1"
_DIAGONALS_SM80: Final[dict[int, str]] = {64: "64x32w8s2", 128: "64x32w8s1", 256: "32x32w8s1"}
_DIAGONALS_BLACKWELL: Final[dict[int, str]] = {64: "64x64w8s2", 128: "64x64w8s1", 256: "64x64w8s1"}
_DIAGONALS_HOPPER: Final[dict[int, str]] = {64: "64x64w8s2", 128: "64x64w8s2", 256: "64x64w8s1"}


def fitting(
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    capability: tuple[int, int],
    heavy: bool = False,
    drops: bool = False,
    bands: bool = False,
) -> tuple[BackwardConfig, ...]:
    """The configurations for these sizes that fit the device, best first, at most two; none for other dtypes.

    ``heavy`` says that the derivative of the score is no constant, or that a captured tensor varies with row and key;
    ``drops`` that weights are dropped, ``bands`` that captured tensors vary with the distance of key and row.
    """
    half = _dropping(capability) if drops else _half(capability, heavy)
    if bands and capability[0] < 9:
        half = half | (_SM80_BANDS_DROPPING if drops else _SM80_BANDS)
    table = {torch.bfloat16: half, torch.float16: half, torch.float32: _SINGLE}.get(dtype, {})
    width = max(padded(head_dim), padded(value_dim))
    configs = (read_backward(text) for text in table.get(width, ()))
    limit = shared_limit(capability)
    found = tuple(c for c in configs if shared_bytes(c, head_dim, value_dim, dtype) <= limit)[:_TRIED]
    return tuple(_with_bands(c, width, dtype, capability, drops) for c in found) if bands else found


def _with_bands(
    config: BackwardConfig, width: int, dtype: torch.dtype, capability: tuple[int, int], drops: bool
) -> BackwardConfig:
    """``config`` with blocks for gradients of bands, which don't spill up to a ``width`` of 128."""
    rows = config.rows
    if dtype is torch.float32:
        return dataclasses.replace(config, bands=Config(rows.block_m, min(rows.block_m, rows.block_n), 8, 1))
    table = {8: _DIAGONALS_SM80, 9: _DIAGONALS_HOPPER}.get(capability[0], _DIAGONALS_BLACKWELL)
    best = "64x32w8s2" if drops and capability[0] < 9 else table[max(64, width)]
    bands = (read_config(text) for text in (best, _DIAGONALS_LEAST))
    limit = shared_limit(capability)
    fitting_bands = (c for c in bands if diagonal_bytes(c, width, dtype) <= limit)
    return dataclasses.replace(config, bands=next(fitting_bands))


def diagonal_bytes(config: Config, width: int, dtype: torch.dtype) -> int:
    """Shared memory that the blocks in flight of a kernel along diagonals take, for heads padded to ``width``."""
    return config.num_stages * (config.block_m + config.block_n) * 2 * width * dtype.itemsize


def _dropping(capability: tuple[int, int]) -> dict[int, tuple[str, ...]]:
    return _LATER_DROPPING if capability[0] >= 9 else _SM80_DROPPING


def _half(capability: tuple[int, int], heavy: bool) -> dict[int, tuple[str, ...]]:
    if capability[0] < 9:
        return _OTHERS | _OTHERS_HEAVY if heavy else _OTHERS
    if not heavy:
        return _HOPPER
    return _HOPPER | (_HOPPER_HEAVY if capability[0] == 9 else _BLACKWELL_HEAVY)


def shared_bytes(config: BackwardConfig, head_dim: int, value_dim: int, dtype: torch.dtype) -> int:
    """Shared memory that the blocks kept and the blocks in flight take, in the larger of the two kernels."""
    widths = padded(head_dim) + padded(value_dim)
    keys = config.keys.block_n + config.keys.num_stages * config.keys.block_m
    rows = config.rows.block_m + config.rows.num_stages * config.rows.block_n
    tile = max(config.keys.block_m * config.keys.block_n, config.rows.block_m * config.rows.block_n)
    return (max(keys, rows) * widths + tile) * dtype.itemsize


def table_config(config: BackwardConfig) -> Config:
    """The blocks of the kernel that computes the gradient of a captured tensor per row and key."""
    rows = config.rows
    if rows.block_m >= 64 and rows.block_n >= 32:
        return Config(64, 32, 4, 1)
    return Config(rows.block_m, rows.block_n, rows.num_warps, 1)


def band_config(config: BackwardConfig) -> Config:
    """The blocks of the kernels that compute gradients of bands."""
    rows = config.rows
    least = Config(min(rows.block_m, 64), min(rows.block_m, rows.block_n, 32), rows.num_warps, 1)
    return least if config.bands is None else config.bands
