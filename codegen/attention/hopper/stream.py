"""The text of a Hopper kernel whose blocks of keys are one stream across tiles; `$holes` as in the other template.

A group of warps multiplies the weights of one block by its values, and queries by the keys of a block that comes later,
while it computes the softmax of the block between. That goes on from the last block of a tile to the first of the next.
"""

from __future__ import annotations

from typing import Final

PRODUCER: Final = '''
@gluon.jit
def load(
    $load_parameters
):
    """Load what the other warps read: in each pair a block of keys and the values of the block LAG before it.

    The queries of a tile come with its first block of keys.
    """
    LAG: gl.constexpr = AHEAD + 1
    pair = 0
    b1, g1, n1 = 0, 0, 0
    b2, g2, n2 = 0, 0, 0
    for turn in range(turns_of(blocks, halves, pairs)):
        row, head = place(turn, blocks, halves, group, pairs)
        first = row * ROWS
        last = gl.minimum(first + ROWS, Sq) - 1
        b = head // heads
        h = head % heads
        g = $kv_head
        $range_captures
        start, full_start, full_stop, stop = key_blocks(
            $range_arguments
        )
        place_q = turn % QUERIES
        mbarrier.wait(q_free.index(place_q), ((turn // QUERIES) & 1) ^ 1)
        for step in range(stop - start):
            slot = pair % STAGES
            mbarrier.wait(free.index(slot), ((pair // STAGES) & 1) ^ 1)
            n = stop - 1 - step
            if step == 0:
                mbarrier.expect(ready.index(slot), k_source.block_type.nbytes + q_source.block_type.nbytes * GROUPS)
                for member in gl.static_range(GROUPS):
                    tma.async_copy_global_to_shared(
                        q_source, [b, h, first + member * 64, 0], ready.index(slot),
                        q_tiles.index(place_q * GROUPS + member),
                    )
            else:
                mbarrier.expect(ready.index(slot), k_source.block_type.nbytes)
            tma.async_copy_global_to_shared(k_source, [b, g, n * BLOCK_N, 0], ready.index(slot), k_tiles.index(slot))
            if pair >= LAG:
                mbarrier.expect(ready.index(slot), v_source.block_type.nbytes)
                tma.async_copy_global_to_shared(
                    v_source, [b2, g2, n2 * BLOCK_N, 0], ready.index(slot), v_tiles.index(slot)
                )
            else:
                mbarrier.arrive(ready.index(slot), count=1)
            $produce_tile
            if LAG == 2:
                b2, g2, n2 = b1, g1, n1
                b1, g1, n1 = b, g, n
            else:
                b2, g2, n2 = b, g, n
            pair += 1
    for rest in gl.static_range(LAG):
        slot = pair % STAGES
        mbarrier.wait(free.index(slot), ((pair // STAGES) & 1) ^ 1)
        mbarrier.arrive(ready.index(slot), count=1)
        if pair >= LAG:
            mbarrier.expect(ready.index(slot), v_source.block_type.nbytes)
            tma.async_copy_global_to_shared(
                v_source, [b2, g2, n2 * BLOCK_N, 0], ready.index(slot), v_tiles.index(slot)
            )
        else:
            mbarrier.arrive(ready.index(slot), count=1)
        b2, g2, n2 = b1, g1, n1
        pair += 1

'''

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

