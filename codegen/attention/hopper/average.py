"""Rows without keys that take the plain mean of all values: a kernel after the main one fills them.

Few blocks have any. It tells them by their log-sum-exp, −∞. `$holes` as in the other templates.
"""

from __future__ import annotations

from typing import Final

KERNEL: Final = '''
@triton.jit(do_not_specialize=["heads", "kv_heads", "Sq", "Sk"])
def average_kernel(
    v_ptr,
    lse_ptr,
    out_ptr,
    v_stride_b,
    v_stride_h,
    v_stride_j,
    v_stride_e,
    out_stride_b,
    out_stride_h,
    out_stride_i,
    heads,
    kv_heads,
    Sq,
    Sk,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The mean of all values, for those of a block of rows of one head that have no key."""
    blocks = tl.cdiv(Sq, ROWS)
    head = tl.program_id(0) // blocks
    b, h = head // heads, head % heads
    g = $kv_head
    b_wide, h_wide, g_wide = b.to(tl.int64), h.to(tl.int64), g.to(tl.int64)
    rows = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    lse = tl.load(lse_ptr + head.to(tl.int64) * Sq + rows, mask=rows < Sq, other=0.0)
    empty = lse == float("-inf")
    if tl.max(empty.to(tl.int32), 0) != 0:
        n, e = tl.arange(0, BLOCK_N), tl.arange(0, WIDTH)
        v_tile = v_ptr + b_wide * v_stride_b + g_wide * v_stride_h + e[None, :].to(tl.int64) * v_stride_e
        mean = tl.zeros([WIDTH], tl.float32)
        for start in tl.range(0, Sk, BLOCK_N, num_stages=1):
            j = (start + n)[:, None]
            v = tl.load(v_tile + j.to(tl.int64) * v_stride_j, mask=(j < Sk) & (e[None, :] < $value_dim), other=0.0)
            mean += tl.sum(v.to(tl.float32), 0)
        mean = mean / Sk
        out = out_ptr + b_wide * out_stride_b + h_wide * out_stride_h + rows[:, None].to(tl.int64) * out_stride_i
        means = tl.zeros([ROWS, WIDTH], tl.float32) + mean[None, :]
        tl.store(
            out + e[None, :],
            means.to(out_ptr.dtype.element_ty),
            mask=empty[:, None] & (rows[:, None] < Sq) & (e[None, :] < $value_dim),
        )

'''

LAUNCH: Final = """\
average_kernel[(-(-rows // $average_rows) * pairs,)](
    v,
    lse,
    out,
    v.stride(0),
    v.stride(1),
    v.stride(2),
    v.stride(3),
    out.stride(0),
    out.stride(1),
    out.stride(2),
    heads,
    kv_heads,
    rows,
    keys,
    ROWS=$average_rows,
    BLOCK_N=64,
    WIDTH=$width,
)
"""
#: Rows of one of its programs.
ROWS: Final = 128
