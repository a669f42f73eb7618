"""What ``fxopt::attention`` means, in plain PyTorch.

Legend: ``B`` batch, ``H`` query heads, ``G`` key/value heads, ``R = H/G`` query heads a key/value head serves, ``S``
query length, ``T`` key length, ``D`` head dimension of queries and keys, ``E`` head dimension of values.

The two contractions run in the dtype of the inputs, everything between them in at least float32. No size is ever made
a Python number, so the functions trace with symbolic shapes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

from fxopt.codegen.attention.philox import factors
from fxopt.codegen.expression import evaluate
from fxopt.errors import LoweringError
from fxopt.ir.attention import AttentionSpec, KvMap, read_spec
from fxopt.ir.expression import Expr
from fxopt.ir.nodes import Size, may_be_same_size
from fxopt.ir.operators import define_meaning

_AXIS_OF: Final[dict[str, int]] = {"b": 0, "h": 1, "i": 2, "j": 3}

specification = lru_cache(maxsize=1024)(read_spec)


def attention(
    q: Tensor, k: Tensor, v: Tensor, captures: Sequence[Tensor], spec: str, seed: Tensor | None = None
) -> Tensor:
    """Attention as ``spec`` (the printed `AttentionSpec`) says.

        x[b,h,i,j] = score(s = Σ_d q[b,h,i,d]·k[b,g(h),j,d]; b, h, i, j, captures)
        P = softmax over { j : mask(b,h,i,j) } of x
        out[b,h,i,:] = Σ_j dropout(P)[b,h,i,j]·v[b,g(h),j,:]

    Which weights are dropped is told by PyTorch's generator or, as in generated kernels, by a ``seed`` and the place of
    a weight alone (`fxopt.codegen.attention.philox`).

    A row without any key gives NaN, 0 or the mean of all values, as ``spec`` says: ``rows=nan``, ``zero``, ``uniform``.
    The mean is what softmax makes of a row filled with one finite number, such as the lowest one.

    Args:
        q: ``[B, H, S, D]``.
        k: ``[B, G, T, D]``.
        v: ``[B, G, T, E]``.
        captures: rank 4, read as their `Capture` says.
        spec: the printed specification.
        seed: ``[1]``, int64; only read where there is dropout.

    Returns:
        ``[B, H, S, E]`` in the dtype and memory order that the specification names.
    """
    meaning = specification(spec)
    return attended(meaning, logits(meaning, q, k, captures), q, v, seed)


def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, captures: Sequence[Tensor], spec: str, seed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`attention`, and how large its logits are.

        lse[b,h,i] = log Σ_j exp(x[b,h,i,j])        over { j : mask(b,h,i,j) }; −inf in a row without any key

    What the log-sum-exp is read for: a loss that keeps logits small, attentions over parts of the keys that are merged.
    Its gradient by the logits are the weights before dropout.

    Args:
        q: ``[B, H, S, D]``.
        k: ``[B, G, T, D]``.
        v: ``[B, G, T, E]``.
        captures: rank 4, read as their `Capture` says.
        spec: the printed specification.
        seed: ``[1]``, int64; only read where there is dropout.

    Returns:
        ``[B, H, S, E]`` in the dtype and memory order that the specification names, and ``lse [B, H, S]``, contiguous,
        in float32 (float64 for float64 inputs).
    """
    meaning = specification(spec)
    logits_BHST = logits(meaning, q, k, captures)
    return attended(meaning, logits_BHST, q, v, seed), torch.logsumexp(logits_BHST, -1)


def attended(spec: AttentionSpec, logits_BHST: Tensor, q: Tensor, v: Tensor, seed: Tensor | None) -> Tensor:
    """The result of an attention with these logits."""
    weights_BHST = weights(spec, logits_BHST).to(v.dtype)
    if spec.dropout:
        weights_BHST = dropped(spec, weights_BHST, seed)
    return average(spec, weights_BHST, q, v)


def dropped(spec: AttentionSpec, weights_BHST: Tensor, seed: Tensor | None) -> Tensor:
    """The weights after dropout, by PyTorch's generator where there is no ``seed``."""
    if seed is None:
        return F.dropout(weights_BHST, spec.dropout, training=True)
    return weights_BHST * factors(weights_BHST, seed, spec.dropout)


def average(spec: AttentionSpec, weights_BHST: Tensor, q: Tensor, v: Tensor) -> Tensor:
    """The values averaged with these weights, laid out as the result of ``spec``."""
    return lay_out(spec, unfold_heads(fold_heads(weights_BHST, v, spec.kv_map) @ v, q, spec.kv_map))


