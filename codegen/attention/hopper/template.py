"""The text of a generated Hopper kernel, with ``$holes`` that `fxopt.codegen.attention.hopper.source` fills."""

from __future__ import annotations

from typing import Final

IMPORTS: Final = """\
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
"""

PLACE: Final = '''
@gluon.jit
def place(turn, blocks, halves, group, pairs):
    """Row block and (batch, head) pair of a program's tile; pairs go in groups whose keys and values fit the L2 cache.

    With two ``halves`` a long row block and the short one opposite to it follow each other, so that all take the same.
    """
    index = gl.program_id(0) + $turned * gl.num_programs(0)
    spans = $spans
    before = index // (group * spans) * group
    within = index % (group * spans)
    size = gl.minimum(group, pairs - before)
    row = within // size
    $order_rows
    return row, $pair


@gluon.jit
def turns_of(blocks, halves, pairs):
    """How many tiles the program takes."""
    return gl.cdiv(pairs * ($spans) - gl.program_id(0), gl.num_programs(0))$halved

'''

#: What the place of a tile is there.
PAIRED: Final = {"placed": "row, head", "paired": "b = head // heads\nh = head % heads"}

RANGE: Final = '''
@gluon.jit
def key_blocks(
    $range_parameters
):
    """First and last block of keys that rows ``first`` to ``last`` need (at least one), full ones between them."""
    $key_range
    start = $start_block // BLOCK_N
    return start, $full_start // BLOCK_N, full_stop // BLOCK_N, gl.maximum(gl.cdiv(stop, BLOCK_N), start + 1)

'''

#: The small kernels before this one may be running still.
AWAIT: Final = '''
@gluon.jit
def await_hulls():
    """Wait for the kernels before this one, which is launched while they run."""
    gl.inline_asm_elementwise("griddepcontrol.wait; // $$0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)

'''

PRODUCER: Final = '''
@gluon.jit
def load(
    $load_parameters
):
    """Load what the other warps read: queries of each tile, then pairs of a block of keys and the values before it."""
    pair = 0
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
        place_q = turn % QUERIES
        mbarrier.wait(q_free.index(place_q), ((turn // QUERIES) & 1) ^ 1)
        mbarrier.expect(q_ready.index(place_q), q_source.block_type.nbytes * GROUPS)
        for member in gl.static_range(GROUPS):
            slot = place_q * GROUPS + member
            tma.async_copy_global_to_shared(
                q_source, [b, h, first + member * 64, 0], q_ready.index(place_q), q_tiles.index(slot)
            )
        count = stop - start
        for step in range(count + 1):
            slot = pair % STAGES
            mbarrier.wait(free.index(slot), ((pair // STAGES) & 1) ^ 1)
            if step < count:
                mbarrier.expect(k_ready.index(slot), k_source.block_type.nbytes)
                tma.async_copy_global_to_shared(
                    k_source, [b, g, (stop - 1 - step) * BLOCK_N, 0], k_ready.index(slot), k_tiles.index(slot)
                )
            else:
                mbarrier.arrive(k_ready.index(slot), count=1)
            if step > 0:
                mbarrier.expect(v_ready.index(slot), v_source.block_type.nbytes)
                tma.async_copy_global_to_shared(
                    v_source, [b, g, (stop - step) * BLOCK_N, 0], v_ready.index(slot), v_tiles.index(slot)
                )
            else:
                mbarrier.arrive(v_ready.index(slot), count=1)
            pair += 1

'''

