"""The text of what kernels of linear attention do with tokens on a grid: their order, and the values' convolution.

A block of tokens is a tile of the grid, rows of eight columns, so that a column is one register's place in every
thread: the neighbours of a token lie in other registers, and a row of values is read and widened once for all taps.
"""

from __future__ import annotations

from typing import Final

#: Columns of a tile.
ACROSS: Final = 8

TOKENS: Final = '''
@triton.jit
def grid_tokens(start, count, BLOCK_N: tl.constexpr):
    """The tokens of the block from place ``start`` on, by rows of eight columns; ``count`` where a place has none.

    $lead
    """
    place = tl.arange(0, BLOCK_N)
    tile = start // BLOCK_N$before
    y = $below * (BLOCK_N // 8) + place // 8
    x = place % 8$from_left
    n = tl.where((y < $side) & (x < $side), y * $side + x$behind, count)
    $lead_tokens
    return n

'''
LEAD: Final = "Tokens before the grid come first, in blocks of their own."
ALL: Final = "A block begins at a multiple of its length."
LEAD_TOKENS: Final = "n = tl.where(tile < 0, tl.where(start + place < $first, start + place, count), n)"

FILTERED: Final = '''
@triton.jit
def $name(
    x,
    weight,
    start,
    e,
    stride_n,
    stride_e,
    weight_stride_e,
    weight_stride_y,
    weight_stride_x,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """$maths at the tokens of a block."""
    ROWS: tl.constexpr = BLOCK_N // 8
    tile = start // BLOCK_N$before
    rows = $below * ROWS + tl.arange(0, ROWS)
    zero = tl.zeros([ROWS, BLOCK_E], dtype=tl.float32)
    $new_sums
    # One row of taps at a time: all of them at once would not fit the registers.
    for row in tl.range(0, $taps, num_stages=1):
        y = rows $sign (row - $margin)
        inside = ($on_grid(y >= 0) & (y < $side))[:, None]$e_mask
        at = x + (y * $side$from_left$behind).to(tl.int64)[:, None] * stride_n + e[None, :] * stride_e
        tap = weight + e * weight_stride_e + row * weight_stride_y
        $load_taps
        $columns
    even = tl.join(tl.join(sum_0, sum_4), tl.join(sum_2, sum_6))
    odd = tl.join(tl.join(sum_1, sum_5), tl.join(sum_3, sum_7))
    by_column = tl.permute(tl.reshape(tl.join(even, odd), [ROWS, BLOCK_E, 8]), (0, 2, 1))
    return tl.reshape(by_column, [BLOCK_N, BLOCK_E])

'''
