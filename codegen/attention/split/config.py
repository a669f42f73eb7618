"""How a split attention kernel is cut, and which cuts are worth measuring."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

import torch

from fxopt.codegen.attention.portable.config import padded
from fxopt.errors import LoweringError

PREFIX: Final = "split"
#: Rows (query, head) that may share a key/value head: with more of them arithmetic takes the time, not memory.
LARGEST_TILE: Final = 64
CANDIDATES: Final = 2
_TEXT: Final = re.compile(PREFIX + r":(\d+)w(\d+)s(\d+)(?:x(\d+))?")
#: Shared memory of one multiprocessor in bytes, by compute capability (others: 100 KiB).
_SHARED: Final[dict[tuple[int, int], int]] = {(8, 0): 167_936, (9, 0): 233_472, (10, 0): 233_472, (10, 3): 233_472}
_SHARED_DEFAULT: Final = 102_400
#: What a program takes beside the blocks in flight: one KiB of the driver's, reductions and changes of layout.
_SHARED_BESIDE: Final = 8_192
#: Multiples of the block, warps (0: as few as hold the tile), stages and programs per multiprocessor, best guess first.
_SMALL: Final = ((1, 0, 3, 2), (2, 8, 3, 1), (1, 0, 3, 1), (1, 0, 2, 1), (1, 0, 1, 1))
#: Eight warps with many registers each leave no room for a second program.
_LARGE: Final = ((1, 0, 5, 1), (1, 0, 3, 1), (1, 0, 2, 1))
#: Bytes of keys and values in one stage: enough of them stay in flight to fill the memory's latency.
_STAGE: Final = 32_768


@dataclass(frozen=True, slots=True)
class Config:
    """``block_n`` keys at a time by ``num_warps`` warps, ``num_stages`` loads deep, ``programs`` per multiprocessor.

    Prints as ``split:64w4s3``, with several programs per multiprocessor ``split:64w4s3x2``; `read_config` is the
    inverse.
    """

    block_n: int
    num_warps: int
    num_stages: int
    programs: int = 1

    def __post_init__(self) -> None:
        powers = all(n > 0 and n & (n - 1) == 0 for n in (self.block_n, self.num_warps))
        if not powers or self.block_n < 16 or self.num_stages < 1 or self.programs < 1:
            raise LoweringError(f"{self} is not a configuration of split kernels: keys are a power of two from 16")

    def __str__(self) -> str:
        programs = f"x{self.programs}" if self.programs > 1 else ""
        return f"{PREFIX}:{self.block_n}w{self.num_warps}s{self.num_stages}{programs}"


def read_config(text: str) -> Config:
    """Read what ``str(Config)`` printed; raises `LoweringError` on anything else."""
    match = _TEXT.fullmatch(text)
    if match is None:
        raise LoweringError(f"not a configuration of split kernels: {text!r}; an example is 'split:64w4s3x2'")
    return Config(*(int(n) for n in match.groups(default="1")))


def largest_tile(head_dim: int, value_dim: int) -> int:
    """Rows (query, head) of one key/value head that are computed together, at most: what the registers hold."""
    return LARGEST_TILE if max(padded(head_dim), padded(value_dim)) <= 128 else LARGEST_TILE // 2


def fitting(
    head_dim: int, value_dim: int, dtype: torch.dtype, capability: tuple[int, int], rows: int
) -> tuple[Config, ...]:
    """The configurations to measure, best guess first, at most two: many small programs, and few with long blocks.

    ``rows`` share a key/value head. The blocks of one stage take some 32 KiB whatever the head dimensions, half as much
    beside large tiles.
    """
    bytes_of_key = (padded(head_dim) + max(padded(head_dim), padded(value_dim))) * dtype.itemsize
    tile = min(padded(rows), largest_tile(head_dim, value_dim))
    large = tile > 32
    block_n = min(256, max(16, _power_below((_STAGE // 2 if large else _STAGE) // bytes_of_key)))
    # Four warps have too few registers for many rows, or for products of float32.
    num_warps = 8 if large or dtype is torch.float32 else 4
    limit = _SHARED.get(capability, _SHARED_DEFAULT)
    wanted = _LARGE if large else _SMALL
    found = (Config(blocks * block_n, warps or num_warps, *rest) for blocks, warps, *rest in wanted)
    return tuple(c for c in found if _shared_bytes(c, bytes_of_key, tile) <= limit)[:CANDIDATES]


def _shared_bytes(config: Config, bytes_of_key: int, tile: int) -> int:
    """Shared memory of one multiprocessor that the programs on it take, at most."""
    blocks = config.num_stages * config.block_n * bytes_of_key
    return config.programs * (blocks + tile * bytes_of_key // 2 + _SHARED_BESIDE)


def _power_below(size: int) -> int:
    return 1 << max(size.bit_length() - 1, 0)