def logits(spec: AttentionSpec, q: Tensor, k: Tensor, captures: Sequence[Tensor]) -> Tensor:
    """The masked logits ``[B, H, S, T]``, in float32 (float64 for float64 inputs); −inf outside the mask."""
    s_BHST = raw_scores(spec, q, k)
    readings = read_captures(spec, captures, s_BHST)
    env = environment(spec, s_BHST)
    x_BHST = spread(evaluate(spec.score, env, readings), s_BHST)
    if spec.mask is None:
        return x_BHST
    return torch.where(kept(spec.mask, env, readings, s_BHST), x_BHST, -math.inf)


def weights(spec: AttentionSpec, logits_BHST: Tensor) -> Tensor:
    """Softmax over the keys, in the dtype of the logits; rows of nothing but −inf as ``spec.empty_rows`` says."""
    if spec.empty_rows == "nan" or not may_be_empty(spec):
        return torch.softmax(logits_BHST, -1)
    empty_BHS1 = (logits_BHST == -math.inf).all(-1, keepdim=True)
    # Replaced before the softmax too: its gradient at such a row would be NaN even where nothing flows into it.
    weights_BHST = torch.softmax(torch.where(empty_BHS1, 0.0, logits_BHST), -1)
    return weights_BHST if spec.empty_rows == "uniform" else torch.where(empty_BHS1, 0.0, weights_BHST)


def may_be_empty(spec: AttentionSpec) -> bool:
    """Whether a row can be left without any key: a mask, an infinite constant or a captured real tensor."""
    infinite = any(n.op == "const" and n.value == -math.inf for n in spec.score.walk())
    return spec.mask is not None or infinite or any(c.kind == "float" for c in spec.captures)


def raw_scores(spec: AttentionSpec, q: Tensor, k: Tensor) -> Tensor:
    """``s [B, H, S, T]``, contracted in the dtype of the inputs and widened to at least float32."""
    s_BHST = unfold_heads(fold_heads(q, k, spec.kv_map) @ k.transpose(-2, -1), q, spec.kv_map)
    return s_BHST.to(torch.promote_types(s_BHST.dtype, torch.float32))


