"""A Hopper backward whose blocks of keys go through lists of the blocks of rows that keep some of them.

The lists are those of `fxopt.codegen.attention.portable.key_lists` of the mask with rows and keys in each other's
place: blocks of which the mask keeps a part first, which ask it, and whole ones after them. Heads over 64 wide have no
registers left to tell them apart, and all their blocks ask it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

from fxopt.codegen.attention.gluon import as_gluon
from fxopt.codegen.attention.portable.key_lists import LISTS, KeyLists
from fxopt.codegen.attention.portable.turned import turn, turned_device
from fxopt.ir.attention import AttentionSpec

ROWS: Final = '''
@gluon.jit
def row_blocks(listed):
    """How many blocks of rows keep some of the keys, and how many of them, which come first, a part."""
    partly = gl.load(listed)
    return 0, partly + gl.load(listed + 1), partly


@gluon.jit
def row_at(listed, entry, partly, Sq, BLOCK_M: gl.constexpr):
    """The first row of a block of the list, where whole ones stand from the end on."""
    return gl.load(listed + gl.where(entry < partly, 2 + entry, gl.cdiv(Sq, BLOCK_M) + 1 + partly - entry))

'''
#: What tells of a block of keys where its list is, and of a block of rows whether the mask keeps a part of it.
NAME, CUT = "listed", "cut"
ROW: Final = "row = row_at(listed, entry, partly, Sq, BLOCK_M)"
#: The loop over the blocks of rows.
LOOP: Final = """\
for entry in range(start, stop):
    row = row_at(listed, entry, partly, Sq, BLOCK_M)
    cut = entry < partly
    $folded, held, step = fold_rows(
        $fold_arguments
    )
"""


@dataclass(frozen=True, slots=True)
class RowLists:
    """The text around the lists of blocks of ``rows`` that blocks of ``keys`` go through."""

    spec: AttentionSpec
    rows: int
    keys: int
    argument: ClassVar[str] = "row_lists"
    constants: ClassVar[tuple[str, ...]] = ()

    @property
    def kernel(self) -> str:
        """The small kernels."""
        return self._lists.kernel + LISTS

    @property
    def holes(self) -> dict[str, str]:
        """The lines around them, as holes of the templates."""
        return {
            "list_limits": as_gluon(turned_device(self._lists.address("block"))),
            "allocate_hull": self._lists.allocate,
            "launch_hull": self._lists.launch,
        }

    @property
    def _lists(self) -> KeyLists:
        return KeyLists(turn(self.spec), self.keys, self.rows, whose="row")
