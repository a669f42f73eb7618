"""The text of the softmax in a stream of blocks: masks, logits and weights; `$holes` as in `stream`.

A mask is two words to a thread, a bit to each of the columns that it holds of a row: bounds from above and below, and
their conjunction, cost a word, and a column tests a bit. Blocks that all rows keep leave it out, under a branch.
"""

from __future__ import annotations

from typing import Final

ATTEND: Final = '''
@gluon.jit
def by_thread(x, BLOCK_N: gl.constexpr):
    """The columns of ``x`` that one thread holds along an axis of their own, so that it folds them by itself."""
    return gl.reshape(x, [64, BLOCK_N // 8, 8])


@gluon.jit
def by_pair(x, BLOCK_N: gl.constexpr):
    """The same with axes for the pair of eight columns, and for the column of a pair."""
    return gl.reshape(x, [64, BLOCK_N // 8, 4, 2])


@gluon.jit
def packed(w, BLOCK_N: gl.constexpr):
    """Weights as pairs of half precision, in registers of 32 bits from one block to the next."""
    low, high = gl.split(gl.reshape(w, [64, BLOCK_N // 2, 2]))
    convert: gl.constexpr = "cvt.rn.$pair_type.f32 $$0, $$2, $$1;"
    return gl.inline_asm_elementwise(convert, "=r,f,f", [low, high], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def unpacked(p, BLOCK_N: gl.constexpr, WEIGHTS: gl.constexpr):
    """Those weights as the left side of a product."""
    types: gl.constexpr = (gl.$element, gl.$element)
    low, high = gl.inline_asm_elementwise("mov.b32 {$$0, $$1}, $$2;", "=h,=h,r", [p], dtype=types, is_pure=True, pack=1)
    return gl.convert_layout(gl.reshape(gl.join(low, high), [64, BLOCK_N]), WEIGHTS)


@gluon.jit
def anew(x):
    """The integer ``x``, unknown to the compiler: what is made of it is made where it is needed, and not kept."""
    return gl.inline_asm_elementwise("mov.b32 $$0, $$1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def columns(x, start, BLOCK_N: gl.constexpr):
    """The keys of the columns of ``x``, from ``start`` on, as sums ``[1, 1, 8] + [1, BLOCK_N / 8, 1]``.

    The first part takes a register or two; the second one is known to the compiler.
    """
    PARTS: gl.constexpr = by_thread(x, BLOCK_N).type.layout
    first = anew(start + gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, PARTS))))
    eights = 8 * gl.arange(0, BLOCK_N // 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, PARTS)))
    return first[None, None, :], eights[None, :, None]


@gluon.jit
def whole(first, eights, like, BLOCK_N: gl.constexpr):
    """The sums of two parts, one to a column of ``like``."""
    return gl.convert_layout(gl.reshape(first + eights, [1, BLOCK_N]), like.type.layout)


@gluon.jit
def of_rows(x, peak, SCORES: gl.constexpr):
    """``x``, one value to a row or to all, as ``peak`` is."""
    return gl.convert_layout(gl.reshape(x + gl.zeros([64, 1], gl.float32, layout=SCORES), [64]), peak.type.layout)


@gluon.jit
def ones(count):
    """As many of the lowest bits as ``count``, at most 32, says."""
    text: gl.constexpr = "bmsk.clamp.b32 $$0, 0, $$1;"
    return gl.inline_asm_elementwise(text, "=r,r", [count], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def before(limit, start, like, BLOCK_N: gl.constexpr):
    """For each row and pair of columns in eight, the columns of ``like`` whose keys, from ``start``, precede ``limit``.

    They are bits of a word, two for every eight columns, in the order in which one thread holds them.
    """
    PARTS: gl.constexpr = by_pair(like, BLOCK_N).type.layout
    PAIRS: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, PARTS))
    LIKE: gl.constexpr = like.type.layout
    limits = gl.reshape(limit - start + gl.zeros([64, 1], gl.int32, layout=LIKE), [64])
    limits = gl.convert_layout(limits, gl.SliceLayout(1, PAIRS))
    left = limits[:, None] - 2 * gl.arange(0, 4, layout=gl.SliceLayout(0, PAIRS))[None, :]
    return ones(gl.maximum((left >> 3) * 2 + gl.minimum(left & 7, 2), 0))


@gluon.jit
def chosen(words, like, BLOCK_N: gl.constexpr):
    """Those columns, one by one."""
    PARTS: gl.constexpr = by_pair(like, BLOCK_N).type.layout
    eights = gl.arange(0, BLOCK_N // 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, PARTS))))
    twos = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, PARTS))))
    bits = 1 << (2 * eights[None, :, None, None] + twos[None, None, None, :])
    found = (words[:, None, :, None] & bits) != 0
    return gl.convert_layout(gl.reshape(found, [64, BLOCK_N]), like.type.layout)


@gluon.jit
def attend(
    $attend_parameters
):
    """Logits of one block of raw products ``s``, from key ``start``, and what their exponentials need, by rows.

    That is the running maximum, by what sums so far shrink, and what is subtracted. ``partial`` blocks hold keys beyond
    the end, or keys that the mask keeps for some rows only.
    """
    # Rows beyond the end repeat the last one, so that nothing outside the captured tensors is read.
    i = gl.minimum(row * ROWS + MEMBER * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES)), Sq - 1)[:, None]
    first, eights = columns(s, start, BLOCK_N)
    j = whole(first, eights, s, BLOCK_N)
    column = whole((first - start).to(gl.float32), eights.to(gl.float32), s, BLOCK_N)
    $load_captures
    x = $score
    $widen
    $masks
    $aside
    $far
    block_peak = gl.max(gl.max(by_thread(x, BLOCK_N), 1)$farther, 1)
    highest = gl.maximum(peak, gl.convert_layout(block_peak, peak.type.layout)$moved)
    # A row without keys so far has no maximum to subtract.
    shift = gl.where(highest == float("-inf"), 0.0, highest)
    decay = gl.exp2((peak - shift) * $scale)
    $move
    return x, highest, decay, shift


@gluon.jit
def weigh(
    $weigh_parameters
):
    """The weights of a block, packed, and the running sum of the rows, which stays in eight parts to a row."""
    $unit
    $far
    w = $weights
    parts = gl.sum(by_thread(w, BLOCK_N), 1)
    kept_total = total * gl.convert_layout(decay, gl.SliceLayout(1, total.type.layout))[:, None]
    grown = kept_total + gl.convert_layout(parts, total.type.layout)
    return gl.convert_layout(packed(w, BLOCK_N), p.type.layout), grown


@gluon.jit
def nothing(p):
    """Weights of zero, made here."""
    return gl.inline_asm_elementwise("mov.b32 $$0, 0;", "=r,r", [p], dtype=gl.int32, is_pure=False, pack=1)

'''

