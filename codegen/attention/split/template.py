"""The text of a split attention kernel, with ``$holes`` that `fxopt.codegen.attention.split.source` fills.

The block update, the header and the reference are the portable kernel's.
"""

from __future__ import annotations

from typing import Final

LIMITS: Final = '''
@triton.jit
def key_blocks(
    $limits_parameters
):
    """The first key of the blocks that count for $limits_of, and their number.

    It is one at least: the block in which rows without keys are found to be so.
    """
    first, last = 0, Sq - 1
    $limits_captures
    $limits
    return origin, tl.maximum(tl.cdiv(stop - origin, BLOCK_N), 1)

'''

PARTS: Final = '''
@triton.jit
def keep_part(
    acc,
    total,
    peak,
    slot,
    slots,
    inside,
    scratch_ptr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Write the running softmax of a tile to a slot of the scratch: accumulators, then sums and maxima of all slots."""
    row, e = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_E)
    sums_ptr = scratch_ptr + slots * BLOCK_M * BLOCK_E
    acc_tile = (slot * BLOCK_M + row[:, None]) * BLOCK_E + e[None, :]
    tl.store(scratch_ptr + acc_tile, acc, mask=inside[:, None])
    tl.store(sums_ptr + slot * BLOCK_M + row, total, mask=inside)
    tl.store(sums_ptr + (slots + slot) * BLOCK_M + row, peak, mask=inside)


@triton.jit
def merge_parts(
    begin,
    step,
    count,
    leader,
    slots,
    inside,
    scratch_ptr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The running softmax over the parts of ``count`` programs: ``begin``, ``begin + step`` and so on, in order."""
    row, e = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_E)
    sums_ptr = scratch_ptr + slots * BLOCK_M * BLOCK_E
    acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    # Small parts take long to come and little room.
    for part in tl.range(0, count, num_stages=5 if BLOCK_M * BLOCK_E <= 4096 else 3):
        slot = slot_of(begin + part * step, leader)
        acc_tile = (slot * BLOCK_M + row[:, None]) * BLOCK_E + e[None, :]
        # Other multiprocessors wrote these: the cache of this one is passed by.
        part_acc = tl.load(scratch_ptr + acc_tile, mask=inside[:, None], other=0.0, cache_modifier=".cg")
        part_sum = sums_ptr + slot * BLOCK_M + row
        part_total = tl.load(part_sum, mask=inside, other=0.0, cache_modifier=".cg")
        part_peak = tl.load(part_sum + slots * BLOCK_M, mask=inside, other=float("-inf"), cache_modifier=".cg")
        highest = tl.maximum(peak, part_peak)
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        decay = tl.exp2((peak - shift) * $scale)
        gain = tl.exp2((part_peak - shift) * $scale)
        total = total * decay + part_total * gain
        acc = acc * decay[:, None] + part_acc * gain[:, None]
        peak = highest
    return acc, total, peak


@triton.jit
def slot_of(program, leader):
    """The slot of a program's part: one for the tile that it goes on with, one for the tile that it begins."""
    return 2 * program + (program == leader).to(tl.int32)


@triton.jit
def arrives_last(counter_ptr, expected):
    """Count this program in; whether all others came before, so that what they wrote can be read.

    The last one leaves zero behind, for the next launch.
    """
    # All threads have written when one of them counts.
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == expected - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def combine(
    acc,
    total,
    peak,
    program,
    leader,
    parts,
    inside,
    scratch_ptr,
    counter_ptr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Leave this program's part of a tile; the last one of all its parts returns the whole, and True.

    Many parts are merged in groups, by the last program of each, and the groups by the last of these.
    """
    slots = 2 * tl.num_programs(0)
    width = parts
    if parts > 8:
        width = tl.ceil(tl.sqrt(parts.to(tl.float32))).to(tl.int32)
    begin = leader + (program - leader) // width * width
    step = 1
    count = tl.minimum(width, leader + parts - begin)
    slot = slot_of(program, leader)
    level = 0
    levels = 1 + (parts > width).to(tl.int32)
    done = parts == 0
    while level < levels:
        keep_part(acc, total, peak, slot, slots, inside, scratch_ptr, BLOCK_M, BLOCK_E)
        slot = slot_of(begin, leader)
        done = arrives_last(counter_ptr + level * slots + slot, count)
        level += 1
        if done:
            acc, total, peak = merge_parts(begin, step, count, leader, slots, inside, scratch_ptr, BLOCK_M, BLOCK_E)
            # All threads have read the group's first slot, which the group's result goes to.
            tl.debug_barrier()
            begin, step, count = leader, width, tl.cdiv(parts, width)
        else:
            levels = 0
    return acc, total, peak, done

'''

