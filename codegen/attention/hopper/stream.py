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
    for turn in range($turns):
        row, head = place(turn, $places)
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
def before(first, eights, limit, like, BLOCK_N: gl.constexpr):
    """Whether the key of each column of ``like`` comes before its row's ``limit``: a comparison with a constant."""
    ROWS: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, first.type.layout))
    LIKE: gl.constexpr = like.type.layout
    limits = limit + gl.zeros([64, 1], gl.int32, layout=LIKE)
    limits = gl.convert_layout(gl.reshape(limits, [64]), ROWS)
    return gl.convert_layout(gl.reshape(first - limits[:, None, None] < -eights, [64, BLOCK_N]), like.type.layout)


@gluon.jit
def attend(
    $attend_parameters
):
    """Weights of one block of raw products ``s``, from key ``start``, and the running sum and maximum of the rows.

    The sum stays in eight parts to a row. BOUNDED blocks hold keys beyond the end, or keys that the mask keeps for some
    rows only.
    """
    first, eights = columns(s, start, BLOCK_N)
    j = whole(first, eights, s, BLOCK_N)
    column = whole((first - start).to(gl.float32), eights.to(gl.float32), s, BLOCK_N)
    $load_captures
    x = $score
    $widen
    $masks
    $aside
    block_peak = gl.max(gl.max(by_thread(x, BLOCK_N), 1), 1)
    highest = gl.maximum(peak, gl.convert_layout(block_peak, peak.type.layout)$moved)
    # A row without keys so far has no maximum to subtract.
    shift = gl.where(highest == float("-inf"), 0.0, highest)
    $unit
    decay = gl.exp2((peak - shift) * $scale)
    $move
    p = gl.exp2($exponent)
    parts = gl.sum(by_thread(p, BLOCK_N), 1)
    kept_total = total * gl.convert_layout(decay, gl.SliceLayout(1, total.type.layout))[:, None]
    return p, kept_total + gl.convert_layout(parts, total.type.layout), highest, decay


@gluon.jit
def advance(
    $advance_parameters
):
    """The softmax of the block from ``start``, beside the products of the weights and values of the block before it.

    With AHEAD its own products ``s`` are there, and those of the block after it are computed at the same time.
    """
    slot = pair % STAGES
    upcoming = (pair + 1) % STAGES
    q = q_tiles.index(query).reshape([64, WIDTH])
    k = k_tiles.index(slot).reshape([BLOCK_N, WIDTH])
    v = v_tiles.index(slot).reshape([BLOCK_N, WIDTH])
    $beneath
    weights = unpacked(p, BLOCK_N, WEIGHTS)
    products = warpgroup_mma(q, k.permute((1, 0)), $sums, is_async=True)
    acc = warpgroup_mma(weights, v, acc, is_async=True)
    $read_tile
    $release_tile
    # Instructions don't move across waits. Without this one, for nothing, and the next one, which could come later, the
    # assembler would put the softmax before or behind the products that are to run beside it.
    mbarrier.wait(ready.index(slot), 0, pred=Sk < 0)
    if not AHEAD:
        s = warpgroup_mma_wait(1, deps=[products])
    w, total, peak, decay = attend(
        $attend_arguments
    )
    fresh = gl.convert_layout(packed(w, BLOCK_N), p.type.layout)
    mbarrier.wait(ready.index(upcoming), ((pair + 1) // STAGES) & 1)
    if AHEAD:
        acc, p, fresh, s = warpgroup_mma_wait(0, deps=[acc, p, fresh, products])
    else:
        acc, p, fresh = warpgroup_mma_wait(0, deps=[acc, p, fresh])
    mbarrier.arrive(free.index(slot), count=1)
    $release_added
    acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, acc.type.layout))[:, None]
    return acc, fresh, s, total, peak, pair + 1

