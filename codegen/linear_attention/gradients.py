"""Gradients of linear attention in plain PyTorch, from all pairs of tokens.

    w = Q Kᵀ, d = Σ_j w + eps, out = w v / d + local
    n = g / d,  m = −Σ_e g out₀ / d,  dw = n vᵀ + m
    dQ = dw K,  dK = dwᵀ Q,  dv = wᵀ n + the transposed convolution of g

with ``out₀`` the result without ``local``, and ``w`` and ``dw`` without later keys where the attention is causal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxopt.codegen.linear_attention import reference
from fxopt.ir.linear_attention import LinearSpec

#: ``positions``, ``keep``, ``weight`` and ``bias``.
Optional = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def gradients(
    q: Tensor, k: Tensor, v: Tensor, optional: Optional, grad: Tensor, spec: LinearSpec
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of ``q``, ``k``, ``v``, ``positions``, ``weight`` and ``bias``; ``None`` for what is not given.

    They can be differentiated again where gradients are recorded.

    Args:
        q: ``[B, H, S, D]``.
        k: ``[B, H, T, D]``.
        v: ``[B, H, T, E]``.
        optional: the other operands of ``fxopt::linear_attention``.
        grad: ``[B, H, S, E]``, of the result.
        spec: the attention.
    """
    positions, keep, weight, bias = optional
    query, key = reference.rectified(q, k, positions, keep)
    value, g = v.to(query.dtype), grad.to(query.dtype)
    weights = query @ key.transpose(2, 3)
    weights = weights.tril() if spec.causal else weights
    denominators = weights.sum(-1, keepdim=True) + spec.eps
    numerators = g / denominators
    flow = -(numerators * (weights @ value)).sum(-1, keepdim=True) / denominators
    dweights = numerators @ value.transpose(2, 3) + flow
    dweights = dweights.tril() if spec.causal else dweights
    dq = (dweights @ key) * (query > 0)
    dk = (dweights.transpose(2, 3) @ query) * (key > 0)
    dv = weights.transpose(2, 3) @ numerators
    dweight = dbias = None
    if weight is not None:
        dlocal, dweight, dbias = _local(v, weight, bias, grad, spec)
        dv = dv + dlocal
    dpositions = None if positions is None else dk.sum(0).to(positions.dtype)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dpositions, dweight, dbias


def _local(
    v: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor, spec: LinearSpec
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What the convolution gives to the gradients of the values, and the gradients of its weight and bias."""
    margin, channels = weight.shape[-1] // 2, v.shape[3]
    g_VEYX, v_VEYX = (reference.as_grid(x, spec) for x in (grad.to(v.dtype), v))
    dgrid, dfilters, dbias = torch.ops.aten.convolution_backward(
        g_VEYX, v_VEYX, weight[:, None].to(v.dtype), [channels], [1, 1], [margin, margin], [1, 1], False, [0, 0],
        channels, [True, True, True],
    )  # fmt: skip
    return reference.from_grid(dgrid, v, spec), dfilters[:, 0].to(weight.dtype), None if bias is None else dbias
