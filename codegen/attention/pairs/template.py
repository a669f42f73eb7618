"""The text of a generated kernel for few keys on Hopper, with ``$holes`` that the source module fills."""

from __future__ import annotations

from typing import Final

PLACE: Final = '''
@gluon.jit
def place(block, heads, spans, BLOCKS: gl.constexpr):
    """Batch entry, head and first row of a block: those of a pair are counted up to a multiple of BLOCKS."""
    turn = block // BLOCKS
    pair = turn // spans
    return pair // heads, pair % heads, (turn % spans * BLOCKS + block % BLOCKS) * 64


@gluon.jit
def anew(x):
    """The integer ``x``, unknown to the compiler: what is made of it is made where it is needed, and not kept."""
    return gl.inline_asm_elementwise("mov.b32 $$0, $$1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def share(pairs, spans, BLOCKS: gl.constexpr):
    """The program's blocks, as many as any other's or one less: from the first to the one behind the last."""
    count = pairs * spans * BLOCKS
    each = count // gl.num_programs(0)
    rest = count % gl.num_programs(0)
    program = gl.program_id(0)
    begin = program * each + gl.minimum(program, rest)
    return begin, begin + each + gl.where(program < rest, 1, 0)

'''

PRODUCER: Final = '''
@gluon.jit
def load(
    $load_parameters
):
    """Load what the other warps read, in the order of their first need: keys, queries, values, further queries.

    ``copies`` is PARTS; the compiler would unroll a loop of so many, for which these warps have no registers.
    """
    begin, end = share(pairs, spans, BLOCKS)
    first_turn = begin // BLOCKS
    for turn in range(gl.cdiv(end, BLOCKS) - first_turn):
        start = gl.maximum(begin, (first_turn + turn) * BLOCKS)
        stop = gl.minimum(end, (first_turn + turn + 1) * BLOCKS)
        b, h, row = place(start, heads, spans, BLOCKS)
        g = $kv_head
        slot = turn % STAGES
        mbarrier.wait(free.index(slot), ((turn // STAGES) & 1) ^ 1)
        mbarrier.expect(k_ready.index(slot), k_source.block_type.nbytes * PARTS)
        for n in range(copies):
            tma.async_copy_global_to_shared(
                k_source, [b, g, n * PART, 0], k_ready.index(slot), k_tiles.index(slot * PARTS + n)
            )
        for block in range(start, stop):
            number = block - begin
            first = row + (block - start) * 64
            query = number % QUERIES
            mbarrier.wait(q_free.index(query), ((number // QUERIES) & 1) ^ 1)
            mbarrier.expect(q_ready.index(query), q_source.block_type.nbytes)
            tma.async_copy_global_to_shared(q_source, [b, h, first, 0], q_ready.index(query), q_tiles.index(query))
            $produce_tile
            if block == start:
                mbarrier.expect(v_ready.index(slot), v_source.block_type.nbytes * PARTS)
                for n in range(copies):
                    tma.async_copy_global_to_shared(
                        v_source, [b, g, n * PART, 0], v_ready.index(slot), v_tiles.index(slot * PARTS + n)
                    )

'''

ATTEND: Final = '''
@gluon.jit
def piece(tiles, slot, START: gl.constexpr, COUNT: gl.constexpr, PARTS: gl.constexpr, WIDTH: gl.constexpr):
    """Keys or values from START on, of several copies that lie one behind the other."""
    PART: gl.constexpr = tiles.shape[3]
    first = tiles.index(slot * PARTS + START // PART)
    return first._reinterpret(tiles.dtype, [1, 1, COUNT, WIDTH], tiles.layout).reshape([COUNT, WIDTH])


@gluon.jit
def products(q, k_tiles, slot, START: gl.constexpr, COUNT: gl.constexpr, PARTS: gl.constexpr, SCORES: gl.constexpr):
    """Products of queries and a piece of the keys, on their way."""
    k = piece(k_tiles, slot, START, COUNT, PARTS, q.shape[1])
    zero = gl.zeros([64, COUNT], gl.float32, layout=SCORES)
    return warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def by_thread(x, COUNT: gl.constexpr):
    """The columns of ``x`` that one thread holds along an axis of their own, so that it folds them by itself."""
    return gl.reshape(x, [64, COUNT // 8, 8])


@gluon.jit
def columns(x, COUNT: gl.constexpr, SCORES: gl.constexpr):
    """The numbers of the columns of ``x``: what a thread holds of them is made of two registers where it is needed."""
    EIGHTS: gl.constexpr = gl.SliceLayout(0, by_thread(x, COUNT).type.layout)
    first = anew(gl.arange(0, 8, layout=gl.SliceLayout(0, EIGHTS)))
    eights = 8 * gl.arange(0, COUNT // 8, layout=gl.SliceLayout(1, EIGHTS))
    return gl.convert_layout(gl.reshape(eights[:, None] + first[None, :], [COUNT]), gl.SliceLayout(0, SCORES))


@gluon.jit
def logits(
    $logits_parameters
):
    """Masked logits of raw products ``s`` and the keys from ``start`` on.

    A BOUNDED piece holds keys beyond the end, or keys that the mask keeps for some rows only.
    """
    n = columns(s, COUNT, SCORES)
    j = (start + n)[None, :]
    # Rows beyond the end repeat the last one, so that nothing outside the captured tensors is read.
    i = gl.minimum(first + gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES)), Sq - 1)[:, None]
    b_wide, h_wide = b.to(gl.int64), h.to(gl.int64)
    $capture_bases
    $load_captures
    x = $score
    $widen
    $masks
    return x


@gluon.jit
def weigh(x, peak, start, Sk, COUNT: gl.constexpr, SCORES: gl.constexpr):
    """Weights of the logits of a piece, given the largest logit of each row."""
    highest = gl.convert_layout(peak, gl.SliceLayout(1, SCORES))
    # A row without keys has no maximum to subtract.
    shift = gl.where(highest == float("-inf"), 0.0, highest)
    $unit
    p = gl.exp2($exponent)
    $average
    return p

'''

