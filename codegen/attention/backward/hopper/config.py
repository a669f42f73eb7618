"""How the Hopper backward of an attention is cut into blocks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from fxopt.errors import LoweringError

PREFIX: Final = "hopper:"
_TEXT: Final = re.compile(r"hopper:(\d+)x(\d+)s(\d+)(a?)(list)?")


@dataclass(frozen=True, slots=True)
class Config:
    """``rows`` queries at a time against a block of ``keys``, 64 to each of the two groups of warps that multiply.

    ``stages`` blocks of rows are in flight. ``ahead`` multiplies queries with keys one block of rows before the rest,
    while dq goes to memory. What is ``listed`` goes through lists of the blocks of rows that the mask keeps. Prints as
    ``hopper:64x128s2``, ``hopper:64x128s2a`` or ``hopper:64x128s2list``; `read_config` is the inverse.
    """

    rows: int
    keys: int
    stages: int
    ahead: bool = False
    listed: bool = False

    def __post_init__(self) -> None:
        if self.rows not in (64, 128) or self.keys != 128 or self.stages not in (2, 4):
            raise LoweringError(
                f"{self} is no configuration of a Hopper backward: 64 or 128 rows, 128 keys, 2 or 4 stages"
            )

    def __str__(self) -> str:
        return f"{PREFIX}{self.rows}x{self.keys}s{self.stages}{'a' * self.ahead}{'list' * self.listed}"


def is_hopper(text: str) -> bool:
    """Whether a printed configuration of a backward belongs to this family."""
    return text.startswith(PREFIX)


def read_config(text: str) -> Config:
    """Read what ``str(Config)`` printed; raises `LoweringError` on anything else."""
    match = _TEXT.fullmatch(text)
    if match is None:
        raise LoweringError(f"not a configuration of a Hopper backward: {text!r}; an example is 'hopper:64x128s2'")
    rows, keys, stages = map(int, match.groups()[:3])
    return Config(rows, keys, stages, match[4] == "a", match[5] is not None)
