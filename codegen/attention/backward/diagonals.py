"""The gradient of a band: blocks of rows and keys taken along their diagonals, where every element keeps its distance.

    dband[d] = Σ dx[i, j]·∂x/∂band   over all   j − i + Sq − 1 = d

A program takes the blocks of one diagonal: rows from ``first``, keys from ``start = first + gap``, the same ``gap``
for all of them. Element (m, n) of each has the distance ``gap + n − m``: they add up element by element, over rows,
batch and heads, in registers. What is left is one sum along the diagonals of a single block, a *window* of distances,
which `fxopt.codegen.attention.backward.totals` adds to the windows that overlap it.

Which blocks of a diagonal are needed follows from the bounds of the mask. One that moves with the rows keeps or drops
whole diagonals, one that is the same for all rows limits the keys, so the rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from fxopt.codegen.attention.captured import CapturedTensor
from fxopt.codegen.attention.interval import Bound, KeyRange
from fxopt.codegen.attention.portable.loops import Emitter, Span, nested
from fxopt.codegen.attention.portable.phases import PhasedBand

BAND: Final = '''
@triton.jit
def fold_$name(
    $band_parameters
):
    """Add what one block of rows and keys gives to the gradient of $name, distance by distance."""
    $by_row
    if BOUNDED:
        dx = tl.where(rows[:, None] < Sq, dx, 0.0)
    return grad + dx * $table_slope


@triton.jit(do_not_specialize=$unspecialized)
def ${name}_kernel(
    $kernel_parameters
):
    """The gradient of $name in the blocks of one diagonal, summed over one part of the heads that read it."""
    places = $kept_batches * $kept_heads * parts
    program = tl.program_id(0)
    # The longest diagonals come first, those above and below the main one in turn.
    line = program // places
    gap = tl.where(line % 2 == 0, line // 2, -(line // 2) - 1) * BLOCK_N
    kept_h = program % $kept_heads
    kept_b = program // $kept_heads % $kept_batches
    part = program % places // ($kept_heads * $kept_batches)
    heads_summed = heads // $kept_heads
    turns = tl.cdiv(batch - kept_b, $kept_batches) * heads_summed
    $load_seed
    grad = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for turn in range(part, turns, parts):
        b = kept_b + turn // heads_summed * $kept_batches
        h = kept_h + turn % heads_summed
        g = $kv_head
        b_wide, h_wide, g_wide = b.to(tl.int64), h.to(tl.int64), g.to(tl.int64)
        $indices
        $kv_bases
        $fixed_bases
        $diagonal_range
        $diagonal_loops
    # Row m turns round by m + 1 places, so that equal distances, and those BLOCK_N apart, stand below one another.
    n = tl.arange(0, BLOCK_N)
    turned = n[None, :] + tl.arange(0, BLOCK_M)[:, None] + 1
    moved = tl.gather(grad, turned % BLOCK_N, 1)
    window = ${name}_grad_ptr + program.to(tl.int64) * (BLOCK_M + BLOCK_N) + n
    for piece in tl.static_range(0, BLOCK_M // BLOCK_N + 1):
        column = turned + piece * BLOCK_N - BLOCK_M
        inside = (column >= 0) & (column < BLOCK_N)
        tl.store(window + piece * BLOCK_N, tl.sum(tl.where(inside, moved, 0.0), 0))

'''

DIAGONAL_LOOP: Final = """\
for first in range($first, $last, BLOCK_M):
    first = tl.multiple_of(first, BLOCK_M)
    start = tl.multiple_of(first + gap, BLOCK_N)
    $rows
    dout = dout.to(v_ptr.dtype.element_ty)
    $load_q
    $row_statistics
    $moving_bases
    grad = fold_$name(
        $arguments
    )
