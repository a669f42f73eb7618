"""The text of a generated attention kernel, with ``$holes`` that `fxopt.codegen.attention.portable.source` fills."""

from __future__ import annotations

from typing import Final

ATTEND: Final = '''
@triton.jit
def attend(
    $attend_parameters
):
    """Fold one block of keys, from ``start``, into the running softmax of the rows.

    BOUNDED blocks hold keys beyond the end (unless EVEN), or keys that the mask keeps for some rows only.
    """
    n = tl.arange(0, BLOCK_N)
    j = (start + n)[None, :]
    $load_k
    s = tl.dot(q, k, input_precision=PRECISION)
    $load_captures
    x = $score
    $widen
    $masks
    highest = tl.maximum(peak, $block_max)
    # A row without keys so far has no maximum to subtract.
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    $unit
    p = tl.exp2($exponent)
    decay = tl.exp2((peak - shift) * $scale)
    total = total * decay + tl.sum(p, 1)
    $stay
    $drop
    acc = acc * decay[:, None]
    $load_v
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, total, highest

'''

AVERAGE: Final = '''
@triton.jit
def average(
    $average_parameters
):
    """The plain mean of all values, which a row without keys gives."""
    n = tl.arange(0, BLOCK_N)
    mean = tl.zeros([BLOCK_E], tl.float32)
    for start in tl.range(0, Sk, BLOCK_N, num_stages=1):
        $load_v
        mean += tl.sum(v.to(tl.float32), 0)
    return mean / Sk

'''

USE_AVERAGE: Final = """\
# Few blocks have a row without keys.
if tl.max((total == 0).to(tl.int32), 0) != 0:
    mean = average(
        $average_arguments
    )
    means = tl.zeros([BLOCK_M, BLOCK_E], out_ptr.dtype.element_ty) + mean[None, :].to(out_ptr.dtype.element_ty)
    tl.store(out_tile, means, mask=$empty_mask)
"""

KERNEL: Final = '''
@triton.jit(do_not_specialize=$unspecialized)
def attention_kernel(
    $kernel_parameters
):
    """One block of query rows of one head."""
    blocks = tl.cdiv(Sq, BLOCK_M)
    program = tl.program_id(0)
    first = ($row_block) * BLOCK_M
    last = tl.minimum(first + BLOCK_M, Sq) - 1
    b = $pair // heads
    h = $pair % heads
    g = $kv_head
    b_wide, h_wide, g_wide = b.to(tl.int64), h.to(tl.int64), g.to(tl.int64)
    rows = (first + tl.arange(0, BLOCK_M))[:, None]
    # Rows beyond the end repeat the last one, so that nothing outside the tensors is read.
    i = tl.minimum(rows, Sq - 1)
    n, d, e = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    if WIDE:
        n, d, e = n.to(tl.int64), d.to(tl.int64), e.to(tl.int64)

    q_base = q_ptr + b_wide * q_stride_b + h_wide * q_stride_h + first.to(tl.int64) * q_stride_i
    q_tile = (i - first).to(n.dtype) * q_stride_i + d[None, :] * q_stride_d
    q = tl.load(q_base + q_tile$q_mask)
    $tiles
    $capture_bases
    $load_seed

    acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)

    $hull_limits
    $list_limits
    $key_range
    $loops

    out = $result
    out_base = out_ptr + b_wide * out_stride_b + h_wide * out_stride_h
    out_tile = out_base + rows.to(tl.int64) * out_stride_i + e[None, :]
    tl.store(out_tile, out.to(out_ptr.dtype.element_ty), mask=$out_mask)
    $empty_rows
    if WITH_LSE:
        lse = peak$lse_factor + tl.log(total)
        lse_row = lse_ptr + (b_wide * heads + h_wide) * Sq + rows
        tl.store(lse_row, lse[:, None], mask=rows < Sq)

'''

LOOP: Final = """\
for start in range($first, $last, BLOCK_N):
    start = tl.multiple_of(start, BLOCK_N)
    acc, total, peak = attend(
        $arguments
    )
"""

UPDATE: Final = """\
acc, total, peak = attend(
    $arguments
)
"""

LAST: Final = """\
if $first < $last:
    acc, total, peak = attend(
        $arguments
    )
"""

LAUNCH: Final = '''
def launch(
    $launch_parameters
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B, H, Sq, $head_dim], k [B, G, Sk, $head_dim], v [B, G, Sk, $value_dim] -> out [B, H, Sq, $value_dim], lse.

    ``lse`` is the float32 log-sum-exp [B, H, Sq] of the logits, empty unless ``with_lse``.
    $seed_meaning
    """
    batch, heads, rows, _ = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    out = $allocate
    lse = torch.empty((batch, heads, rows) if with_lse else (0,), dtype=torch.float32, device=q.device)
    if keys == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    $unpack_captures
    grid = (-(-rows // $block_m) * batch * heads,)
    if grid[0] == 0:
        return out, lse
    $describe
    $allocate_phases
    $allocate_hull
    $allocate_lists
    # Strides so long that offsets within a block need 64 bits.
    $wide
    exact = torch.backends.cuda.matmul.fp32_precision != "tf32"
    fast = q.is_cuda and q.dtype != torch.float32
    with torch.cuda.device_of(q):
        $launch_phases
        $launch_hull
        $launch_lists
        attention_kernel[grid](
            $launch_arguments
        )
    return out, lse

'''