KERNEL: Final = '''
@triton.jit(do_not_specialize=$unspecialized)
def attention_kernel(
    $kernel_parameters
):
    """An even share of all blocks of keys: the end of one tile, whole tiles, the beginning of another.

    A tile is up to BLOCK_M of the rows (head, query) that a key/value head serves. Its blocks of keys follow one
    another; the tiles of a batch, and the batches, do so too.
    """
    program = tl.program_id(0)
    served = heads // kv_heads * Sq
    row_blocks = tl.cdiv(served, BLOCK_M)
    tiles = kv_heads * row_blocks
    n, d, e = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    if WIDE:
        n, d, e = n.to(tl.int64), d.to(tl.int64), e.to(tl.int64)
    $schedule
    share = tl.cdiv(all_blocks, tl.num_programs(0))
    begin = program * share
    end = tl.minimum(begin + share, all_blocks)
    first_tile = $first_tile
    stop_tile = $stop_tile
    # What the end of a tile wants would take registers all through it, were it computed ahead of the loop.
    for tile in tl.range(first_tile, stop_tile, disable_licm=True):
        b = tile // tiles
        g = tile // row_blocks % kv_heads
        $place
        row = tile % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = row < served
        # Rows beyond the end repeat the last one, so that nothing outside the tensors is read.
        member = tl.minimum(row, served - 1)[:, None]
        i = member % Sq
        h = $query_head
        b_wide, h_wide, g_wide = b.to(tl.int64), h.to(tl.int64), g.to(tl.int64)
        q_row = q_ptr + b_wide * q_stride_b + h_wide * q_stride_h + i.to(tl.int64) * q_stride_i
        q = tl.load(q_row + d[None, :] * q_stride_d$q_mask)
        $tiles
        $capture_bases

        acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
        from_key = origin + tl.maximum(begin - tile_begin, 0) * BLOCK_N
        to_key = origin + tl.minimum(end - tile_begin, blocks) * BLOCK_N
        $loop

        leader = tile_begin // share
        parts = (tile_begin + blocks - 1) // share - leader + 1
        done = parts == 1
        if parts > 1:
            acc, total, peak, done = combine(
                acc, total, peak, program, leader, parts, inside, scratch_ptr, counter_ptr, BLOCK_M, BLOCK_E
            )
        if done:
            out = $result
            out_row = out_ptr + b_wide * out_stride_b + h_wide * out_stride_h + i.to(tl.int64) * out_stride_i
            tl.store(out_row + e[None, :], out.to(out_ptr.dtype.element_ty), mask=$out_mask)
            if WITH_LSE:
                lse = peak$lse_factor + tl.log(total)
                lse_row = lse_ptr + (b_wide * heads + h_wide) * Sq + i
                tl.store(lse_row, lse[:, None], mask=inside[:, None])

'''

#: All tiles have as many blocks of keys.
EVEN_SCHEDULE: Final = """\
origin, blocks = key_blocks(
    $limits_arguments
)
all_blocks = batch * tiles * blocks"""
EVEN_PLACE: Final = "tile_begin = tile * blocks"

