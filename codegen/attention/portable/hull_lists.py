"""Hulls with holes: a list of the blocks of keys within a hull that some row of a block may keep.

Documents whose numbers are in no order leave gaps in what a block of rows keeps. The kernel that finds the hull looks
at every key anyway, and writes down the blocks that hold a possible one within the bounds of the mask, in order:

    list = [2·n + cut(n) : some key j of block n is possible, first bound <= j < last bound]

where a block is not cut if all its keys are sure for all rows. So a loop goes through places in the list instead of all
blocks of the hull.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from fxopt.codegen.attention.interval import key_range
from fxopt.codegen.attention.portable.key_lists import may_have_holes
from fxopt.codegen.attention.portable.loops import key_range_text
from fxopt.codegen.attention.portable.possible_text import PossibleText
from fxopt.codegen.attention.possible import Possible
from fxopt.codegen.printing import emit
from fxopt.ir.attention import AttentionSpec
from fxopt.ir.expression import Expr

_BEGIN: Final = """\
last = tl.minimum(first + BLOCK_M, Sq) - 1
{bounds}
listed = hull_lists_ptr + tl.program_id(0).to(tl.int64) * tl.cdiv(Sk, BLOCK_N)
count = 0"""
_BLOCKS: Final = """\
inside = possible & {within}
some = tl.max(tl.reshape(inside.to(tl.int32), [STEP // BLOCK_N, BLOCK_N]), 1)
block = start // BLOCK_N + tl.arange(0, STEP // BLOCK_N)
{whole}
tl.store(listed + count + tl.cumsum(some, 0) - 1, block * 2 + tl.where(whole, 0, 1), mask=some > 0)
count += tl.sum(some, 0)"""
_SURE: Final = """\
sure_keys = ((j >= 0) & ({0})).to(tl.int32)
whole &= tl.min(tl.reshape(sure_keys, [STEP // BLOCK_N, BLOCK_N]), 1) != 0"""
_COUNT: Final = """\
tl.store(hull + {count}, count)
# What needs a block to work on takes the first one, of which the mask keeps nothing.
tl.store(listed, 1, mask=count == 0)"""
_PLACES: Final = """\
if HULL:
    start, stop = 0, tl.maximum(tl.load(hull + {count}), 1)"""
_ADDRESS: Final = """\
listed = hull_lists_ptr
if HULL:
    listed += (b * blocks + {block}).to(tl.int64) * tl.cdiv(Sk, BLOCK_N)"""
#: The number of the block at a place.
NUMBER: Final = """\
n = stop - 1 - step
if HULL:
    n = gl.load(listed + n) >> 1"""
#: The same of the block that comes next, and whether it is cut.
NEXT: Final = """\
number, cut = block, {cut}
if HULL:
    number = gl.load(listed + block)
    cut = (number & 1) != 0
    number = number >> 1"""
_ALLOCATE: Final = (
    "hull_lists = torch.empty(hulls * -(-keys // {keys}) if hulled else 0, dtype=torch.int32, device=q.device)"
)


@dataclass(frozen=True, slots=True)
class HullLists:
    """The text around the lists of hulls, whose lengths are their numbers ``count``, for blocks of ``block_n`` keys."""

    spec: AttentionSpec
    possible: Possible
    count: int
    block_n: int

    @property
    def holes(self) -> dict[str, str]:
        """Those of the kernel that finds hulls."""
        bounds = key_range(self.spec, further=True)
        lower = bool(bounds.side("lower"))
        return {
            "list_begin": _BEGIN.format(bounds=key_range_text(bounds, self._emit)),
            "list_blocks": _BLOCKS.format(within="(j < stop)" + " & (j >= start_block)" * lower, whole=self._whole),
            "list_count": _COUNT.format(count=self.count),
        }

    @property
    def _whole(self) -> str:
        """The lines that tell which blocks are not cut: by bounds alone, where all ask the rest of the mask anyway."""
        lines = ["whole = block * BLOCK_N + BLOCK_N <= full_stop"]
        if key_range(self.spec, further=True).side("lower"):
            lines.append("whole &= block * BLOCK_N >= full_start")
        text, known = PossibleText(self.spec, self.possible), self.possible
        lines += [] if known.sure is None else [_SURE.format(text.emit(known.sure))]
        lines += [] if known.whole is None else [f"whole &= {text.emit(known.whole)}"]
        return "\n".join(lines)

    @property
    def places(self) -> str:
        """The lines of the main kernel by which the blocks of a tile are counted by their places."""
        return _PLACES.format(count=self.count)

    @property
    def length(self) -> str:
        """How many they are, of the hull ``entry``."""
        return f"tl.load(hull + {self.count}, mask=entry < entries, other=0)"

    def address(self, block: str) -> str:
        """The lines that find the list of a ``block`` of rows."""
        return _ADDRESS.format(block=block)

    @property
    def allocate(self) -> str:
        """The launcher's line that allocates them."""
        return _ALLOCATE.format(keys=self.block_n)

    def _emit(self, expr: Expr, names: Mapping[str, str]) -> str:
        return emit(expr, names, self.spec.capture_kinds)


def can_list(spec: AttentionSpec, possible: Possible) -> bool:
    """Whether hulls may have holes, by blocks of rows, within bounds that are the same for all heads."""
    bounds = (single for bound in key_range(spec, further=True).bounds for single in bound.all)
    alike = not any(leaf.op == "capture" or leaf.value in ("b", "h") for b in bounds for leaf in b.offset.leaves)
    return bool(possible.rows) and alike and may_have_holes(spec)