ATTEND: Final = '''
@gluon.jit
def attend(
    $attend_parameters
):
    """Weights of one block of raw products ``s``, from key ``start``, and the running sum and maximum of the rows.

    BOUNDED blocks hold keys beyond the end, or keys that the mask keeps for some rows only.
    """
    n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, SCORES))
    j = (start + n)[None, :]
    $load_captures
    x = $score
    $widen
    $masks
    highest = gl.maximum(peak, gl.max(x, 1))
    # A row without keys so far has no maximum to subtract.
    shift = gl.where(highest == float("-inf"), 0.0, highest)
    $unit
    p = gl.exp2($exponent)
    decay = gl.exp2((peak - shift) * $scale)
    return p, total * decay + gl.sum(p, 1), highest, decay


@gluon.jit
def advance(
    $advance_parameters
):
    """The products of the block from ``start`` beside those of the weights and values of the block before it."""
    slot = pair % STAGES
    phase = (pair // STAGES) & 1
    zero = gl.zeros([64, BLOCK_N], gl.float32, layout=SCORES)
    mbarrier.wait(k_ready.index(slot), phase)
    k = k_tiles.index(slot).reshape([BLOCK_N, WIDTH])
    s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(v_ready.index(slot), phase)
    v = v_tiles.index(slot).reshape([BLOCK_N, WIDTH])
    acc = warpgroup_mma(p, v, acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s])
    w, total, peak, decay = attend(
        $attend_arguments
    )
    acc, p = warpgroup_mma_wait(0, deps=[acc, p])
    mbarrier.arrive(free.index(slot), count=1)
    acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, acc.type.layout))[:, None]
    return acc, gl.convert_layout(w.to(v.dtype), WEIGHTS), total, peak, pair + 1

'''

#: Where a tile lies, and the blocks of keys that its rows need.
TILE: Final = """\
$placed = place(turn, $places)
first = row * ROWS
last = gl.minimum(first + ROWS, Sq) - 1
$paired
b_wide, h_wide = b.to(gl.int64), h.to(gl.int64)
rows = first + MEMBER * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
# Rows beyond the end repeat the last one, so that nothing outside the captured tensors is read.
i = gl.minimum(rows, Sq - 1)[:, None]
n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, SCORES))
$capture_bases
$hull_limits
start, full_start, full_stop, stop = key_blocks(
    $range_arguments
)
"""

CONSUMER: Final = '''
@gluon.jit
def multiply(
    $multiply_parameters
):
    """The rows of group ``MEMBER`` of every tile."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    RESULT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=RESULT, k_width=2)
    pair = 0
    for turn in range($turns):
        $tile
        acc = gl.zeros([64, WIDTH], gl.float32, layout=RESULT)
        total = gl.zeros([64], gl.float32, layout=gl.SliceLayout(1, SCORES))
        peak = gl.full([64], float("-inf"), gl.float32, layout=gl.SliceLayout(1, SCORES))

        slot = pair % STAGES
        own = q_tiles.index(turn % QUERIES * GROUPS + MEMBER)
        q = own.reshape([64, WIDTH])
        mbarrier.wait(q_ready.index(turn % QUERIES), (turn // QUERIES) & 1)
        mbarrier.wait(k_ready.index(slot), (pair // STAGES) & 1)
        k = k_tiles.index(slot).reshape([BLOCK_N, WIDTH])
        zero = gl.zeros([64, BLOCK_N], gl.float32, layout=SCORES)
        s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        mbarrier.arrive(free.index(slot), count=1)
        pair += 1
        block = stop - 1
        w, total, peak, decay = attend(
            $first_arguments
        )
        p = gl.convert_layout(w.to(v_tiles.dtype), WEIGHTS)
        if QUERIES > 1 and turn > 0:
            tma.store_wait(0)
            mbarrier.arrive(q_free.index((turn - 1) % QUERIES), count=1)
        block -= 1
        $loops
        slot = pair % STAGES
        mbarrier.wait(v_ready.index(slot), (pair // STAGES) & 1)
        v = v_tiles.index(slot).reshape([BLOCK_N, WIDTH])
        acc = warpgroup_mma(p, v, acc, is_async=True)
        acc, p = warpgroup_mma_wait(0, deps=[acc, p])
        mbarrier.arrive(free.index(slot), count=1)
        pair += 1

        inverse = $inverse
        # The result leaves through the shared memory of the queries, which have been read.
        out = acc * gl.convert_layout(inverse, gl.SliceLayout(1, RESULT))[:, None]
        q.store(out.to(q.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(out_target, [b, h, first + MEMBER * 64, 0], own)
        if WITH_LSE:
            lse = peak$lse_factor + gl.log(total)
            gl.store(lse_ptr + (b_wide * heads + h) * Sq + rows, lse, mask=rows < Sq)
        if QUERIES == 1:
            tma.store_wait(0)
            mbarrier.arrive(q_free.index(0), count=1)
    tma.store_wait(0)
    $clear

'''