"""


def diagonal_spans(found: KeyRange) -> tuple[Span, ...]:
    """The loops over the first rows of the blocks of a diagonal, in order."""
    tail = Span("tl.maximum(full_begin, full_end)", "end", True)
    full = Span("full_begin", "full_end", False)
    if not any(_limits_keys(b) for b in found.side("lower")):
        return (full, tail)
    return (Span("begin", "tl.minimum(full_begin, end)", True), full, tail)


def diagonal_range_text(found: KeyRange, emit: Emitter) -> str:
    """The lines that compute the limits which `diagonal_spans` names, in whole blocks but for ``end``."""
    upper = [_key(b, emit) for b in found.side("upper") if _limits_keys(b)]
    lower = [_key(b, emit) for b in found.side("lower") if _limits_keys(b)]
    begin = nested("maximum", "tl.maximum(0, -gap)", (f"{c} - gap - BLOCK_N + 1" for c in lower))
    full_begin = nested("maximum", "begin", (f"{c} - gap" for c in lower))
    full_begin = f"tl.cdiv({full_begin}, BLOCK_M) * BLOCK_M" if lower else "begin"
    end = nested("minimum", "tl.minimum(Sq, Sk - gap)", (f"{c} - gap + 1" for c in upper))
    whole = "tl.minimum(Sq - BLOCK_M + 1, Sk - gap - BLOCK_N + 1)"
    full_end = nested("minimum", whole, (f"{c} - gap - BLOCK_N + 2" for c in upper))
    return "\n".join((
        f"begin = tl.cdiv({begin}, BLOCK_M) * BLOCK_M",
        f"full_begin = {full_begin}",
        f"end = {end}",
        f"full_end = {full_end}",
        "full_end = tl.cdiv(tl.maximum(full_end, 0), BLOCK_M) * BLOCK_M",
        *(line for b in found.bounds if b.slope for line in _switch(b, emit)),
    ))  # fmt: skip


def _limits_keys(bound: Bound) -> bool:
    return not bound.slope


def _key(bound: Bound, emit: Emitter) -> str:
    text = emit(bound.offset, {})
    if not any(node.op == "capture" for node in bound.offset.walk()):
        return f"({text})"
    # Captured offsets may be int64; the loops run in int32, which any limit within the keys fits.
    return f"tl.minimum(tl.maximum({text}, -1), Sk).to(tl.int32)"


def _switch(bound: Bound, emit: Emitter) -> Iterator[str]:
    """A bound that moves with the rows, asked of the least and of the greatest distance in a block."""
    offset = emit(bound.offset, {})
    least, greatest = "gap - BLOCK_M + 1", "gap + BLOCK_N - 1"
    some, every, compared = (least, greatest, "<=") if bound.side == "upper" else (greatest, least, ">=")
    yield f"end = tl.where({some} {compared} {offset}, end, 0)"
    yield f"full_end = tl.where({every} {compared} {offset}, full_end, 0)"


def fixed_bases(captures: Sequence[CapturedTensor]) -> str:
    """The lines before the loop along a diagonal: what is the same for all of its blocks, bands among it."""
    return "\n".join(_read_once(c) if isinstance(c, PhasedBand) else c.base for c in captures if _is_fixed(c))


def moving_bases(captures: Sequence[CapturedTensor]) -> str:
    """The lines in that loop: addresses and values that vary with the rows."""
    return "\n".join(c.base for c in captures if not _is_fixed(c))


def _is_fixed(captured: CapturedTensor) -> bool:
    return isinstance(captured, PhasedBand) or "i" not in captured.axes


def _read_once(band: PhasedBand) -> str:
    """The lines that read a band's values for all blocks of a diagonal."""
    name, rest = band.name, f"{band.name}_rest"
    place = f"({rest} % 8) * {name}_stride_p + {rest} // 8 * 8 + n[None, :]"
    # Rows that would begin before the first distance lie beyond the end of the rows.
    load = band.load(f"{name}_base + {name}_tile", f", mask={name}_inside, other=0")
    return "\n".join((
        f"{name}_base = {band.head_address()}",
        f"{rest} = (Sq - 1 + gap - tl.arange(0, BLOCK_M))[:, None].to(n.dtype)",
        f"{name}_tile = {place}",
        f"{name}_inside = ({rest} >= 0) & (gap < Sk)",
        f"{name} = {load}",
    ))  # fmt: skip
