"""How a kernel for few keys is cut: rows, pieces of keys, warps, and what one program does in sequence."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from fxopt.errors import LoweringError

_TEXT: Final = re.compile(r"short:(\d+)x(\d+(?:\+\d+)*)w(\d+)([pr])(\d+)(?:s(\d+))?(?:m(\d+))?")
Walk = Literal["batch", "rows"]
_WALKS: Final[dict[str, Walk]] = {"p": "batch", "r": "rows"}
#: The most keys that a kernel holds at once.
LONGEST: Final = 256
_EXAMPLE: Final = "'short:64x128+64+16w4r4'"


@dataclass(frozen=True, slots=True)
class Config:
    """``rows`` query rows against all keys at once, by ``warps`` warps.

    Attributes:
        rows: of a block, a power of two from 16.
        pieces: the keys, in pieces that are powers of two from 16, at most 256 in all.
        warps: of a program, a power of two.
        walk: what a program goes through in sequence: ``"batch"``, one block of rows in several batch entries, with
            what the batch does not change kept in registers; or ``"rows"``, several blocks of rows of one head, with
            keys and values kept in shared memory.
        steps: how many of them, at most; a launch argument of the kernel.
        stages: how many steps ahead loads run; 1 for none.
        registers: the most a thread may take, so that more programs share a multiprocessor (0: no cap).

    Prints as ``short:64x64w2p8`` (batch) or ``short:64x128+64+16w4r4`` (rows), with loads ahead ``short:64x64w2p8s2``,
    with a cap ``short:64x64w2p8m128``; `read_config` is the inverse.
    """

    rows: int
    pieces: tuple[int, ...]
    warps: int
    walk: Walk
    steps: int
    stages: int = 1
    registers: int = 0

    def __post_init__(self) -> None:
        powers = all(n > 0 and n & (n - 1) == 0 for n in (self.rows, self.warps, *self.pieces))
        if not powers or min(self.rows, *self.pieces) < 16 or self.keys > LONGEST:
            raise LoweringError(
                f"{self} is not a configuration: blocks are powers of two from 16, keys at most {LONGEST}"
            )
        if min(self.steps, self.stages) < 1 or self.registers % 8 or self.registers > 255:
            raise LoweringError(
                f"{self} is not a configuration: steps and stages from 1, registers in eights below 256"
            )

    @property
    def keys(self) -> int:
        """The most keys that it serves."""
        return sum(self.pieces)

    @property
    def starts(self) -> tuple[int, ...]:
        """The first key of each piece."""
        return tuple(sum(self.pieces[:n]) for n in range(len(self.pieces)))

    def __str__(self) -> str:
        walk = next(letter for letter, name in _WALKS.items() if name == self.walk)
        ahead = f"s{self.stages}" if self.stages != 1 else ""
        cap = f"m{self.registers}" if self.registers else ""
        return f"short:{self.rows}x{'+'.join(map(str, self.pieces))}w{self.warps}{walk}{self.steps}{ahead}{cap}"


def read_config(text: str) -> Config:
    """Read what ``str(Config)`` printed; raises `LoweringError` on anything else."""
    match = _TEXT.fullmatch(text)
    if match is None:
        raise LoweringError(f"not a configuration of a kernel for few keys: {text!r}; an example is {_EXAMPLE}")
    rows, pieces, warps, walk, steps, stages, registers = match.groups()
    cut = tuple(map(int, pieces.split("+")))
    return Config(int(rows), cut, int(warps), _WALKS[walk], int(steps), int(stages or 1), int(registers or 0))


def cut(keys: int, largest: int = 128) -> tuple[int, ...]:
    """The pieces, powers of two from 16 to ``largest`` in falling order, that hold ``keys`` with the least to spare.

    Pieces that would add up to the next power of two are one: 64 = 64, not 32 + 16 + 16.
    """
    pieces: list[int] = []
    left = -(-keys // 16) * 16
    while left:
        piece = min(largest, 1 << left.bit_length() - 1)
        pieces.append(piece)
        left -= piece
    return _joined(pieces, largest)


def _joined(pieces: Sequence[int], largest: int) -> tuple[int, ...]:
    """At most three pieces: more are rounded up, the smallest first."""
    pieces = list(pieces)
    while len(pieces) > 3 and pieces[-2] < largest:
        pieces = [*pieces[:-2], pieces[-2] * 2]
        while len(pieces) > 1 and pieces[-1] == pieces[-2] < largest:
            pieces = [*pieces[:-2], pieces[-1] * 2]
    return tuple(pieces)