#: Batches differ: every program looks at all of them.
UNEVEN_SCHEDULE: Final = """\
batches = tl.arange(0, BATCHES)
_, counts = key_blocks(
    $limits_arguments_of_all
)
counts = tl.where(batches < batch, counts, 0)
ends = tl.cumsum(counts, 0) * tiles
all_blocks = tl.max(ends, 0)"""
UNEVEN_PLACE: Final = """\
origin, blocks = key_blocks(
    $limits_arguments
)
tile_begin = tl.sum(tl.where(batches < b, counts, 0), 0) * tiles + tile % tiles * blocks"""
TILE_AT: Final = '''
@triton.jit
def tile_at(position, batches, counts, ends, tiles):
    """The tile whose blocks of keys include the one at ``position`` in the row of them all."""
    b = tl.sum((ends <= position).to(tl.int32), 0)
    before = tl.sum(tl.where(batches < b, counts, 0), 0) * tiles
    blocks = tl.sum(tl.where(batches == b, counts, 0), 0)
    return b * tiles + (position - before) // tl.maximum(blocks, 1)

'''

LAUNCH: Final = '''
#: By device and number, the counters of programs that arrived; every launch leaves zeros behind.
COUNTERS: dict[tuple[torch.device, int], torch.Tensor] = {}


def counters(device: torch.device, size: int) -> torch.Tensor:
    """Zeros, kept where launches follow one another: on the default stream, which no graph is captured on."""
    if device.type == "cuda" and torch.cuda.current_stream(device).cuda_stream != 0:
        return torch.zeros(size, dtype=torch.int32, device=device)
    if (device, size) not in COUNTERS:
        COUNTERS[device, size] = torch.zeros(size, dtype=torch.int32, device=device)
    return COUNTERS[device, size]


def multiprocessors(device: torch.device) -> int:
    """Those of the device; four where there is none."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def launch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, captures: Sequence[torch.Tensor] = (), with_lse: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B, H, Sq, $head_dim], k [B, G, Sk, $head_dim], v [B, G, Sk, $value_dim] -> out [B, H, Sq, $value_dim], lse.

    ``lse`` is the float32 log-sum-exp [B, H, Sq] of the logits, empty unless ``with_lse``.
    """
    batch, heads, rows, _ = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    out = $allocate
    lse = torch.empty((batch, heads, rows) if with_lse else (0,), dtype=torch.float32, device=q.device)
    if keys == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    if out.numel() == 0:
        return out, lse
    $unpack_captures
    served = heads // kv_heads * rows
    block_m = min(max(triton.next_power_of_2(served), 16), $largest_tile)
    programs = $programs
    counter = counters(q.device, 4 * programs)
    blocks = batch * kv_heads * -(-served // block_m) * -(-keys // $block_n)
    grid = (min(programs, blocks),)
    scratch = torch.empty(2 * grid[0] * block_m * ($block_e + 2), dtype=torch.float32, device=q.device)
    # Strides so long that offsets within a block need 64 bits.
    $wide
    exact = torch.backends.cuda.matmul.fp32_precision != "tf32"
    fast = q.is_cuda and q.dtype != torch.float32
    with torch.cuda.device_of(q):
        attention_kernel[grid](
            $launch_arguments
        )
    return out, lse

'''

MAIN: Final = '''
def main() -> None:
    """Check against the reference on small cases, then time a large one."""
    batch = 2
    for rows, length in ((1, 257), (3, 4096), (1, 65536)):
        q = torch.randn(batch, 8, rows, $head_dim, device="cuda", dtype=torch.$dtype)
        k = torch.randn(batch, 4, length, $head_dim, device="cuda", dtype=torch.$dtype)
        v = torch.randn(batch, 4, length, $value_dim, device="cuda", dtype=torch.$dtype)
        $main_captures
        if length < 10000:
            error = (launch(q, k, v, captures)[0].double() - reference(q, k, v, captures)).abs().max().item()
            print(f"largest error against float64: {error:.3g}")
        else:
            milliseconds = triton.testing.do_bench(lambda: launch(q, k, v, captures))
            gigabytes = (k.nbytes + v.nbytes) / milliseconds / 1e6
            print(f"{batch} x 8 heads x {rows} against {length}: {milliseconds:.3f} ms, {gigabytes:.0f} GB/s")


if __name__ == "__main__":
    main()
'''
