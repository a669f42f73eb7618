"""What rows without keys do to the gradients of the values: they spoil them, or share theirs among all values equally.

    rows=nan:      dv = NaN
    rows=uniform:  out[b,h,i,:] = (1/Sk)·Σ_j v[b,g,j,:]   =>   dv[b,g,j,:] += (1/Sk)·Σ_i dout[b,h,i,:]

The kernel in front writes what each block of rows adds, and the kernel that keeps keys adds all of it up.
"""

from __future__ import annotations

from typing import Final

#: A row without a finite log-sum-exp has weights of NaN, also where its keys are never visited.
SPOIL: Final = """\
# A row whose weights are NaN spoils every dv, also of keys whose loops leave it out.
peaks = tl.load(lse_ptr + row)
$empty_peaks
spoilt = tl.sum(tl.where(rows < Sq, peaks - peaks, 0.0), 0)
tl.store(spoilt_ptr + (b_wide * heads + h_wide) * blocks + program % blocks, spoilt)
"""

SPOIL_DV: Final = """\
spoilt_blocks = tl.cdiv(Sq, $prepared_rows)
spoilt_base = spoilt_ptr + (b_wide * heads + h_wide) * spoilt_blocks
for start in range(0, spoilt_blocks, 128):
    block = start + tl.arange(0, 128)
    dv += tl.sum(tl.load(spoilt_base + block, mask=block < spoilt_blocks, other=0.0), 0)
"""

#: What rows without keys give to each value.
SHARE: Final = """\
# A row without keys averages all values, and each of them gets the same share of its gradient.
averaging = (tl.load(lse_ptr + row) == float("-inf")) & (rows < Sq)
share = tl.sum(tl.where(averaging[:, None], dout.to(tl.float32), 0.0), 0) / Sk
share_row = (b_wide * heads + h_wide) * blocks + program % blocks
tl.store(shares_ptr + share_row * BLOCK_E + tl.arange(0, BLOCK_E), share)
"""

SHARE_DV: Final = """\
share_blocks = tl.cdiv(Sq, $prepared_rows)
share_base = shares_ptr + (b_wide * heads + h_wide) * share_blocks * BLOCK_E + tl.arange(0, BLOCK_E)[None, :]
shares = tl.zeros([16, BLOCK_E], tl.float32)
for start in range(0, share_blocks, 16):
    block = (start + tl.arange(0, 16))[:, None]
    shares += tl.load(share_base + block * BLOCK_E, mask=block < share_blocks, other=0.0)
dv += tl.sum(shares, 0)[None, :]
"""