LOOP: Final = """\
while block >= $last:
    acc, p, total, peak, pair = advance(
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

    One group of warps loads by TMA; each of the others holds 64 rows and multiplies by wgmma. While the tensor cores
    multiply the weights of one block of keys by its values, a group computes the softmax of the next block.
    """
    q_tiles = gl.allocate_shared_memory(q_source.dtype, [QUERIES * GROUPS] + q_source.block_shape, q_source.layout)
    k_tiles = gl.allocate_shared_memory(k_source.dtype, [STAGES] + k_source.block_shape, k_source.layout)
    v_tiles = gl.allocate_shared_memory(v_source.dtype, [STAGES] + v_source.block_shape, v_source.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [QUERIES, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [QUERIES, 1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(QUERIES):
        mbarrier.init(q_ready.index(n), count=1)
        mbarrier.init(q_free.index(n), count=GROUPS)
    for n in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(n), count=1)
        mbarrier.init(v_ready.index(n), count=1)
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

GROUP: Final = """\
(multiply, (
    $arguments
)),
"""

DESCRIBED: Final = '''
#: How blocks of so many rows lie in shared memory, where TMA puts them.
LAYOUTS = {rows: gl.NVMMASharedLayout.get_default_for([1, 1, rows, $width], gl.$element) for rows in ($described_rows)}


def describable(x: torch.Tensor) -> bool:
    """Whether TMA can read ``x``: dense rows, and everything else in steps of 16 bytes."""
    *steps, last = x.stride()
    # A power of two divides all of them where it divides their bits taken together.
    bits = x.data_ptr() | (steps[0] | steps[1] | steps[2]) * x.element_size()
    return last == 1 and min(steps) > 0 and bits % 16 == 0


def described(x: torch.Tensor, rows: int) -> TensorDescriptor:
    """``x`` as blocks of ``rows``; it is copied where TMA can't read it."""
    source = x if describable(x) else x.clone(memory_format=torch.contiguous_format)
    return TensorDescriptor.from_tensor(source, [1, 1, rows, $width], LAYOUTS[rows])
'''

LAUNCH: Final = '''
$tiled

def launch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, captures: Sequence[torch.Tensor] = (), with_lse: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B, H, Sq, $head_dim], k [B, G, Sk, $head_dim], v [B, G, Sk, $value_dim] -> out [B, H, Sq, $value_dim], lse.

    ``lse`` is the float32 log-sum-exp [B, H, Sq] of the logits, empty unless ``with_lse``.
    """
    batch, heads, rows, _ = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    out = $allocate
    lse = torch.empty($lse_shape, dtype=torch.float32, device=q.device)
    if keys == 0:
        lse.fill_(float("-inf"))
        return out.zero_(), $lse
    $unpack_captures
    blocks, pairs = -(-rows // $rows), batch * heads
    if blocks * pairs == 0:
        return out, lse
    halves = $halves
    group = $group
    $allocate_phases
    $allocate_hull
    programs = min(blocks // halves * pairs, torch.cuda.get_device_properties(q.device).multi_processor_count)
    with torch.cuda.device_of(q):
        $launch_phases
        $launch_hull
        attention_kernel[(programs,)](
            $launch_arguments
        )
        $launch_average
    return out, $lse

'''
