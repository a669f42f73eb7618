"""A stream that goes through lists of the blocks of keys that a mask keeps, in place of runs of blocks.

The lists are those of `fxopt.codegen.attention.portable.key_lists`. A block's number in the stream is its place in the
list: whole ones first, so that what comes before one number is whole, and the others, in part, are worked on before
them.
"""

from __future__ import annotations

from typing import Final

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
#: The number of the block that the loading warps bring next.
NUMBER: Final = "n = key_at(listed, stop - 1 - step, full_stop, Sk, BLOCK_N) // BLOCK_N"
#: The first key of the block that comes next.
KEY: Final = "key = key_at(listed, block, full_stop, Sk, BLOCK_N)"
