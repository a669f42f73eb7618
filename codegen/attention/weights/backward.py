"""Gradients of attention weights and of statistics of them by recomputing the weights, in plain PyTorch.

    dP from the gradient of the result,  dx = P∘(dP − Σ_j P∘dP),  ds = dx·∂score/∂s,  dq = ds·k,  dk = dsᵀ·q

and for each captured tensor dx·∂score/∂c, summed over the axes along which it was broadcast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fxopt.codegen.attention import reference
from fxopt.codegen.expression import evaluate, gradient
from fxopt.ir.attention import AttentionSpec, Capture
from fxopt.ir.expression import Expr, S, capture


def gradients(
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
    captures: Sequence[Tensor],
    wanted: Sequence[bool],
    kind: str,
    grad: Tensor,
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """The gradients of ``q``, ``k`` and of the captures that are ``wanted`` (``None`` for the others).

    Args:
        spec: the attention.
        q: ``[B, H, S, D]``.
        k: ``[B, G, T, D]``.
        captures: the captured tensors.
        wanted: which of them need a gradient.
        kind: ``"weights"``, ``"column_sum"`` or ``"diagonal"``.
        grad: of the result, in its shape.
    """
    s_BHST = reference.raw_scores(spec, q, k)
    readings = reference.read_captures(spec, captures, s_BHST)
    env = reference.environment(spec, s_BHST)
    x_BHST = reference.spread(evaluate(spec.score, env, readings), s_BHST)
    mask = None if spec.mask is None else reference.kept(spec.mask, env, readings, s_BHST)
    if mask is not None:
        x_BHST = torch.where(mask, x_BHST, -math.inf)
    p_BHST = reference.weights(spec, x_BHST)
    dp_BHST = _spread(kind, grad.to(p_BHST.dtype), p_BHST)
    dx_BHST = p_BHST * (dp_BHST - (p_BHST * dp_BHST).sum(-1, keepdim=True))
    if mask is not None:
        dx_BHST = torch.where(mask, dx_BHST, 0.0)

    def chained(leaf: Expr) -> Tensor:
        slope: Tensor | float = evaluate(gradient(spec.score, leaf), env, readings)
        return dx_BHST * slope

    ds = reference.fold_heads(chained(S).to(q.dtype), k, spec.kv_map)
    dq = reference.unfold_heads(ds @ k, q, spec.kv_map)
    dk = ds.transpose(-2, -1) @ reference.fold_heads(q, k, spec.kv_map)
    dcaptures = [
        _unread(chained(capture(n)), tensor, how) if want else None
        for n, (tensor, how, want) in enumerate(zip(captures, spec.captures, wanted, strict=True))
    ]
    return dq, dk, dcaptures


def _spread(kind: str, grad: Tensor, p_BHST: Tensor) -> Tensor:
    """The gradient of the weights from that of the result: the transpose of the reduction."""
    if kind == "column_sum":
        return grad.unsqueeze(2)
    if kind == "weights":
        return grad
    rows = torch.arange(p_BHST.shape[2], device=grad.device)[:, None]
    columns = torch.arange(p_BHST.shape[3], device=grad.device)
    padded = torch.nn.functional.pad(grad, (0, p_BHST.shape[3] - grad.shape[2]))
    return torch.where(rows == columns, padded.unsqueeze(2), 0.0)


def _unread(grad_BHST: Tensor, tensor: Tensor, how: Capture) -> Tensor:
    """The transpose of reading a capture: sum over the axes it was broadcast along."""
    axes = [axis for axis, letter in enumerate(how.dims) if letter == "-"]
    grad = grad_BHST.sum(axes, keepdim=True) if axes else grad_BHST
    if how.dims[0] == "p":
        batch = torch.arange(grad.shape[0], device=grad.device)
        grad = grad.new_zeros(tensor.shape).index_add(0, batch % tensor.shape[0], grad)
    return grad.to(tensor.dtype)
