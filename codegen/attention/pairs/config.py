"""How a kernel for few keys on Hopper is cut: rows of a turn, pieces of keys, groups of warps, what is in flight."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from fxopt.errors import LoweringError

PREFIX: Final = "pairs"
_TEXT: Final = re.compile(r"pairs:(\d+)x(\d+(?:\+\d+)*)g(\d)s(\d)q(\d)")
#: Rows of a block, one group of four warps.
BLOCK: Final = 64
#: The most keys that a group holds at once.
LONGEST: Final = 256
#: Registers of a thread that multiplies, by the number of its groups; the loading group keeps 24.
_REGISTERS: Final = {2: 240, 3: 160}


@dataclass(frozen=True, slots=True)
class Config:
    """``rows`` query rows of one (batch, head) pair in a turn, 64 to a block, against all keys at once.

    Attributes:
        rows: of a turn, a multiple of 64.
        pieces: the keys, in at most three pieces that are powers of two from 16, in falling order, 256 in all.
        groups: of four warps that take the blocks of a program in turn.
        stages: turns whose keys and values are in flight.
        queries: blocks of queries in flight.

    Prints as ``pairs:256x128+64+16g2s2q4``; `read_config` is the inverse.
    """

    rows: int
    pieces: tuple[int, ...]
    groups: int
    stages: int
    queries: int

    def __post_init__(self) -> None:
        powers = all(n >= 16 and n & (n - 1) == 0 for n in self.pieces)
        falling = list(self.pieces) == sorted(self.pieces, reverse=True)
        if not powers or not falling or not 1 <= len(self.pieces) <= 3 or self.keys > LONGEST:
            raise LoweringError(
                f"{self} is not a configuration: up to three falling powers of two from 16, {LONGEST} keys at most"
            )
        if self.rows < BLOCK or self.rows % BLOCK or self.groups not in _REGISTERS:
            raise LoweringError(f"{self} is not a configuration: rows in {BLOCK}s, and two or three groups of warps")
        if self.blocks < self.groups:
            raise LoweringError(f"{self} is not a configuration: every group has a block of every turn")
        # A barrier tells even from odd uses only: a group waits for places that it alone used before.
        if self.stages < 1 or self.queries < 1 or self.queries % self.groups:
            raise LoweringError(f"{self} is not a configuration: stages from 1, blocks of queries a multiple of groups")

    @property
    def blocks(self) -> int:
        """Blocks of rows of a turn."""
        return self.rows // BLOCK

    @property
    def keys(self) -> int:
        """The most keys that it serves."""
        return sum(self.pieces)

    @property
    def starts(self) -> tuple[int, ...]:
        """The first key of each piece."""
        return tuple(sum(self.pieces[:n]) for n in range(len(self.pieces)))

    @property
    def part(self) -> int:
        """Keys that one copy brings."""
        return min(self.pieces)

    @property
    def registers(self) -> int:
        """Registers of each thread that multiplies."""
        return _REGISTERS[self.groups]

    def __str__(self) -> str:
        pieces = "+".join(map(str, self.pieces))
        return f"{PREFIX}:{self.rows}x{pieces}g{self.groups}s{self.stages}q{self.queries}"


def read_config(text: str) -> Config:
    """Read what ``str(Config)`` printed; raises `LoweringError` on anything else."""
    match = _TEXT.fullmatch(text)
    if match is None:
        raise LoweringError(f"not a configuration of this kernel: {text!r}; an example is 'pairs:256x128g2s2q4'")
    rows, pieces, groups, stages, queries = match.groups()
    return Config(int(rows), tuple(map(int, pieces.split("+"))), int(groups), int(stages), int(queries))
