"""The text of the kernels of gradients of linear attention, with ``$holes`` as in the template of the forward."""

from __future__ import annotations

from typing import Final

QUERIES: Final = '''
@triton.jit($unspecialized)
def queries_kernel(
    $parameters
):
    """The gradients of one part of the queries of a head."""
    $place
    b = group.to(tl.int64)
    d = column * BLOCK_D + tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    $bases
    $state
    for start in range(part * part_length, tl.minimum((part + 1) * part_length, Sq), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        $load_gradient
        $between
        query = load_tokens(q, n, Sq, d, q_stride_n, q_stride_d, $head_dim, EVEN_D)
        result = tl.where(query > 0, result, 0.0)
        store_tokens(result, r, n, Sq, d, r_stride_n, r_stride_d, $head_dim, EVEN_D)
        $fold

'''
QUERIES_FROM_STATE: Final = """\
product = tl.dot(grad.to(tl.float32), tl.trans(state), input_precision=PRECISION)
result = product * inverse[:, None] + delta[:, None] * total[None, :]
"""
QUERIES_WEIGHTS: Final = """\
key = load_keys(
    $keys_arguments
)
key = rectified(key)
value = load_tokens(v, n, Sk, e, v_stride_n, v_stride_e, $value_dim, EVEN_E)
weights = tl.dot(grad, tl.trans(value), input_precision=PRECISION) * inverse[:, None] + delta[:, None]
weights = tl.where($seen, weights, 0.0)
result $assign tl.dot(weights, key, input_precision=PRECISION)
"""

KEYS: Final = '''
@triton.jit($unspecialized)
def keys_kernel(
    $parameters
):
    """The gradients of one part of the keys of a head."""
    $place
    b = group.to(tl.int64)
    d = column * BLOCK_D + tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    $bases
    $state
    for tile in range(0, tl.cdiv(tl.minimum(part_length, Sk - part * part_length), BLOCK_N)):
        start = $start
        n = start + tl.arange(0, BLOCK_N)
        value = load_tokens(v, n, Sk, e, v_stride_n, v_stride_e, $value_dim, EVEN_E)
        $rows
        $between
        key = load_keys(
            $keys_arguments
        )
        result = tl.where(key > 0, result, 0.0)
        store_tokens(result, r, n, Sk, d, r_stride_n, r_stride_d, $head_dim, EVEN_D)
        $fold

'''
KEYS_FROM_STATE: Final = """\
result = tl.dot(value.to(tl.float32), tl.trans(state), input_precision=PRECISION) + total[None, :]
"""
KEYS_WEIGHTS: Final = """\
weights = tl.dot(value, tl.trans(grad), input_precision=PRECISION) * inverse[None, :] + delta[None, :]
weights = tl.where($seen, weights, 0.0)
result $assign tl.dot(weights, query, input_precision=PRECISION)
"""

VALUES: Final = '''
@triton.jit($unspecialized)
def values_kernel(
    $parameters
):
    """The gradients of one part of the values of a head."""
    $place
    b = group.to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    e = column * BLOCK_E + tl.arange(0, BLOCK_E)
    $bases
    $state
    for tile in range(0, tl.cdiv(tl.minimum(part_length, $slots - part * part_length), BLOCK_N)):
        start = $start
        n = $tokens
        key = load_keys(
            $keys_arguments
        )
        key = rectified(key)
        $rows
        $between
        $local
        store_tokens(result, r, n, Sk, e, r_stride_n, r_stride_e, $value_dim, EVEN_E)
        $fold

'''
#: As the other sums over the queries, without what only the gradients of keys need.
VALUES_TILE: Final = """\
n = start + tl.arange(0, BLOCK_N)
$values_rows
$values_fold
"""
VALUES_ROWS: Final = """\
query = rectified(load_tokens(q, n, Sq, d, q_stride_n, q_stride_d, $head_dim, EVEN_D).to(tl.float32))
grad = load_tokens(g, n, Sq, e, g_stride_n, g_stride_e, $value_dim, EVEN_E).to(tl.float32)
scaled = grad / tl.load(sums + n, mask=n < Sq, other=1.0)[:, None]
"""
VALUES_FOLD: Final = """\
state += tl.dot(tl.trans(query), scaled, input_precision=PRECISION)
"""
VALUES_FROM_STATE: Final = """\
result = tl.dot(key, state, input_precision=PRECISION)
"""
VALUES_WEIGHTS: Final = """\
narrow = query.to(q_ptr.dtype.element_ty)
weights = tl.dot(key.to(narrow.dtype), tl.trans(narrow), input_precision=PRECISION)
$causal
result $assign tl.dot(weights, scaled, input_precision=PRECISION)
"""
CAUSAL_BY_KEY: Final = """\
weights = tl.where(n[:, None] <= n[None, :], weights, 0.0)
"""

FILTERS: Final = '''
@triton.jit($unspecialized)
def filters_kernel(
    $parameters
):
    """What one share of the heads of all sequences adds to the gradient of one row of the filters."""
    program = tl.program_id(0)
    column = program % COLUMNS
    row = program // COLUMNS % $taps
    share = program // COLUMNS // $taps
    e = column * BLOCK_E + tl.arange(0, BLOCK_E)
    $new_sums
    for turn in range(0, tl.cdiv(batch * heads - share, shares)):
        item = share + turn * shares
        b = (item // heads).to(tl.int64)
        h = (item % heads).to(tl.int64)
        g = g_ptr + b * g_stride_b + h * g_stride_h
        v = v_ptr + b * v_stride_b + h * v_stride_h
        for start in range($first, Sq, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            grad = load_tokens(g, n, Sq, e, g_stride_n, g_stride_e, $value_dim, EVEN_E).to(tl.float32)
            y = (n - $first) // $side + row - $margin
            x = (n - $first) % $side
            $add_taps
    at = sums_ptr + (share * $taps + row) * $taps * $value_dim + e
    $store_taps

'''
ADD_TAP: Final = """\
inside = (n < Sq) & (y >= 0) & (y < $side) & (x + $shift >= 0) & (x + $shift < $side)
moved = ($first + y * $side + x + $shift).to(tl.int64)
at = v + moved[:, None] * v_stride_n + e[None, :] * v_stride_e
sum_$tap += grad * tl.load(at, mask=inside[:, None]$e_mask, other=0.0).to(tl.float32)
"""