'''

CONSUMER: Final = '''
@gluon.jit
def leave(
    $leave_parameters
):
    """Send the rows of group ``MEMBER`` of a tile to global memory, through shared memory that nothing reads."""
    first = row * ROWS + MEMBER * 64
    total = gl.convert_layout(gl.sum(total, 1), peak.type.layout)
    inverse = $inverse
    out = acc * gl.convert_layout(inverse, gl.SliceLayout(1, acc.type.layout))[:, None]
    # A barrier of all warps stands between this wait and the stores: no warp writes what is still being read.
    tma.store_wait(0)
    own = out_tiles.index(anew(MEMBER))
    own.reshape([64, WIDTH]).store(out.to(own.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(out_target, [head // heads, head % heads, first, 0], own)
    if WITH_LSE:
        lse = peak$lse_factor + gl.log(total)
        rows = first + gl.arange(0, 64, layout=peak.type.layout)
        gl.store(lse_ptr + head.to(gl.int64) * Sq + rows, lse, mask=rows < Sq)


@gluon.jit
def multiply(
    $multiply_parameters
):
    """The rows of group ``MEMBER`` of every tile."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    RESULT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=RESULT, k_width=2)
    s = gl.zeros([64, BLOCK_N], gl.float32, layout=SCORES)
    p = packed(s, BLOCK_N)
    acc = gl.zeros([64, WIDTH], gl.float32, layout=RESULT)
    nothing = gl.sum(by_thread(s, BLOCK_N), 1)
    total = nothing
    peak = gl.full([64], float("-inf"), gl.float32, layout=gl.SliceLayout(1, SCORES))
    pair = 0
    mbarrier.wait(ready.index(0), 0)
    if AHEAD:
        k = k_tiles.index(0).reshape([BLOCK_N, WIDTH])
        q = q_tiles.index(MEMBER).reshape([64, WIDTH])
        products = warpgroup_mma(q, k.permute((1, 0)), s, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[products])
        mbarrier.arrive(free.index(0), count=1)
        mbarrier.wait(ready.index(1), 0)
        pair = 1
    $no_tile
    for turn in range($turns):
        $before_products
        # What is left of the tile before is multiplied first, and leaves beside the products of this one.
        slot = pair % STAGES
        q = q_tiles.index(query).reshape([64, WIDTH])
        k = k_tiles.index(slot).reshape([BLOCK_N, WIDTH])
        v = v_tiles.index(slot).reshape([BLOCK_N, WIDTH])
        result = warpgroup_mma(unpacked(p, BLOCK_N, WEIGHTS), v, acc, is_async=True)
        $scale_queries
        $beneath
        products = warpgroup_mma(q, k.permute((1, 0)), $sums, is_async=True)
        $read_tile
        $release_tile
        $beside_products
        acc, p = warpgroup_mma_wait(1, deps=[result, p])
        if turn > 0:
            $recall
            leave(
                acc, total, peak, row_before, head_before,
                $leave_arguments
            )
        $remember
        acc = gl.zeros([64, WIDTH], gl.float32, layout=RESULT)
        total = nothing
        peak = gl.full([64], float("-inf"), gl.float32, layout=gl.SliceLayout(1, SCORES))
        if not AHEAD:
            s = warpgroup_mma_wait(0, deps=[products])
        w, total, peak, decay = attend(
            $first_arguments
        )
        fresh = gl.convert_layout(packed(w, BLOCK_N), p.type.layout)
        mbarrier.wait(ready.index((pair + 1) % STAGES), ((pair + 1) // STAGES) & 1)
        if AHEAD:
            fresh, s = warpgroup_mma_wait(0, deps=[fresh, products])
        mbarrier.arrive(free.index(slot), count=1)
        $release_added
        p = fresh
        pair += 1
        block -= 1
        $loops
        mbarrier.arrive(q_free.index(turn % QUERIES), count=1)
    slot = pair % STAGES
    v = v_tiles.index(slot).reshape([BLOCK_N, WIDTH])
    acc = warpgroup_mma(unpacked(p, BLOCK_N, WEIGHTS), v, acc, is_async=True)
    acc, p = warpgroup_mma_wait(0, deps=[acc, p])
    mbarrier.arrive(free.index(slot), count=1)
    $recall_last
    leave(
        acc, total, peak, row_before, head_before,
        $leave_arguments
    )
    tma.store_wait(0)
    $clear

'''

#: Where the tile before lies, made anew.
RECALL: Final = "row_before, head_before = place($turn, $places)"
#: The queries of a tile's first products where none run ahead.
FIRST_QUERY: Final = "query = turn % QUERIES * GROUPS + MEMBER"
#: The queries of the block whose products come next.
QUERY: Final = "query = gl.where(block > start, turn, turn + AHEAD) % QUERIES * GROUPS + MEMBER"

LOOP: Final = """\
while block >= $last:
    $query
    acc, p, s, total, peak, pair = advance(
        $arguments
    )
    block -= 1
"""

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
    $await_hulls
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