def fold_heads(x: Tensor, k: Tensor, kv_map: KvMap) -> Tensor:
    """``[B, H, S, *] -> [B, G, R·S, *]``: the rows of all query heads that one key/value head serves, one after
    another, so that keys and values are never repeated.
    """
    if x.shape[1] == k.shape[1]:
        return x
    batch, heads, rows, width = x.shape
    groups = k.shape[1]
    if kv_map == "group":
        return x.reshape(batch, groups, heads // groups * rows, width)
    tiles = x.reshape(batch, heads // groups, groups, rows, width).transpose(1, 2)
    return tiles.reshape(batch, groups, heads // groups * rows, width)


def unfold_heads(x: Tensor, q: Tensor, kv_map: KvMap) -> Tensor:
    """The inverse of `fold_heads`; ``q`` gives the number of heads and rows."""
    if x.shape[1] == q.shape[1]:
        return x
    batch, groups, _, width = x.shape
    heads, rows = q.shape[1], q.shape[2]
    if kv_map == "group":
        unfolded = x.reshape(batch, heads, rows, width)
    else:
        tiles = x.reshape(batch, groups, heads // groups, rows, width).transpose(1, 2)
        unfolded = tiles.reshape(batch, heads, rows, width)
    # A reshape of symbolic sizes computes its own expressions for them; these are the ones that the caller knows.
    return unfolded.expand(batch, heads, rows, width)


def read_captures(spec: AttentionSpec, captures: Sequence[Tensor], s_BHST: Tensor) -> tuple[Tensor, ...]:
    """The captures so that they broadcast with the scores: real ones in the dtype of the scores, periodic ones
    repeated along the batch, bands spread along their diagonals.
    """
    check_captures(spec, captures, tuple(s_BHST.shape))
    readings = []
    for tensor, how in zip(captures, spec.captures, strict=True):
        value = tensor.to(s_BHST.dtype) if how.kind == "float" else tensor
        if how.dims[0] == "p":
            batch = torch.arange(s_BHST.shape[0], device=tensor.device)
            value = value.index_select(0, batch % tensor.shape[0])
        if how.is_band:
            value = value[:, :, 0, band_index(s_BHST)]
        readings.append(value)
    return tuple(readings)


def check_captures(spec: AttentionSpec, captures: Sequence[Tensor], sizes: tuple[Size, ...]) -> None:
    """Raises `LoweringError` where a capture isn't as large as scores of ``sizes``, ``(B, H, S, T)``, read it: kernels
    would read beyond it.
    """
    batch, heads, rows, keys = sizes
    extents = {"-": 1, "b": batch, "h": heads, "i": rows, "j": keys, "d": rows + keys - 1}
    for number, (tensor, how) in enumerate(zip(captures, spec.captures, strict=True)):
        for size, letter in zip(tensor.shape, how.dims, strict=True):
            if letter in extents and not may_be_same_size(size, extents[letter]):
                raise LoweringError(f"c{number} of shape {tuple(tensor.shape)} can't be read as {how} ({spec})")


def band_index(s_BHST: Tensor) -> Tensor:
    """Where a band is read, ``j - i + (S - 1)``, as ``[S, T]``."""
    rows, keys = (torch.arange(size, device=s_BHST.device) for size in s_BHST.shape[2:])
    return keys - rows[:, None] + (s_BHST.shape[2] - 1)


def environment(spec: AttentionSpec, s_BHST: Tensor) -> dict[str, Any]:
    """The value of every symbol that the score or the mask reads."""
    env: dict[str, Any] = {"s": s_BHST, "Sq": s_BHST.shape[2], "Sk": s_BHST.shape[3]}
    read = {str(n.value) for e in (spec.score, spec.mask) if e for n in e.walk() if n.op == "symbol"}
    for name, axis in _AXIS_OF.items():
        if name in read:
            shape = [1, 1, 1, 1]
            shape[axis] = -1
            env[name] = torch.arange(s_BHST.shape[axis], device=s_BHST.device).view(shape)
    return env


def kept(mask: Expr, env: dict[str, Any], readings: Sequence[Tensor], s_BHST: Tensor) -> Tensor:
    """Where a key takes part, a boolean tensor that broadcasts with the scores."""
    value = evaluate(mask, env, readings)
    return value if isinstance(value, Tensor) else torch.full((), value, dtype=torch.bool, device=s_BHST.device)


def spread(value: Any, s_BHST: Tensor) -> Tensor:
    """``value`` with the shape and dtype of the scores; a score need not read ``s``."""
    if not isinstance(value, Tensor):
        return torch.full_like(s_BHST, value)
    return value.to(s_BHST.dtype).expand_as(s_BHST)


def lay_out(spec: AttentionSpec, out_BHSE: Tensor) -> Tensor:
    """``out`` in the dtype and memory order of the specification."""
    out_BHSE = out_BHSE.to(spec.out_dtype)
    if spec.out_layout == "bhsd":
        return out_BHSE.contiguous()
    out_BSHE = out_BHSE.transpose(1, 2)
    if _is_dense(out_BSHE):
        return out_BHSE
    # A clone, because a tensor with one row or head is contiguous whatever its strides are.
    return out_BSHE.clone(memory_format=torch.contiguous_format).transpose(1, 2)


def _is_dense(x: Tensor) -> bool:
    """Whether the strides of ``x`` are, axis by axis, those of a new tensor of its shape."""
    expected: int | torch.SymInt = 1
    for size, stride in zip(reversed(x.shape), reversed(x.stride()), strict=True):
        if not statically_known_true(stride == expected):
            return False
        expected = expected * size
    return True


def empty_result(q: Tensor, k: Tensor, v: Tensor, captures: Sequence[Tensor], spec: str) -> Tensor:
    """An uninitialised tensor of the shape, dtype and strides of the result."""
    meaning = specification(spec)
    batch, heads, rows, width = q.shape[0], q.shape[1], q.shape[2], v.shape[3]
    if meaning.out_layout == "bhsd":
        return q.new_empty((batch, heads, rows, width), dtype=meaning.out_dtype)
    return q.new_empty((batch, rows, heads, width), dtype=meaning.out_dtype).transpose(1, 2)


def empty_results(q: Tensor, k: Tensor, v: Tensor, captures: Sequence[Tensor], spec: str) -> tuple[Tensor, Tensor]:
    """`empty_result`, and the same for the log-sum-exp."""
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    return empty_result(q, k, v, captures, spec), lse


define_meaning("attention", attention, empty_result)
define_meaning("attention_with_lse", attention_with_lse, empty_results)
