"""The text of a generated kernel for few keys, with ``$holes`` that `fxopt.codegen.attention.short.source` fills."""

from __future__ import annotations

from typing import Final

KERNEL: Final = '''
@triton.jit(do_not_specialize=$unspecialized)
def attention_kernel(
    $kernel_parameters
):
    """$what

    The first FULL pieces of keys lie within the keys, or what they hold beyond the end is masked.
    """
    program = tl.program_id(0)
    $walk
    g = $kv_head
    h_wide, g_wide = h.to(tl.int64), g.to(tl.int64)
    row = tl.arange(0, BLOCK_M)[:, None]
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    $pieces
    if WIDE:
        d, e = d.to(tl.int64), e.to(tl.int64)
        $widen_pieces
    $before
    for $loop:
        $inside

'''

WHAT: Final = {
    "batch": "One block of query rows of one head, in up to ``steps`` batch entries, ``stride`` apart.",
    "rows": "Up to ``steps`` blocks of query rows of one head.",
}

WALK: Final = {
    "batch": """\
blocks = tl.cdiv(Sq, BLOCK_M)
first = program % blocks * BLOCK_M
h = program // blocks % heads
lane = program // blocks // heads
first_b = lane // stride * (steps * stride) + lane % stride
last_b = tl.minimum(first_b + steps * stride, batch)
lane_wide = first_b.to(tl.int64)""",
    "rows": """\
parts = tl.cdiv(Sq, BLOCK_M * steps)
begin = program % parts * (BLOCK_M * steps)
end = tl.minimum(begin + BLOCK_M * steps, Sq)
h = program // parts % heads
b = program // parts // heads""",
}

LOOP: Final = {"batch": "b in range(first_b, last_b, stride)", "rows": "first in range(begin, end, BLOCK_M)"}

SOFTMAX: Final = """\
$peak
# A row without keys has no maximum to subtract.
shift = tl.where(peak == float("-inf"), 0.0, peak)
$unit
$weights
$averages
total = $total
$wanted_before
$products
out = $result
out_base = out_ptr + b_wide * out_stride_b + h_wide * out_stride_h
tl.store(out_base + out_tile, out.to(out_ptr.dtype.element_ty), mask=$out_mask)
$wanted_after
if WITH_LSE:
    lse = peak$lse_factor + tl.log(total)
    lse_row = lse_ptr + (b_wide * heads + h_wide) * Sq + rows
    tl.store(lse_row, lse[:, None], mask=rows < Sq)"""

LAUNCH: Final = '''
def launch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, captures: Sequence[torch.Tensor] = (), with_lse: bool = False
) -> $results:
    """q [B, H, Sq, $head_dim], k [B, G, Sk, $head_dim], v [B, G, Sk, $value_dim] -> out [B, H, Sq, $value_dim], lse.

    ``Sk`` is at most $longest. ``lse`` is the float32 log-sum-exp [B, H, Sq] of the logits, empty unless ``with_lse``.
    $results_legend
    """
    batch, heads, rows, _ = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    if keys > $longest:
        raise ValueError(f"this kernel serves $longest keys at most, not {keys}")
    out = $allocate
    lse = torch.empty((batch, heads, rows) if with_lse else (0,), dtype=torch.float32, device=q.device)
    $allocate_wanted
    if keys == 0:
        return out.zero_(), lse.fill_(float("-inf"))$zeroed
    $unpack_captures
    $grid
    if grid[0] == 0:
        return out, lse$zeroed
    $allocate_parts
    full = $full
    # Strides so long that offsets within a block need 64 bits.
    $wide
    exact = torch.backends.cuda.matmul.fp32_precision != "tf32"
    fast = q.is_cuda and q.dtype != torch.float32
    with torch.cuda.device_of(q):
        attention_kernel[grid](
            $launch_arguments
        )
        $add_parts
    return out, lse$wanted

'''

GRID: Final = {
    "batch": """\
# Batch entries a common multiple of all periods apart read the same periodic tensors.
stride = math.lcm($periods)
lanes = stride * -(-batch // (stride * $steps))
grid = (-(-rows // $block_m) * heads * lanes,)""",
    "rows": "grid = (-(-rows // ($block_m * $steps)) * heads * batch,)",
}
