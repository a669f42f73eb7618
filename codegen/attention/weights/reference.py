"""What an attention's weights, and sums of them, mean in plain PyTorch.

Legend: as `fxopt.codegen.attention.reference`. ``P [B, H, S, T]`` are the weights of the specification before dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor

from fxopt.codegen.attention import reference
from fxopt.errors import LoweringError
from fxopt.ir.attention import AttentionSpec
from fxopt.ir.operators import define_meaning


def attention_weights(q: Tensor, k: Tensor, captures: Sequence[Tensor], spec: str) -> Tensor:
    """The weights of the attention that ``spec`` (the printed `AttentionSpec`) describes.

        x[b,h,i,j] = score(s = Σ_d q[b,h,i,d]·k[b,g(h),j,d]; b, h, i, j, captures)
        P = softmax over { j : mask(b,h,i,j) } of x

    Args:
        q: ``[B, H, S, D]``.
        k: ``[B, G, T, D]``.
        captures: rank 4, read as their `Capture` says.
        spec: the printed specification. Its dropout and memory order don't matter here.

    Returns:
        ``P [B, H, S, T]``, contiguous, in the specification's ``out_dtype``.
    """
    meaning = reference.specification(spec)
    return exact_weights(meaning, q, k, captures).to(meaning.out_dtype).contiguous()


def attention_statistics(q: Tensor, k: Tensor, captures: Sequence[Tensor], spec: str, kind: str) -> Tensor:
    """Sums or elements of the weights ``P`` of an attention, without ``P`` where a kernel serves.

        column_sum[b,h,j] = Σ_i P[b,h,i,j]
        diagonal[b,h,n] = P[b,h,n,n]

    Args:
        q: ``[B, H, S, D]``.
        k: ``[B, G, T, D]``.
        captures: rank 4, read as their `Capture` says.
        spec: the printed specification. Its dropout and memory order don't matter here.
        kind: ``"column_sum"`` or ``"diagonal"``.

    Returns:
        ``[B, H, T]`` or ``[B, H, min(S, T)]``, contiguous, in the specification's ``out_dtype``.

    Raises:
        LoweringError: another kind.
    """
    meaning = reference.specification(spec)
    weights_BHST = exact_weights(meaning, q, k, captures)
    return reduction(kind)(weights_BHST).to(meaning.out_dtype).contiguous()


def attention_values(weights: Tensor, v: Tensor, spec: str) -> Tensor:
    """The output of an attention whose weights are known: ``out[b,h,i,:] = Σ_j P[b,h,i,j]·v[b,g(h),j,:]``.

    Args:
        weights: ``P [B, H, S, T]``, cast to the dtype of ``v`` first.
        v: ``[B, G, T, E]``.
        spec: the printed `AttentionSpec`; only its heads and the dtype and memory order of the result are read.

    Returns:
        ``[B, H, S, E]`` in the dtype and memory order that the specification names.
    """
    meaning = reference.specification(spec)
    narrow_BHST = weights.to(v.dtype)
    out = reference.fold_heads(narrow_BHST, v, meaning.kv_map) @ v
    return reference.lay_out(meaning, reference.unfold_heads(out, weights, meaning.kv_map))


def exact_weights(spec: AttentionSpec, q: Tensor, k: Tensor, captures: Sequence[Tensor]) -> Tensor:
    """``P [B, H, S, T]`` in float32 (float64 for float64 inputs)."""
    return reference.weights(spec, reference.logits(spec, q, k, captures))


REDUCTIONS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "column_sum": lambda weights_BHST: weights_BHST.sum(2),
    "diagonal": lambda weights_BHST: weights_BHST.diagonal(dim1=2, dim2=3),
}


def reduction(kind: str) -> Callable[[Tensor], Tensor]:
    """What ``kind`` makes of ``P``; raises `LoweringError` for an unknown kind."""
    if kind not in REDUCTIONS:
        raise LoweringError(f"there is no attention statistic {kind!r}; they are {', '.join(REDUCTIONS)}")
    return REDUCTIONS[kind]


def result_size(q: Tensor, k: Tensor, kind: str) -> tuple[int, ...]:
    """The shape of the result of one kind, ``"weights"`` for all of them."""
    batch, heads, rows = q.shape[:3]
    keys = k.shape[2]
    if kind == "weights":
        return (batch, heads, rows, keys)
    reduction(kind)
    return (batch, heads, keys if kind == "column_sum" else torch.sym_min(rows, keys))


def _empty_weights(q: Tensor, k: Tensor, captures: Sequence[Tensor], spec: str) -> Tensor:
    return q.new_empty(result_size(q, k, "weights"), dtype=reference.specification(spec).out_dtype)


def _empty_statistics(q: Tensor, k: Tensor, captures: Sequence[Tensor], spec: str, kind: str) -> Tensor:
    return q.new_empty(result_size(q, k, kind), dtype=reference.specification(spec).out_dtype)


define_meaning("attention_weights", attention_weights, _empty_weights)
define_meaning("attention_statistics", attention_statistics, _empty_statistics)
define_meaning("attention_values", attention_values)
