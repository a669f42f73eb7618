"""How a Hopper attention kernel is cut into blocks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from fxopt.errors import LoweringError

PREFIX: Final = "hopper"
_TEXT: Final = re.compile(r"hopper:(\d+)x(\d+)s(\d+)q(\d+)(?:a([01]))?(b)?(list)?")
#: Registers of a thread that multiplies, by the number of its groups; the loading group keeps 24.
_REGISTERS: Final = {1: 240, 2: 240, 3: 160}


@dataclass(frozen=True, slots=True)
class Config:
    """``rows`` queries, 64 to a group of four warps, against ``keys`` keys at a time.

    ``stages`` blocks of keys and of values are in flight, and ``queries`` tiles of queries (2: the next tile is loaded
    while the result of the last one leaves). ``ahead`` is how many blocks the products of queries and keys run ahead of
    their softmax; the blocks of all tiles of a program are one stream then, while ``None`` begins every tile anew.
    With a ``baton`` the groups of a stream take turns at asking for products, so that the softmax of one runs beside
    the products of another (`fxopt.codegen.attention.hopper.baton`).
    What is ``listed`` is a stream that goes through a list of the blocks of keys that the mask keeps
    (`fxopt.codegen.attention.portable.key_lists`).
    Prints as ``hopper:128x128s2q2`` or, with one block ahead, ``hopper:128x64s4q3a1``, with a baton as
    ``hopper:192x128s3q2a0b`` and with lists as ``hopper:128x128s4q2a0list``; `read_config` is the inverse.
    """

    rows: int
    keys: int
    stages: int
    queries: int
    ahead: int | None = None
    baton: bool = False
    listed: bool = False

    def __post_init__(self) -> None:
        if (
            self.rows % 64
            or self.groups not in _REGISTERS
            or self.keys not in (64, 128)
            or self.queries not in (1, 2, 3)
        ):
            raise LoweringError(
                f"{self} is not a Hopper configuration: 64, 128 or 192 rows, 64 or 128 keys, 1 to 3 tiles"
            )
        if self.stages < 2:
            raise LoweringError(f"{self} is not a Hopper configuration: it needs two stages or more")
        # Before it leaves a tile, a group waits for what it needs next: with one block ahead, of the tile but one.
        if self.ahead is not None and (self.ahead not in (0, 1) or self.queries != 2 + self.ahead):
            raise LoweringError(
                f"{self} is not a Hopper configuration: a stream runs 0 ahead with 2 tiles, or 1 with 3"
            )
        if self.baton and (self.ahead is None or self.groups == 1):
            raise LoweringError(f"{self} is not a Hopper configuration: two groups or more of a stream pass batons")
        if self.listed and self.ahead != 0:
            raise LoweringError(f"{self} is not a Hopper configuration: lists are for streams that run 0 ahead")

    def __str__(self) -> str:
        ahead = "" if self.ahead is None else f"a{self.ahead}"
        marks = f"{'b' if self.baton else ''}{'list' if self.listed else ''}"
        return f"{PREFIX}:{self.rows}x{self.keys}s{self.stages}q{self.queries}{ahead}{marks}"

    @property
    def groups(self) -> int:
        """Groups of four warps that multiply."""
        return self.rows // 64

    @property
    def registers(self) -> int:
        """Registers of each of their threads."""
        return _REGISTERS[self.groups]


def read_config(text: str) -> Config:
    """Read what ``str(Config)`` printed; raises `LoweringError` on anything else."""
    match = _TEXT.fullmatch(text)
    if match is None:
        raise LoweringError(f"not a Hopper configuration: {text!r}; an example is 'hopper:128x128s2q2'")
    rows, keys, stages, queries = map(int, match.groups()[:4])
    ahead = None if match[5] is None else int(match[5])
    return Config(rows, keys, stages, queries, ahead, match[6] is not None, match[7] is not None)
