"""How a split attention kernel is cut, and which cuts are worth measuring."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

import torch

from fxopt.codegen.attention.portable.config import padded
from fxopt.errors import LoweringError

PREFIX: Final = "split"
#: Rows (query, head) of one key/value head that are computed together, at most.
LARGEST_TILE: Final = 64
_TEXT: Final = re.compile(PREFIX + r":(\d+)w(\d+)s(\d+)(?:x(\d+))?")
#: Shared memory of one multiprocessor in bytes, by compute capability (others: 100 KiB).
_SHARED: Final[dict[tuple[int, int], int]] = {(8, 0): 167_936, (9, 0): 233_472, (10, 0): 233_472, (10, 3): 233_472}
_SHARED_DEFAULT: Final = 102_400
#: What a program takes beside the blocks in flight: one KiB of the driver's, reductions and changes of layout.
_SHARED_BESIDE: Final = 8_192
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


def fitting(
    head_dim: int, value_dim: int, dtype: torch.dtype, capability: tuple[int, int], rows: int
) -> tuple[Config, ...]:
    """The configurations to measure, best guess first, at most two: many small programs, and few with long blocks.

    ``rows`` is the size of a tile. The blocks of one stage take some 32 KiB whatever the head dimensions.
    """
    width = padded(head_dim) + max(padded(head_dim), padded(value_dim))
    bytes_of_key = width * dtype.itemsize
    block_n = min(256, max(16, _power_below(_STAGE // bytes_of_key)))
    # Accumulators of 64 rows by 256 columns want the registers of eight warps.
    num_warps = 8 if max(16, rows) * width > 64 * 256 else 4
    limit = _SHARED.get(capability, _SHARED_DEFAULT)
    wanted = ((block_n, num_warps, 3, 2), (2 * block_n, 8, 3, 1), (block_n, num_warps, 2, 1))
    found = (Config(*sizes) for sizes in wanted)
    return tuple(c for c in found if _shared_bytes(c, bytes_of_key, rows) <= limit)[:2]


def _shared_bytes(config: Config, bytes_of_key: int, rows: int) -> int:
    """Shared memory of one multiprocessor that the programs on it take."""
    blocks = config.num_stages * config.block_n * bytes_of_key
    return config.programs * (blocks + max(16, rows) * bytes_of_key // 2 + _SHARED_BESIDE)


def _power_below(size: int) -> int:
    return 1 << max(size.bit_length() - 1, 0)
