"""The maths of forward and backward in plain PyTorch, with the statistics of the rows as results and operands."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxopt.codegen.norm import reference


def forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kind: str,
    eps: float,
    scale_after_cast: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Norm and sum ``[..., C]``, mean (``None`` for an RMSNorm) and inverse deviation ``[...]`` of the rows.

    The arguments are those of ``fxopt::residual_norm_forward``.
    """
    total = x + residual
    wide = total.to(torch.promote_types(total.dtype, torch.float32))
    mean = wide.mean(-1) if kind == "layer_norm" else None
    centred = wide if mean is None else wide - mean[..., None]
    scale = torch.rsqrt(centred.square().mean(-1) + eps)
    normal = reference.scaled(centred * scale[..., None], weight, bias, total.dtype, scale_after_cast)
    return normal, total, mean, scale


def backward(
    dnormal: Tensor,
    dsum: Tensor | None,
    total: Tensor,
    mean: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    wanted: Sequence[bool],
    kind: str,
    scale_after_cast: bool,
) -> list[Tensor]:
    """The gradient of the sum, and those of weight and bias that are wanted.

    The arguments are those of ``fxopt::residual_norm_backward``.
    """
    wide = torch.promote_types(total.dtype, torch.float32)
    s, d = total.to(wide), dnormal.to(wide)
    n = (s if kind == "rms_norm" else s - mean[..., None]) * scale[..., None]
    g = d if weight is None else d * weight
    dx = g - n * (g * n).mean(-1, keepdim=True)
    dx = (dx if kind == "rms_norm" else dx - g.mean(-1, keepdim=True)) * scale[..., None]
    dx = dx if dsum is None else dx + dsum
    multiplied = n.to(total.dtype) if scale_after_cast else n
    columns = tuple(range(total.dim() - 1))
    terms = ((weight, d * multiplied), (bias, d))
    kept = [(w, term) for want, (w, term) in zip(wanted, terms, strict=True) if want and w is not None]
    sums = [(term.sum(columns) if columns else term.clone()).to(w.dtype) for w, term in kept]
    return [dx.to(total.dtype), *sums]
