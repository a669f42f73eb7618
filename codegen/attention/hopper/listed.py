"""A stream that goes through lists of the blocks of keys that a mask keeps, in place of runs of blocks.

The lists are those of `fxopt.codegen.attention.portable.key_lists`. A block's number in the stream is its place in the
list: whole ones first, so that what comes before one number is whole, and the others, in part, are worked on before
them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fxopt.codegen.attention.gluon import as_gluon
from fxopt.codegen.attention.portable import hull_lists
from fxopt.codegen.attention.portable.hull_lists import HullLists

RANGE: Final = '''
@gluon.jit
def key_blocks(listed, BLOCK_N: gl.constexpr):
    """Places in a list of blocks of keys, at least one, and how many of them are of whole blocks."""
    wholly = gl.load(listed + 1)
    return 0, 0, wholly, gl.maximum(gl.load(listed) + wholly, 1)


@gluon.jit
def key_at(listed, place, wholly, Sk, BLOCK_N: gl.constexpr):
    """The first key of the block at a place of the list, where whole ones stand from the end on."""
    return gl.load(listed + gl.where(place < wholly, gl.cdiv(Sk, BLOCK_N) + 1 - place, 2 + place - wholly))

'''
#: What tells of a tile where its list is.
NAME: Final = "listed"
_NUMBER: Final = "n = key_at(listed, stop - 1 - step, full_stop, Sk, BLOCK_N) // BLOCK_N"
_NEXT: Final = "key = key_at(listed, block, full_stop, Sk, BLOCK_N)"


@dataclass(frozen=True, slots=True)
class Blocks:
    """How a place in the stream tells which block of keys it is.

    Attributes:
        hull: the lists of hulls with holes, where there are any.
        listed: whether the stream goes through lists of the blocks that a mask keeps.
        cut_at_start: whether the first blocks of a run may be partial.
    """

    hull: HullLists | None
    listed: bool
    cut_at_start: bool

    @property
    def are_listed(self) -> bool:
        """Whether a tile has a list."""
        return self.listed or self.hull is not None

    @property
    def name(self) -> str:
        """What the number of a block is called: its place, where no list of a hull says otherwise."""
        return "block" if self.hull is None else "number"

    @property
    def key(self) -> str:
        """The first key of the block that is worked on."""
        return "key" if self.listed else f"{self.name} * BLOCK_N"

    @property
    def next(self) -> str:
        """The lines that tell which block comes next."""
        if self.hull is not None:
            return hull_lists.NEXT.format(cut=self._cut)
        return _NEXT if self.listed else ""

    @property
    def holes(self) -> dict[str, str]:
        """The holes of the number of the block that is loaded, of the places of a tile, and of which are partial."""
        if self.hull is not None:
            return {"number": hull_lists.NUMBER, "hull_places": as_gluon(self.hull.places), "partial": "cut"}
        return {"number": _NUMBER if self.listed else "n = stop - 1 - step", "hull_places": "", "partial": self._cut}

    @property
    def _cut(self) -> str:
        return "(block >= full_stop)" + " | (block < full_start)" * (self.cut_at_start and not self.listed)
