"""The meaning of canonical linear attention, in plain PyTorch.

Legend: B batch, H heads, S queries, T keys, D head dimension of queries and keys, E of values, R side of the filters.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F

from fxopt.codegen.attention import reference as attention
from fxopt.ir.attention import AttentionSpec
from fxopt.ir.expression import S
from fxopt.ir.linear_attention import LinearSpec, read_linear_spec
from fxopt.ir.operators import define_meaning

#: Rows of the causal form that meet one another directly; earlier ones through their sum.
_CHUNK: Final = 64

specification = lru_cache(maxsize=1024)(read_linear_spec)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    keep: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    spec: str,
) -> Tensor:
    """Attention whose weights are products of rectified queries and keys, with a convolution of the values beside it.

        Q = relu(q)
        K[j] = relu(k[j] + positions[j]) where keep[j], else 0
        out[i] = Σ_j (Q[i]·K[j]) v[j] / (Σ_j Q[i]·K[j] + eps) + local[i]        (j <= i if causal)
        local[i] = bias + Σ_(r,c) weight[r,c] ⊙ v at the place of i in the grid, moved by (r, c) − (R − 1)/2; 0 outside

    There is no scale, as it would cancel. A row without any key gives 0. The sums are computed in float32 (float64 for
    float64 inputs), as ``(Q Kᵀ) v`` or ``Q (Kᵀ v)``, whichever takes fewer products; the causal form in chunks.

    Args:
        q: ``[B, H, S, D]``.
        k: ``[B, H, T, D]``.
        v: ``[B, H, T, E]``.
        positions: ``[H, T, D]``, what is added to the keys of each position; ``None`` for nothing.
        keep: ``[B, T]``, boolean, false where a key is padding; ``None`` keeps all.
        weight: ``[E, R, R]``, one filter a channel for all heads, R odd; ``None`` for no convolution.
        bias: ``[E]``, given with ``weight``.
        spec: the printed `LinearSpec`.

    Returns:
        ``[B, H, S, E]`` in the dtype and memory order that the specification names.
    """
    meaning = specification(spec)
    out, _ = attended(q, k, v, positions, keep, meaning)
    if weight is not None:
        out = out + local(v, weight, bias, meaning)
    return lay_out(meaning, out, q.dtype)


def attended(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None, keep: Tensor | None, spec: LinearSpec
) -> tuple[Tensor, Tensor]:
    """The result without the convolution ``[B, H, S, E]``, and the denominators ``[B, H, S]``, in the wide dtype."""
    query, key = rectified(q, k, positions, keep)
    sums = _causal if spec.causal else _whole
    # A column of ones gives the sum of the weights.
    value = F.pad(v.to(query.dtype), (0, 1), value=1.0)
    with _without_autocast(q.device.type):
        total = sums(query, key, value)
    denominators = total[..., -1:] + spec.eps
    return total[..., :-1] / denominators, denominators[..., 0]


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    """Sums are wide under autocast too, as those of the kernels are."""
    known = device in ("cpu", "cuda") and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if known else nullcontext()


def rectified(q: Tensor, k: Tensor, positions: Tensor | None, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """``Q`` and ``K`` in the wide dtype."""
    wide = torch.promote_types(q.dtype, torch.float32)
    key = torch.relu(k.to(wide) if positions is None else k.to(wide) + positions.to(wide))
    return torch.relu(q).to(wide), key if keep is None else key.masked_fill(~keep[:, None, :, None], 0.0)


def local(v: Tensor, weight: Tensor, bias: Tensor | None, spec: LinearSpec) -> Tensor:
    """The convolution of the values, ``[B, H, T, E]``; 0 for the tokens before the grid."""
    margin = weight.shape[-1] // 2
    filters, shift = weight[:, None].to(v.dtype), None if bias is None else bias.to(v.dtype)
    found = F.conv2d(as_grid(v, spec), filters, shift, padding=margin, groups=v.shape[3])
    return from_grid(found, v, spec)


def as_grid(x: Tensor, spec: LinearSpec) -> Tensor:
    """``[B, H, T, E] -> [B·H, E, side, side]``, without the tokens before the grid."""
    batch, heads, _, channels = x.shape
    return x[:, :, spec.first :].transpose(2, 3).reshape(batch * heads, channels, spec.side, spec.side)


def from_grid(grid_VEYX: Tensor, like: Tensor, spec: LinearSpec) -> Tensor:
    """The inverse of `as_grid`, for tokens as ``like`` has them; 0 for those before the grid."""
    batch, heads, tokens, channels = like.shape
    out = grid_VEYX.reshape(batch, heads, channels, tokens - spec.first).transpose(2, 3)
    return F.pad(out, (0, 0, spec.first, 0)) if spec.first else out


def is_linear(queries: object, keys: object, head_dim: int, value_dim: int) -> bool:
    """Whether ``Q (Kᵀ v)`` takes fewer products than ``(Q Kᵀ) v``; assumed where sizes are symbolic."""
    if not (isinstance(queries, int) and isinstance(keys, int)):
        return True
    return queries * keys * (head_dim + value_dim) > head_dim * value_dim * (queries + keys)


def lay_out(spec: LinearSpec, out: Tensor, dtype: torch.dtype) -> Tensor:
    """``out`` in the dtype and memory order of the specification, for queries of ``dtype``."""
    return attention.lay_out(_as_attention(spec, dtype), out)


def empty_result(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    keep: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    spec: str,
) -> Tensor:
    """An uninitialised tensor of the shape, dtype and strides of the result."""
    return attention.empty_result(q, k, v, [], str(_as_attention(specification(spec), q.dtype)))


def _as_attention(spec: LinearSpec, dtype: torch.dtype) -> AttentionSpec:
    return AttentionSpec(S, out_dtype=spec.result(dtype), out_layout=spec.out_layout)


def _whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if is_linear(q.shape[2], k.shape[2], q.shape[3], v.shape[3]):
        return q @ (k.transpose(2, 3) @ v)
    return (q @ k.transpose(2, 3)) @ v


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    length = q.shape[2]
    chunks = (length + _CHUNK - 1) // _CHUNK
    q, k, v = (_in_chunks(x, chunks) for x in (q, k, v))
    sums_BHCDE = (k.transpose(3, 4) @ v).cumsum(2)
    before_BHCDE = F.pad(sums_BHCDE[:, :, :-1], (0, 0, 0, 0, 1, 0))
    out: Tensor = q @ before_BHCDE + (q @ k.transpose(3, 4)).tril() @ v
    return out.flatten(2, 3)[:, :, :length]


def _in_chunks(x: Tensor, chunks: int) -> Tensor:
    batch, heads, tokens, channels = x.shape
    return F.pad(x, (0, 0, 0, chunks * _CHUNK - tokens)).reshape(batch, heads, chunks, _CHUNK, channels)


define_meaning("linear_attention", linear_attention, empty_result)