CONSUMER: Final = '''
@gluon.jit
def locate(
    $locate_parameters
):
    """Where a tile lies, what its rows read, and its blocks of keys; which of them group ``MEMBER`` needs, and in full."""
    $tile
    own_first = gl.minimum(first + MEMBER * 64, Sq - 1)
    own_last = gl.minimum(own_first + 64, Sq) - 1
    own_start, full_start, full_stop, own_stop = key_blocks(
        $own_range_arguments
    )
    return (
        row, b, h, stop - 1, start, full_start, full_stop, own_start, own_stop,
        $located
    )


@gluon.jit
def close(
    $close_parameters
):
    """What the sums of a tile are divided by, as a factor; its log-sum-exp is stored."""
    total = gl.convert_layout(gl.sum(total, 1), peak.type.layout)
    if WITH_LSE:
        lse = peak$lse_factor + gl.log(total)
        rows = row * ROWS + MEMBER * 64 + gl.arange(0, 64, layout=peak.type.layout)
        gl.store(lse_ptr + (b * heads + h).to(gl.int64) * Sq + rows, lse, mask=rows < Sq)
    return $inverse


@gluon.jit
def leave(
    $leave_parameters
):
    """Send the rows of group ``MEMBER`` of a tile to global memory, through shared memory that nothing reads."""
    own = out_tiles.index(anew(MEMBER))
    own.reshape([64, WIDTH]).store(acc.to(own.dtype))
    fence_async_shared()
    first = row * ROWS + MEMBER * 64
    tma.async_copy_shared_to_global(out_target, [b, h, first, 0], own)


@gluon.jit
def multiply(
    $multiply_parameters
):
    """The rows of group ``MEMBER`` of every tile.

    Each turn of the loop computes the softmax of one block, beside the products of the weights and values of the block
    before it. With AHEAD its own products are there, and those of the block after it are computed at the same time.
    """
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    RESULT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=RESULT, k_width=2)
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    s = gl.zeros([64, BLOCK_N], gl.float32, layout=SCORES)
    p = packed(s, BLOCK_N)
    acc = gl.zeros([64, WIDTH], gl.float32, layout=RESULT)
    total = gl.sum(by_thread(s, BLOCK_N), 1)
    peak = gl.full([64], float("-inf"), gl.float32, layout=ROW)
    turns = turns_of(blocks, halves, pairs)
    turn, place_q = 0, 0
    # Where the next block lies, and the parity of its barrier; how many pairs there have been.
    slot, parity, pair = 0, 0, 0
    $located_first = locate(
        $locate_arguments
    )
    # So the first turn begins a tile.
    block = start - 1
    continues = turns > turns
    mbarrier.wait(ready.index(0), 0)
    if AHEAD:
        k = k_tiles.index(0).reshape([BLOCK_N, WIDTH])
        q = q_tiles.index(MEMBER).reshape([64, WIDTH])
        products = warpgroup_mma(q, k.permute((1, 0)), s, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[products])
        mbarrier.arrive(free.index(0), count=1)
        mbarrier.wait(ready.index(1), 0)
        slot, pair = 1, 1
    while turn < turns:
        begins = block < start
        row_before, b_before, h_before = row, b, h
        $early
        upcoming = gl.where(slot == STAGES - 1, 0, slot + 1)
        parity = gl.where(slot == STAGES - 1, 1 - parity, parity)
        q = q_tiles.index(query).reshape([64, WIDTH])
        k = k_tiles.index(slot).reshape([BLOCK_N, WIDTH])
        v = v_tiles.index(slot).reshape([BLOCK_N, WIDTH])
        $beneath
        weights = unpacked(p, BLOCK_N, WEIGHTS)
        products = warpgroup_mma(q, k.permute((1, 0)), $sums, is_async=True)
        acc = warpgroup_mma(weights, v, acc, use_acc=continues, is_async=True)
        $read_tile
        $release_tile
        $late
        if not AHEAD:
            s = warpgroup_mma_wait(1, deps=[products])
        # Of the tile before only what its sums are multiplied by is still needed.
        inverse = peak
        if begins:
            # A barrier of all warps stands between this wait and the stores: no warp writes what is still being read.
            tma.store_wait(0)
            inverse = close(
                total, peak, row_before, b_before, h_before,
                $close_arguments
            )
            total = gl.zeros_like(total)
            peak = gl.full([64], float("-inf"), gl.float32, layout=ROW)
        partial = $partial
        $soften
        mbarrier.wait(ready.index(upcoming), parity)
        # The weights of the block before are in use until here. Those of this one take their registers.
        if AHEAD:
            $in_use, s = warpgroup_mma_wait(0, deps=[$in_use, products])
        else:
            $in_use = warpgroup_mma_wait(0, deps=[$in_use])
        $weigh
        mbarrier.arrive(free.index(slot), count=1)
        $release_added
        factor = gl.where(begins, inverse, decay)
        acc = acc * gl.convert_layout(factor, gl.SliceLayout(1, RESULT))[:, None]
        if begins:
            if turn > 0:
                leave(
                    acc, row_before, b_before, h_before,
                    $leave_arguments
                )
        # The next product is the first one of its tile, and replaces what is there.
        continues = not begins
        slot = upcoming
        pair += 1
        block -= 1
        if block < start:
            mbarrier.arrive(q_free.index(place_q), count=1)
            place_q = gl.where(place_q == QUERIES - 1, 0, place_q + 1)
            turn += 1
    v = v_tiles.index(slot).reshape([BLOCK_N, WIDTH])
    acc = warpgroup_mma(unpacked(p, BLOCK_N, WEIGHTS), v, acc, use_acc=continues, is_async=True)
    inverse = close(
        total, peak, row, b, h,
        $close_arguments
    )
    acc, p = warpgroup_mma_wait(0, deps=[acc, p])
    tma.store_wait(0)
    mbarrier.arrive(free.index(slot), count=1)
    acc = acc * gl.convert_layout(inverse, gl.SliceLayout(1, RESULT))[:, None]
    leave(
        acc, row, b, h,
        $leave_arguments
    )
    tma.store_wait(0)

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
needed = (block >= own_start) & (block < own_stop)
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
if (block >= own_start) & (block < own_stop):
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
#: At the beginning of a tile: where it lies.
LOCATE: Final = """\
if begins:
    $located_first = locate(
        $locate_arguments
    )
"""
#: The queries of the products that come next.
QUERY: Final = "query = place_q * GROUPS + MEMBER"
QUERY_AHEAD: Final = "query = gl.where(block > start, turn, turn + AHEAD) % QUERIES * GROUPS + MEMBER"

KERNEL: Final = '''
@gluon.jit(do_not_specialize=$unspecialized)
def attention_kernel(
    $kernel_parameters
):
    """Tiles of rows, one after another.

    One group of warps loads by TMA; each of the others holds 64 rows and multiplies by wgmma.
    """
    q_tiles = gl.allocate_shared_memory(q_source.dtype, [QUERIES * GROUPS] + q_source.block_shape, q_source.layout)
    k_tiles = gl.allocate_shared_memory(k_source.dtype, [STAGES] + k_source.block_shape, k_source.layout)
    v_tiles = gl.allocate_shared_memory(v_source.dtype, [STAGES] + v_source.block_shape, v_source.layout)
    out_tiles = gl.allocate_shared_memory(out_target.dtype, [GROUPS] + out_target.block_shape, out_target.layout)
    $allocate_tile
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [QUERIES, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(QUERIES):
        mbarrier.init(q_free.index(n), count=GROUPS)
    for n in gl.static_range(STAGES):
        mbarrier.init(ready.index(n), count=2)
        mbarrier.init(free.index(n), count=GROUPS)
    gl.warp_specialize(
        [
            (load, (
                $load_arguments
            )),
            $groups
        ],
        [4] * GROUPS,
        [REGISTERS] * GROUPS,
    )

'''
