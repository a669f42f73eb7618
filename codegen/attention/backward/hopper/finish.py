"""The text of the kernel after all products, and of the launches, in a generated Hopper backward."""

from __future__ import annotations

from typing import Final

#: What a row without finite weights does to the values, also of keys whose loops leave it out.
SPOIL_DV: Final = """\
if program % blocks * $prepared_rows < Sq:
    spoilt = tl.load(spoilt_ptr + pair * tl.cdiv(Sq, $prepared_rows) + program % blocks)
    if spoilt != 0.0:
        b, h = pair // heads, pair % heads
        g = $kv_head
        for start in range(0, Sk, 64):
            columns = start + tl.arange(0, 64)[:, None]
            dv_tile = dv_ptr + b.to(tl.int64) * dv_stride_b + g.to(tl.int64) * dv_stride_h
            dv_tile += columns.to(tl.int64) * dv_stride_j + d
            spoils = tl.full([64, WIDTH], float("nan"), tl.float32)
            tl.store(dv_tile, spoils.to(dv_ptr.dtype.element_ty), mask=$dv_mask)
"""

SUMS: Final = '''
@triton.jit(do_not_specialize=["heads", "Sq", "Sk", "blocks"])
def finish_kernel(
    $finish_parameters
):
    """dq of 64 rows of one head out of its sums."""
    program = tl.program_id(0)
    pair = program // blocks
    rows = (program % blocks * 64 + tl.arange(0, 64))[:, None]
    d = tl.arange(0, WIDTH)[None, :]
    sums = tl.load(sums_ptr + program.to(tl.int64) * (64 * WIDTH) + tl.arange(0, 64 * WIDTH))
    # As threads held them: 8 columns, warp, row of 8, pair of columns, half of 16 rows, column of a pair.
    dq = tl.permute(tl.reshape(sums, [WIDTH // 8, 4, 8, 4, 2, 2]), (1, 4, 2, 0, 3, 5))
    dq = tl.reshape(dq, [64, WIDTH])
    dq_base = dq_ptr + (pair // heads).to(tl.int64) * dq_stride_b + (pair % heads).to(tl.int64) * dq_stride_h
    dq_tile = dq_base + rows.to(tl.int64) * dq_stride_i + d
    tl.store(dq_tile, $dq_result.to(dq_ptr.dtype.element_ty), mask=$finish_mask)
    $spoil_dv


#: How blocks of so many rows lie in shared memory, where TMA puts them.
LAYOUTS = {rows: gl.NVMMASharedLayout.get_default_for([1, 1, rows, $width], gl.$element) for rows in ($described_rows)}
VECTOR = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
PARTS = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)


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


def vectors(x: torch.Tensor) -> TensorDescriptor:
    """One number for each row of every head, as blocks of rows: each begins at a multiple of 16 bytes, as it must."""
    return TensorDescriptor(x, [x.numel()], [1], [$rows_at_a_time], VECTOR)


def parts(x: torch.Tensor) -> TensorDescriptor:
    """The sums of dq as what a group of warps adds at once, by lines of 32 numbers."""
    return TensorDescriptor(x, [x.numel() // 32, 32], [32, 1], [$part_lines, 32], PARTS)

'''

LAUNCHES: Final = """\
blocks, pairs = -(-keys // $keys), batch * kv_heads
group = $group
$allocate_hull
$launch_hull
gradient_kernel[(blocks * pairs,)](
    $gradient_arguments
)
blocks = sums.shape[2] // 64
finish_kernel[(blocks * batch * heads,)](
    $finish_arguments
)
"""