#: The softmax of a block, in two parts.
SOFTEN: Final = """\
x, peak, decay, shift = attend(
    $attend_arguments
)
"""
WEIGH: Final = """\
p, total = weigh(
    $weigh_arguments
)
"""
#: The same where there are blocks that no row of the group needs, though others of the tile do.
SOFTEN_NEEDED: Final = """\
needed = ($block >= own_start) & ($block < own_stop)
x, shift, decay = s, peak, gl.full([64], 1.0, gl.float32, layout=ROW)
if needed:
    x, peak, decay, shift = attend(
        $attend_arguments
    )
"""
WEIGH_NEEDED: Final = """\
if needed:
    p, total = weigh(
        $weigh_arguments
    )
else:
    p = nothing(p)
"""
#: The same as a whole, beside the products of the block before. All blocks of the plainest attention are needed, but
#: the assembler, which doesn't know, can't move exponentials out of the branch and behind the wait for those products.
SOFTEN_EARLY: Final = """\
decay = gl.full([64], 1.0, gl.float32, layout=ROW)
if ($block >= own_start) & ($block < own_stop):
    x, peak, decay, shift = attend(
        $attend_arguments
    )
    fresh, total = weigh(
        $weigh_arguments
    )
else:
    fresh = nothing(p)
"""
WEIGH_EARLY: Final = "p = fresh\n"
