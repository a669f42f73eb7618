"""The meaning of the canonical norms, in plain PyTorch.

A norm reads ``x [..., N1, …, Nk]`` and normalises over its ``axes = k`` trailing axes. All of it happens in ``dtype``.
With ``scale_after_cast`` the normalised value is rounded to the dtype of ``x`` before weight and bias are applied, in
the dtype that they promote to, as Llama does. Without it weight and bias are applied in ``dtype`` and the result is
rounded to the dtype of ``x``, as Gemma does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxopt.ir.operators import define_meaning


def layer_norm(
    x: Tensor,
    axes: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    scale_after_cast: bool,
) -> Tensor:
    """``(x - mean(x)) / sqrt(var(x) + eps) * weight + bias``, the variance without Bessel's correction.

    Args:
        x: ``[..., N1, …, Nk]``.
        axes: ``k``, how many trailing axes are normalised together.
        weight: ``[N1, …, Nk]`` or ``None`` for 1.
        bias: ``[N1, …, Nk]`` or ``None`` for 0.
        eps: added to the variance, inside the root.
        dtype: what mean, variance and quotient are computed in.
        scale_after_cast: see the module.

    Returns:
        The shape and dtype of ``x``; with ``scale_after_cast`` the dtype that it and the weight promote to.
    """
    dims = tuple(range(-axes, 0))
    wide = x.to(dtype)
    centred = wide - wide.mean(dims, keepdim=True)
    normal = centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)
    return scaled(normal, weight, bias, x.dtype, scale_after_cast)


def rms_norm(
    x: Tensor, axes: int, weight: Tensor | None, eps: float, dtype: torch.dtype, scale_after_cast: bool
) -> Tensor:
    """``x / sqrt(mean(x²) + eps) * weight``.

    Args:
        x: ``[..., N1, …, Nk]``.
        axes: ``k``, how many trailing axes are normalised together.
        weight: ``[N1, …, Nk]`` or ``None`` for 1; Gemma's ``1 + w`` comes ready-made.
        eps: added to the mean of squares, inside the root.
        dtype: what the mean and the quotient are computed in.
        scale_after_cast: see the module.

    Returns:
        The shape and dtype of ``x``; with ``scale_after_cast`` the dtype that it and the weight promote to.
    """
    dims = tuple(range(-axes, 0))
    wide = x.to(dtype)
    normal = wide * torch.rsqrt(wide.square().mean(dims, keepdim=True) + eps)
    return scaled(normal, weight, None, x.dtype, scale_after_cast)


def scaled(
    normal: Tensor, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype, scale_after_cast: bool
) -> Tensor:
    """A normalised value times weight plus bias, rounded to ``dtype`` before or after that."""
    result = normal.to(dtype) if scale_after_cast else normal
    result = result if weight is None else result * weight
    result = result if bias is None else result + bias
    return result if scale_after_cast else result.to(dtype)


define_meaning("layer_norm", layer_norm)
define_meaning("rms_norm", rms_norm)
