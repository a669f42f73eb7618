"""Keys that a tile's rows keep as one run, without reading the vectors that say so, block by block.

Padding leaves each row of a tile the same keys, one after another. Then the hull of what is possible and the first run
of what is sure are the same, and two numbers are all there is to the mask's captured vectors: for rows of the tile

    rest of the mask keeps j   <=>   run_start <= j < run_stop, and its conjuncts that read no key keep the row

A block that is cut takes two words to a thread for that, where reading the vectors costs as much as all else of the
block. Where both differ (holes, several documents in a tile), the vectors are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from textwrap import indent
from typing import Final

from fxopt.codegen.attention.captured import CapturedTensor
from fxopt.codegen.attention.interval import KeyRange
from fxopt.codegen.template import fill
from fxopt.ir.attention import AttentionSpec
from fxopt.ir.expression import Expr, capture, conjunction

Emit = Callable[[Expr], str]
#: What a tile knows of its run; it ends before zero where the vectors must be read.
NAMES: Final = ("run_start", "run_stop")
_LIMITS: Final = """\
run_start, run_stop = Sk, ~Sk
if HULL:
    # Where every row keeps all that any row may, it is a run.
    run_start, run_stop = gl.load(hull), gl.load(hull + 1)
    known = (run_start == gl.load(hull + 2)) & (run_stop == $sure_stop)
    run_stop = gl.where(known, run_stop, ~Sk)"""
_CHOICE: Final = """\
if run_stop >= 0:
    $rows
    words &= before($stop, start, s, BLOCK_N) & ~before(run_start, start, s, BLOCK_N)
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


def limits(partly: bool) -> str:
    """The lines that tell the run of a tile; ``partly`` where it may be that of some rows, and others keep nothing."""
    stop = "gl.maximum(gl.load(hull + 3), ~gl.load(hull + 3))" if partly else "gl.load(hull + 3)"
    return fill(_LIMITS, {"sure_stop": stop}).rstrip("\n")


def masks(read: Sequence[CapturedTensor], rows: tuple[Expr, ...], rest: tuple[Expr, ...], emit: Emit) -> str:
    """The lines that mask a block that is cut, within the ``words`` of its bounds.

    Where the run is known, it and the conjuncts ``rows`` that keep no key of a row; else all of ``rest``, which read
    the vectors ``read``.
    """
    by_row = [c for c in read if any(capture(c.index) in term.walk() for term in rows)]
    kept = conjunction(rows)
    stop = "run_stop" if kept is None else f"tl.where({emit(kept)}, run_stop, run_start)"
    chosen = fill(_CHOICE, {"rows": "\n".join(_loads(by_row)), "stop": stop})
    return chosen + indent(every_mask(read, rest, emit), "    ")


def every_mask(read: Sequence[CapturedTensor], rest: tuple[Expr, ...], emit: Emit) -> str:
    """The lines that do so by ``rest``."""
    lines = ["kept = chosen(words, s, BLOCK_N)", *(f"kept &= {emit(term)}" for term in rest), _KEPT]
    return "\n".join((*_loads(read), *lines))


def _loads(read: Sequence[CapturedTensor]) -> list[str]:
    """The lines that read vectors for one block."""
    found = [f"{index}_wide = {index}.to(tl.int64)" for index in indices(read)]
    return found + [c.load_keys if c.in_loop else c.base for c in read]


def indices(read: Iterable[CapturedTensor]) -> tuple[str, ...]:
    """The indices of batch and head that they vary with."""
    axes = {axis for c in read for axis in c.axes}
    return tuple(index for index in "bh" if index in axes)
