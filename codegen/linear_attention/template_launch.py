"""The text of the host side of generated linear attention, and of the script that checks and times it."""

from __future__ import annotations

from typing import Final

LAUNCH: Final = '''
def parts_of(tokens: int, programs: int, block: int) -> tuple[int, int]:
    """How many parts a sequence is divided into, and of how many tokens, so that the device is busy."""
    wanted = max(PROGRAMS // max(programs, 1), 1)
    length = max(-(-tokens // (wanted * block)), 4) * block
    return max(-(-tokens // length), 1), length


def like(x: torch.Tensor, channels: int, dtype: torch.dtype) -> torch.Tensor:
    """An empty [B, H, N, channels] for the tokens of x, in the memory order of the result."""
    batch, heads, tokens, _ = x.shape
    $like


def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    $optional
    with_sums: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [B, H, Sq, $head_dim], k [B, H, Sk, $head_dim], v [B, H, Sk, $value_dim] -> out [B, H, Sq, $value_dim].

    With the sums: what out is without the convolution (empty where there is none), and the denominators [B, H, Sq].
    """
    batch, heads, Sq, _ = q.shape
    Sk = k.shape[2]
    out = like(q, $value_dim, torch.$out_dtype)
    attended = $attended
    sums = torch.empty((batch, heads, Sq) if with_sums else (0,), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, attended, sums
    $fits
    PRECISION = $precision
    parts, part_length = parts_of($slots, batch * heads, $cut)
    $state_parts
    $saved
    with torch.cuda.device_of(q):
        $state
        forward_kernel[(-(-batch // $group) * heads * parts * $columns,)](
            $forward_arguments
        )
    return out, attended, sums


def launch_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    $optional
    $attended_parameter
    sums: torch.Tensor,
    g: torch.Tensor,
) -> list[torch.Tensor]:
    """The gradients of q, k, v$gradients.

    g is that of out; attended what out was without a convolution, sums as the forward gave them.
    """
    batch, heads, Sq, _ = q.shape
    Sk = k.shape[2]
    dq, dk, dv = like(q, $head_dim, q.dtype), like(k, $head_dim, q.dtype), like(v, $value_dim, q.dtype)
    if min(batch, heads, Sq, Sk) == 0:
        found = [dq.zero_(), dk.zero_(), dv.zero_()]
        return found$zeros
    $fits_backward
    g = g.to(q.dtype)
    PRECISION = $precision
    $backward_parts
    with torch.cuda.device_of(q):
        $backward_state
        queries_kernel[(batch * heads * parts * $backward_columns,)](
            $queries_arguments
        )
        $rows_state
        keys_kernel[(batch * heads * key_parts * $backward_columns,)](
            $keys_arguments
        )
        values_kernel[(batch * heads * $value_parts * $values_columns,)](
            $values_arguments
        )
    found = [dq, dk, dv]
    $positions_gradient
    $filters
    return found

'''
FITS: Final = """\
if max(Sq, Sk) > $block:
    raise ValueError(f"this kernel holds all of at most $block tokens, not {max(Sq, Sk)}")"""
#: New states of `parts` parts.
NEW_PARTS: Final = """\
state = torch.empty((batch, heads, $parts, $head_dim, $value_dim), dtype=torch.float32, device=q.device)
total = torch.empty((batch, heads, $parts, $head_dim), dtype=torch.float32, device=q.device)
"""
STATE: Final = """\
state = total = q
if $parts > 1:
    $new
    ${name}_state_kernel[(batch * heads * $parts * $state_columns,)](
        $arguments
    )
"""
FILTERS: Final = """\
shares = min(batch * heads, 64)
kept = torch.empty((shares, $taps, $taps, $value_dim), dtype=torch.float32, device=q.device)
with torch.cuda.device_of(q):
    filters_kernel[(shares * $taps * $values_columns,)](
        $filters_arguments
    )
found.append(kept.sum(0).permute(2, 0, 1).contiguous().to(weight.dtype))
found.append(g[:, :, $first:].sum((0, 1, 2), dtype=torch.float32).to(weight.dtype))
"""

MAIN: Final = '''
def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    $optional
) -> torch.Tensor:
    """The same in plain PyTorch, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    $reference_positions
    k = torch.relu(k)
    $reference_keep
    weights = torch.relu(q) @ k.transpose(-2, -1)
    $reference_causal
    out = (weights @ v) / (weights.sum(-1, keepdim=True) + $eps)
    $reference_local
    return out


def main() -> None:
    """Check against the reference on a small case, then time a large one."""
    for batch, heads, tokens in $cases:
        q = torch.randn(batch, heads, tokens, $head_dim, device="cuda", dtype=torch.$dtype)
        k = torch.randn(batch, heads, tokens, $head_dim, device="cuda", dtype=torch.$dtype)
        v = torch.randn(batch, heads, tokens, $value_dim, device="cuda", dtype=torch.$dtype)
        others = (
            $drawn
        )
        if batch < 8:
            error = (launch(q, k, v, *others)[0].double() - reference(q, k, v, *others)).abs().max().item()
            print(f"largest error against float64: {error:.3g}")
        else:
            milliseconds = triton.testing.do_bench(lambda: launch(q, k, v, *others))
            print(f"{batch} x {heads} heads x {tokens}: {milliseconds:.3f} ms")


if __name__ == "__main__":
    main()
'''
REFERENCE_LOCAL: Final = """\
grid = v[:, :, $first:].transpose(2, 3).reshape(-1, $value_dim, $side, $side)
near = torch.nn.functional.conv2d(grid, weight.double()[:, None], bias.double(), padding=$margin, groups=$value_dim)
near = near.reshape(*v.shape[:2], $value_dim, $side * $side).transpose(2, 3)
out = out + torch.nn.functional.pad(near, (0, 0, $first, 0))"""
