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
        $placed = place(turn, $places)
        first = row * ROWS
        last = gl.minimum(first + ROWS, Sq) - 1
        $paired
        g = $kv_head
        $range_captures
        start, full_start, full_stop, stop = key_blocks(
            $range_arguments
        )
        $hull_places
        place_q = turn % QUERIES
        mbarrier.wait(q_free.index(place_q), ((turn // QUERIES) & 1) ^ 1)
        for step in range(stop - start):
            slot = pair % STAGES
            mbarrier.wait(free.index(slot), ((pair // STAGES) & 1) ^ 1)
            $number
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

CONSUMER: Final = '''
@gluon.jit
def locate(
    $locate_parameters
):
    """Where a tile lies, what its rows read, and its blocks of keys; those that group ``MEMBER`` needs, and in full."""
    $tile
    $hull_places
    $run_limits
    $own
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
    turns = $turns
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
    $offer_baton
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
        $take_baton
        products = warpgroup_mma(q, k.permute((1, 0)), $sums, is_async=True)
        acc = warpgroup_mma(weights, v, acc, use_acc=continues, is_async=True)
        $pass_baton
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
    $keep_baton
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
    $clear

'''

#: The blocks of keys that a group needs.
OWN: Final = """\
own_first = gl.minimum(first + MEMBER * 64, Sq - 1)
own_last = gl.minimum(own_first + 64, Sq) - 1
own_start, full_start, full_stop, own_stop = key_blocks(
    $own_range_arguments
)
"""
#: The same where it needs those of its tile.
ALL: Final = "own_start, own_stop = start, stop"

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
