"""Gradients of an attention by recomputing its weights, in plain PyTorch.

    x = score(s, captures), P = softmax(x), out = (P∘M)·v
    dv = (P∘M)ᵀ·dout,  dP = (dout·vᵀ)∘M,  dx = P∘(dP − Σ_j P∘dP + dlse),  ds = dx·∂score/∂s,  dq = ds·k,  dk = dsᵀ·q

with what dropout multiplies the weights with, ``M``, told again by its seed (1 without dropout),
and for each captured tensor dx·∂score/∂c, summed over the axes along which it was broadcast. The weights are computed
anew rather than from the log-sum-exp: that of a row filled with a finite stand-in for −inf has lost their number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fxopt.codegen.attention import reference
from fxopt.codegen.attention.philox import factors
from fxopt.codegen.expression import evaluate, gradient
from fxopt.ir.attention import AttentionSpec, Capture
from fxopt.ir.expression import S, capture


def gradients(
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: Sequence[Tensor],
    wanted: Sequence[bool],
    grad_out: Tensor,
    grad_lse: Tensor | None,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:
    """The gradients of ``q``, ``k``, ``v`` and of the captures that are ``wanted`` (``None`` for the others).

    Args:
        spec: the attention.
        q: ``[B, H, S, D]``.
        k: ``[B, G, T, D]``.
        v: ``[B, G, T, E]``.
        captures: the captured tensors.
        wanted: which of them need a gradient.
        grad_out: ``[B, H, S, E]``, of the output.
        grad_lse: ``[B, H, S]``, of the log-sum-exp, if it was read.
        seed: that of the forward, where there is dropout.
    """
    s_BHST = reference.raw_scores(spec, q, k)
    readings = reference.read_captures(spec, captures, s_BHST)
    env = reference.environment(spec, s_BHST)
    x_BHST = reference.spread(evaluate(spec.score, env, readings), s_BHST)
    mask = None if spec.mask is None else reference.kept(spec.mask, env, readings, s_BHST)
    if mask is not None:
        x_BHST = torch.where(mask, x_BHST, -math.inf)
    p_BHST = reference.weights(spec, x_BHST)

    def folded(x: Tensor) -> Tensor:
        return reference.fold_heads(x, k, spec.kv_map)

    dout = folded(grad_out.to(v.dtype))
    dp_BHST = reference.unfold_heads(dout @ v.transpose(-2, -1), q, spec.kv_map).to(p_BHST.dtype)
    used_BHST, dp_BHST = (p_BHST, dp_BHST) if seed is None else _dropped(spec, seed, p_BHST, dp_BHST)
    dv = folded(used_BHST.to(v.dtype)).transpose(-2, -1) @ dout
    flow_BHS1 = (p_BHST * dp_BHST).sum(-1, keepdim=True)
    if grad_lse is not None:
        flow_BHS1 = flow_BHS1 - grad_lse.unsqueeze(-1)
    dx_BHST = _without_hidden(spec, p_BHST * (dp_BHST - flow_BHS1), x_BHST, mask)

    def chained(leaf_index: int | None) -> Tensor:
        leaf = S if leaf_index is None else capture(leaf_index)
        slope: Tensor | float = evaluate(gradient(spec.score, leaf), env, readings)
        return dx_BHST * slope

    ds = folded(chained(None).to(q.dtype))
    dq = reference.unfold_heads(ds @ k, q, spec.kv_map)
    dk = ds.transpose(-2, -1) @ folded(q)
    dcaptures = [
        unread(chained(n), tensor, how) if want else None
        for n, (tensor, how, want) in enumerate(zip(captures, spec.captures, wanted, strict=True))
    ]
    return dq, dk, dv, dcaptures


def _without_hidden(spec: AttentionSpec, dx_BHST: Tensor, x_BHST: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None:
        dx_BHST = torch.where(mask, dx_BHST, 0.0)
    if spec.empty_rows == "uniform":
        # Weights that are not 0, of rows whose logits the weights do not depend on.
        dx_BHST = torch.where(x_BHST == -math.inf, 0.0, dx_BHST)
    return dx_BHST


def _dropped(spec: AttentionSpec, seed: Tensor, p_BHST: Tensor, dp_BHST: Tensor) -> tuple[Tensor, Tensor]:
    factors_BHST = factors(p_BHST, seed, spec.dropout)
    return p_BHST * factors_BHST, dp_BHST * factors_BHST


def unread(grad_BHST: Tensor, tensor: Tensor, how: Capture) -> Tensor:
    """The transpose of reading a capture: sum over the axes it was broadcast along."""
    axes = [axis for axis, letter in enumerate(how.dims) if letter == "-" and not (how.is_band and axis == 2)]
    grad = grad_BHST.sum(axes, keepdim=True) if axes else grad_BHST
    if how.dims[0] == "p":
        # Batches a period apart stand below one another; adding them by index would be in no fixed order on CUDA.
        period = tensor.shape[0]
        grad = torch.nn.functional.pad(grad, (0, 0, 0, 0, 0, 0, 0, -grad.shape[0] % period))
        grad = grad.reshape(-1, period, *grad.shape[1:]).sum(0)
    if how.is_band:
        grad = _along_diagonals(grad)
    return grad.to(tensor.dtype)


def _along_diagonals(grad_BHST: Tensor) -> Tensor:
    """``[B, H, S, T] -> [B, H, 1, S + T - 1]``: sums over equal ``j - i``.

    Rows padded to length ``S + T`` and read on at ``S + T - 1`` elements a row move one place further to the left each.
    """
    batch, heads, rows, keys = grad_BHST.shape
    padded = torch.nn.functional.pad(grad_BHST.flip(-2), (0, rows))
    flat = padded.reshape(batch, heads, rows * (rows + keys))[..., : rows * (rows + keys - 1)]
    return flat.reshape(batch, heads, rows, rows + keys - 1).sum(-2, keepdim=True)
