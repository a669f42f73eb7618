"""The meaning of a sum followed by its norm, in plain PyTorch.

``x + residual [..., C]`` is rounded to the dtype that both promote to, as eager does, and that rounded sum is
normalised over its last axis as the canonical norms define it. Both are results: the residual stream goes on with the
sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import reduce
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F

from fxopt.codegen.norm import reference
from fxopt.ir.operators import define_meaning


def residual_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    scale_after_cast: bool,
) -> tuple[Tensor, Tensor]:
    """``s = x + residual``; ``(s - mean(s)) / sqrt(var(s) + eps) * weight + bias``, and ``s``.

    Args:
        x: ``[..., C]``.
        residual: ``[..., C]``.
        weight: ``[C]`` or ``None`` for 1.
        bias: ``[C]`` or ``None`` for 0.
        eps: added to the variance, inside the root.
        dtype: what mean, variance and quotient are computed in.
        scale_after_cast: as of ``fxopt::layer_norm``.

    Returns:
        The norm, of the dtype that ``fxopt::layer_norm`` gives it, and the sum.
    """
    total = x + residual
    if _is_usual(total, weight, bias, dtype, scale_after_cast):
        return F.layer_norm(total, total.shape[-1:], weight, bias, eps), total
    return reference.layer_norm(total, 1, weight, bias, eps, dtype, scale_after_cast), total


def residual_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype, scale_after_cast: bool
) -> tuple[Tensor, Tensor]:
    """``s = x + residual``; ``s / sqrt(mean(s²) + eps) * weight``, and ``s``.

    Args:
        x: ``[..., C]``.
        residual: ``[..., C]``.
        weight: ``[C]`` or ``None`` for 1; Gemma's ``1 + w`` comes ready-made.
        eps: added to the mean of squares, inside the root.
        dtype: what the mean and the quotient are computed in.
        scale_after_cast: as of ``fxopt::rms_norm``.

    Returns:
        The norm, of the dtype that ``fxopt::rms_norm`` gives it, and the sum.
    """
    total = x + residual
    return reference.rms_norm(total, 1, weight, eps, dtype, scale_after_cast), total


def _is_usual(
    total: Tensor, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype, scale_after_cast: bool
) -> bool:
    """Whether PyTorch's own operator computes the norm."""
    alike = all(given is None or given.dtype == total.dtype for given in (weight, bias))
    return alike and dtype == torch.promote_types(total.dtype, torch.float32) and not scale_after_cast


def norm_dtype(total: torch.dtype, weights: Iterable[torch.dtype], scale_after_cast: bool) -> torch.dtype:
    """The dtype of the norm of a sum of dtype ``total``, scaled and shifted by ``weights``."""
    return reduce(torch.promote_types, weights, total) if scale_after_cast else total


def _layer_result(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    scale_after_cast: bool,
) -> tuple[Tensor, Tensor]:
    normal, total = _result(x, residual, weight, bias, eps, dtype, scale_after_cast)
    # PyTorch's own operator gives the rows one after the other, however those of the sum lie.
    return (normal.contiguous() if _is_usual(total, weight, bias, dtype, scale_after_cast) else normal), total


def _result(x: Tensor, residual: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    total = x + residual
    weights = [value.dtype for value in rest if isinstance(value, Tensor)]
    return torch.empty_like(total, dtype=norm_dtype(total.dtype, weights, bool(rest[-1]))), total


#: By kind of norm.
MEANINGS: Final[dict[str, Callable[..., tuple[Tensor, Tensor]]]] = {
    "layer_norm": residual_layer_norm,
    "rms_norm": residual_rms_norm,
}

define_meaning("residual_layer_norm", residual_layer_norm, _layer_result)
define_meaning("residual_rms_norm", residual_rms_norm, _result)