#: The mean of all values where a row keeps none: as if every key had the weight one.
AVERAGE: Final = """\
j = (start + columns(x, COUNT, SCORES))[None, :]
p = gl.where((highest == float("-inf"))[:, None] & (j < Sk), 1.0, p)"""

CONSUMER: Final = '''
@gluon.jit
def multiply(
    $multiply_parameters
):
    """Every GROUPS-th block of 64 rows of the program, from number MEMBER on: all keys at once, one softmax.

    Products of one piece of the keys overlap with what is computed of another one.
    """
    $layouts
    RESULT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=RESULT, k_width=2)
    begin, end = share(pairs, spans, BLOCKS)
    block = begin + MEMBER
    # Every group sees every turn, the first one too if it has no block there: a barrier tells even from odd uses only.
    late = block // BLOCKS > begin // BLOCKS
    mbarrier.wait(k_ready.index(0), 0, pred=late)
    mbarrier.wait(v_ready.index(0), 0, pred=late)
    mbarrier.arrive(free.index(0), count=1, pred=late)
    while block < end:
        query = (block - begin) % QUERIES
        turn = block // BLOCKS - begin // BLOCKS
        slot = turn % STAGES
        b, h, first = place(block, heads, spans, BLOCKS)
        mbarrier.wait(q_ready.index(query), ((block - begin) // QUERIES) & 1)
        mbarrier.wait(k_ready.index(slot), (turn // STAGES) & 1)
        q = q_tiles.index(query).reshape([64, WIDTH])
        $products
        $await_tile
        $logits
        # A barrier of all warps stands between this wait and the stores: no warp writes what is still being read.
        tma.store_wait(0)
        mbarrier.arrive(q_free.index(query), count=1)
        peak = gl.max(peaks, 1)
        $weights
        $release_tile
        total = gl.convert_layout(gl.sum(parts, 1), peak.type.layout)
        acc, $packed = warpgroup_mma_wait(0, deps=[acc, $packed])
        mbarrier.arrive(free.index(slot), count=1, pred=(block + GROUPS) // BLOCKS > block // BLOCKS)
        inverse = $inverse
        own = out_tiles.index(anew(MEMBER))
        out = acc * gl.convert_layout(inverse, gl.SliceLayout(1, RESULT))[:, None]
        own.reshape([64, WIDTH]).store(out.to(own.dtype))
        fence_async_shared()
        b, h, first = place(anew(block), heads, spans, BLOCKS)
        tma.async_copy_shared_to_global(out_target, [b, h, first, 0], own)
        if WITH_LSE:
            lse = peak$lse_factor + gl.log(total)
            rows = first + gl.arange(0, 64, layout=peak.type.layout)
            gl.store(lse_ptr + (b * heads + h).to(gl.int64) * Sq + rows, lse, mask=rows < Sq)
        block += GROUPS
    tma.store_wait(0)

'''

KERNEL: Final = '''
@gluon.jit(do_not_specialize=$unspecialized)
def attention_kernel(
    $kernel_parameters
):
    """Blocks of 64 query rows, one after another; BLOCKS of one (batch, head) pair are a turn, and read the same keys.

    One group of warps loads by TMA, what the next turn reads while this one is worked on; the others take the blocks in
    turn and multiply by wgmma. The first FULL pieces of keys lie within the keys.
    """
    q_tiles = gl.allocate_shared_memory(q_source.dtype, [QUERIES] + q_source.block_shape, q_source.layout)
    k_tiles = gl.allocate_shared_memory(k_source.dtype, [STAGES * PARTS] + k_source.block_shape, k_source.layout)
    v_tiles = gl.allocate_shared_memory(v_source.dtype, [STAGES * PARTS] + v_source.block_shape, v_source.layout)
    out_tiles = gl.allocate_shared_memory(out_target.dtype, [GROUPS] + out_target.block_shape, out_target.layout)
    $allocate_tile
    q_ready = gl.allocate_shared_memory(gl.int64, [QUERIES, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [QUERIES, 1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(QUERIES):
        mbarrier.init(q_ready.index(n), count=1)
        mbarrier.init(q_free.index(n), count=1)
    for n in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(n), count=1)
        mbarrier.init(v_ready.index(n), count=1)
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

LAUNCH: Final = '''
$tiled

def launch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, captures: Sequence[torch.Tensor] = (), with_lse: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B, H, Sq, $head_dim], k [B, G, Sk, $head_dim], v [B, G, Sk, $value_dim] -> out [B, H, Sq, $value_dim], lse.

    ``Sk`` is at most $longest. ``lse`` is the float32 log-sum-exp [B, H, Sq] of the logits, empty unless ``with_lse``.
    """
    batch, heads, rows, _ = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    if keys > $longest:
        raise ValueError(f"this kernel serves $longest keys at most, not {keys}")
    out = $allocate
    lse = torch.empty((batch, heads, rows) if with_lse else (0,), dtype=torch.float32, device=q.device)
    if keys == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    $unpack_captures
    spans, pairs = -(-rows // $rows), batch * heads
    if spans * pairs == 0:
        return out, lse
    full = $full
    programs = min(spans * pairs * $blocks, torch.cuda.get_device_properties(q.device).multi_processor_count)
    with torch.cuda.device_of(q):
        $align_tile
        attention_kernel[(programs,)](
            $launch_arguments
        )
    return out, lse

'''
