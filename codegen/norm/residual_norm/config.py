"""Configurations of the kernels of a residual norm: how many rows a program takes at once, and with how many warps."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from fxopt.errors import LoweringError

#: Bytes that a thread loads at a time.
_VECTOR: Final = 16
#: The longest rows that stay in registers, forward and backward.
LONGEST: Final = 16384
LONGEST_BACKWARD: Final = 8192
_FORM: Final = re.compile(r"(\d+)w(\d+)(?:p(\d+))?")

#: Best guess first, by the longest row that they are for. Up to 1024 elements a warp holds whole rows, so that sums
#: need no barrier; 32 elements a thread are enough loads under way.
_FORWARD: Final[dict[int, tuple[str, ...]]] = {
    128: ("16w4", "8w4"),
    256: ("8w4", "4w4"),
    1024: ("4w4", "4w8"),
    2048: ("2w8", "1w4"),
    4096: ("1w4", "1w8"),
    8192: ("1w8", "1w16"),
    16384: ("1w16", "1w32"),
}
_LONG: Final = ("1w16", "1w8")
_BACKWARD: Final[dict[int, tuple[str, ...]]] = {
    128: ("16w4p4", "8w4p8"),
    256: ("8w4p4", "4w4p8"),
    768: ("4w4p4", "8w8p2"),
    1024: ("4w8p2", "4w4p3"),
    2048: ("1w4p4", "2w8p2"),
    4096: ("1w8p2", "1w16p1"),
    8192: ("1w16p1", "1w16p2"),
}


@dataclass(frozen=True)
class Config:
    """``rows`` of a program at once, its warps, and in the backward ``programs`` per multiprocessor.

    Printed as ``4w8`` and ``4w8p2``.
    """

    rows: int
    warps: int
    programs: int = 0

    def __str__(self) -> str:
        return f"{self.rows}w{self.warps}" + (f"p{self.programs}" if self.programs else "")

    def chunk(self, width: int, itemsize: int) -> int:
        """Elements of a row of ``width`` that the program's threads take at a time, of at most ``itemsize`` bytes."""
        threads = 32 * max(self.warps // self.rows, 1)
        return min(threads * _VECTOR // itemsize, 1 << (width - 1).bit_length())


def read_config(text: str) -> Config:
    """The inverse of printing.

    Raises:
        LoweringError: ``text`` is no printed configuration.
    """
    found = _FORM.fullmatch(text)
    if found is None:
        raise LoweringError(f"{text!r} is no configuration of a residual norm; they look like 4w8 and 4w8p2")
    rows, warps, programs = (int(part or 0) for part in found.groups())
    if any(number & (number - 1) or not number for number in (rows, warps)) or warps > 32:
        raise LoweringError(f"{text!r}: rows and warps must be powers of two, at most 32 warps")
    return Config(rows, warps, programs)


def split_config(text: str) -> tuple[str, str]:
    """The configurations of forward and backward in ``forward/backward``; the second is empty where there is none."""
    forward, _, backward = text.partition("/")
    return forward, backward


def candidates(width: int) -> tuple[str, ...]:
    """The configurations of the forward worth measuring, best guess first."""
    return next((listed for longest, listed in _FORWARD.items() if width <= longest), _LONG)


def backward_candidates(width: int) -> tuple[str, ...]:
    """Those of the backward; none for rows too long for it."""
    return next((listed for longest, listed in _BACKWARD.items() if width <= longest), ())
