"""Which of the optional operands a linear attention has, and what the kernels do with them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from fxopt.codegen.template import fill, listing
from fxopt.errors import LoweringError

_TEXT: Final = re.compile(r"(p?)(k?)(?:c(\d+))?")
_ADD_POSITIONS: Final = (
    "key += load_tokens(positions, n, Sk, d, positions_stride_n, positions_stride_d, $head_dim, EVEN_D).to(tl.float32)"
)
_DROP_PADDING: Final = """\
kept = tl.load(keep + n.to(tl.int64) * keep_stride_n, mask=n < Sk, other=0)
key = tl.where((kept != 0)[:, None], key, 0.0)
"""


@dataclass(frozen=True, slots=True)
class Operands:
    """Whether there are positions and a mask of keys, and the side of the filters (0: no convolution).

    Prints as ``pkc5``, each letter only where it applies; `read_operands` is the inverse.
    """

    positions: bool = False
    keep: bool = False
    taps: int = 0

    def __str__(self) -> str:
        return "p" * self.positions + "k" * self.keep + (f"c{self.taps}" if self.taps else "")

    def keys(self, *others: str) -> dict[str, str]:
        """The tensors that keys are loaded from, with their axes, and ``others`` that lie as values do."""
        optional = {"positions": "hnd"} if self.positions else {}
        optional |= {"keep": "bn"} if self.keep else {}
        return {"k": "bhnd", **dict.fromkeys(others, "bhne"), **optional}

    @property
    def local(self) -> dict[str, str]:
        """The tensors of the convolution, with their axes."""
        return {"weight": "eyx", "bias": "e"} if self.taps else {}

    def holes(self, holes: Mapping[str, str]) -> dict[str, str]:
        """The holes of the kernels that say how keys are loaded."""
        names = ["k", "n", "Sk", "d", "k_stride_n", "k_stride_d"]
        names += ["positions", "positions_stride_n", "positions_stride_d"] if self.positions else []
        names += ["keep", "keep_stride_n"] if self.keep else []
        return {
            "keys_parameters": "\n".join([*(f"{name}," for name in names), "EVEN_D: tl.constexpr,"]),
            "keys_arguments": listing([*names, "EVEN_D"]),
            "add_positions": fill(_ADD_POSITIONS, holes).rstrip() if self.positions else "",
            "drop_padding": _DROP_PADDING.rstrip() if self.keep else "",
        }


def read_operands(printed: str) -> Operands:
    """Read what ``str(Operands)`` printed; raises `LoweringError` on anything else."""
    match = _TEXT.fullmatch(printed)
    if match is None:
        raise LoweringError(f"{printed!r} names no operands of a linear attention; an example is 'pkc5'")
    return Operands(bool(match[1]), bool(match[2]), int(match[3] or 0))
