"""Keys that a tile's rows keep as one run, without reading the vectors that say so, block by block.

Padding leaves each row of a tile the same keys, one after another. Then the hull of what is possible and the first run
of what is sure are the same, and two numbers are all there is to the mask's captured vectors: for rows of the tile

    rest of the mask keeps j   <=>   run_start <= j < run_stop

A block that is cut takes two words to a thread for that, where reading the vectors costs as much as all else of the
block. Where both differ (holes, several documents in a tile), the vectors are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from textwrap import indent
from typing import Final

from fxopt.codegen.attention.captured import CapturedTensor
from fxopt.codegen.attention.interval import KeyRange
from fxopt.ir.attention import AttentionSpec
from fxopt.ir.expression import Expr, capture

#: What a tile knows of its run; it ends before zero where the vectors must be read.
NAMES: Final = ("run_start", "run_stop")
LIMITS: Final = """\
run_start, run_stop = Sk, ~Sk
if HULL:
    # Where every row keeps all that any row may, it is a run.
    run_start, run_stop = gl.load(hull), gl.load(hull + 1)
    known = (run_start == gl.load(hull + 2)) & (run_stop == gl.load(hull + 3))
    run_stop = gl.where(known, run_stop, ~Sk)"""
_CHOICE: Final = """\
if run_stop >= 0:
    words &= before(run_stop, start, s, BLOCK_N) & ~before(run_start, start, s, BLOCK_N)
    x = tl.where(chosen(words, s, BLOCK_N), x, float("-inf"))
else:
"""
_KEPT: Final = 'x = tl.where(kept, x, float("-inf"))'


def vectors(spec: AttentionSpec, keys: KeyRange, captures: Sequence[CapturedTensor]) -> tuple[CapturedTensor, ...]:
    """The captured vectors of rows or keys that only the rest of a mask reads, beside its bounds."""
    elsewhere = [spec.score, *(single.offset for bound in keys.bounds for single in bound.all)]

    def is_read(captured: CapturedTensor, within: Iterable[Expr]) -> bool:
        leaf = capture(captured.index)
        return any(leaf in expr.walk() for expr in within)

    def is_vector(captured: CapturedTensor) -> bool:
        return not captured.capture.is_band and not {"i", "j"} <= set(captured.axes)

    return tuple(c for c in captures if is_vector(c) and is_read(c, keys.rest) and not is_read(c, elsewhere))


def masks(read: Sequence[CapturedTensor], terms: Iterable[str]) -> str:
    """The lines that mask a block that is cut, within the ``words`` of its bounds: by the run, or by all ``terms``."""
    lines = [line for c in read for line in (c.base, c.load_bounded if c.in_loop else "") if line]
    places = [f"{index}_wide = {index}.to(tl.int64)" for index in indices(read)]
    places += ["n = tl.arange(0, BLOCK_N, layout=tl.SliceLayout(0, SCORES))"] if any(c.in_loop for c in read) else []
    kept = ["kept = chosen(words, s, BLOCK_N)", *(f"kept &= {term}" for term in terms), _KEPT]
    return _CHOICE + indent("\n".join((*places, *lines, *kept)), "    ")


def indices(read: Iterable[CapturedTensor]) -> tuple[str, ...]:
    """The indices of batch and head that they vary with."""
    axes = {axis for c in read for axis in c.axes}
    return tuple(index for index in "bh" if index in axes)
