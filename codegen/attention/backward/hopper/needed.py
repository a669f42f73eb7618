"""Blocks of rows that keep none of a block's keys, told from captured vectors when the kernel runs: padding, documents.

The forward's hulls (`fxopt.codegen.attention.portable.hull`) with rows and keys in each other's place: for each batch
entry and block of keys the first row that can possibly keep one of them, and one past the last.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Final

from fxopt.codegen.attention.backward.hopper.listed import RowLists
from fxopt.codegen.attention.gluon import as_gluon
from fxopt.codegen.attention.portable.hull import Hull
from fxopt.codegen.attention.portable.turned import turn, turned_host
from fxopt.codegen.attention.possible import possible_keys
from fxopt.ir.attention import AttentionSpec

_WHOSE: Final = "keys that a block of query rows can possibly keep"
_TURNED: Final = "rows ``j`` that can possibly keep a key ``i`` of a block"
#: On an H100 2048 rows gain what is left out; with 512 the launch of one more kernel costs as much.
_FEWEST: Final = 1024
_FEW: Final = "# Few blocks of rows are not worth a kernel that finds out which are needed."


@dataclasses.dataclass(frozen=True, slots=True)
class Needed:
    """The text around the rows that blocks of ``keys`` need, in blocks of ``rows``."""

    hull: Hull
    argument: ClassVar[str] = "hull"
    constants: ClassVar[tuple[str, ...]] = ("HULL",)

    @property
    def holes(self) -> dict[str, str]:
        """The lines around them, as holes of the templates."""
        return {"hull_limits": as_gluon(self.limits), "allocate_hull": self.allocate, "launch_hull": self.launch}

    @property
    def kernel(self) -> str:
        """The small kernel."""
        return self.hull.kernel.replace(_WHOSE, _TURNED)

    @property
    def limits(self) -> str:
        """The lines that read the limits of a program's ``block`` of keys, in whole blocks of rows."""
        text = self.hull.limits.replace("first // BLOCK_M", "block").replace("BLOCK_N", "BLOCK_M")
        return text.replace("hull_stop = 0, Sk", "hull_stop = 0, Sq")

    @property
    def allocate(self) -> str:
        """The launcher's lines that allocate the limits."""
        _, *lines = self.hull.allocate.splitlines()
        return "\n".join((_FEW, *map(turned_host, lines)))

    @property
    def launch(self) -> str:
        """The launcher's lines that run the small kernel."""
        return turned_host(self.hull.launch)


def needed_rows(spec: AttentionSpec, rows: int, keys: int) -> Needed | None:
    """What captured vectors say about the rows that blocks of ``keys`` need; ``None`` where they say nothing."""
    turned = turn(spec)
    found = possible_keys(turned)
    return None if found is None else Needed(Hull(turned, found, keys, rows, fewest=_FEWEST // rows))


def needed_holes(needed: Needed | RowLists | None) -> dict[str, str]:
    """The lines around those rows, as holes of the templates; empty where nothing is known."""
    nothing = dict.fromkeys(("hull_limits", "list_limits", "allocate_hull", "launch_hull"), "")
    return nothing if needed is None else nothing | needed.holes
