"""``fxopt::residual_norm_backward``: the gradients of a residual sum and its norm by generated Triton kernels.

On the CPU it computes the same in plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from fxopt.cache import import_source
from fxopt.codegen.launching import bare, key_of, launched, remembered
from fxopt.codegen.norm.residual_norm import plain
from fxopt.codegen.norm.residual_norm.kernel import KIND, backward_source
from fxopt.codegen.norm.residual_norm.problem import Problem, problem_of


@torch.library.custom_op("fxopt::residual_norm_backward", mutates_args=(), device_types="cpu")
def residual_norm_backward(
    dnormal: Tensor,
    dsum: Tensor | None,
    total: Tensor,
    mean: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    wanted: Sequence[bool],
    kind: str,
    eps: float,
    scale_after_cast: bool,
    config: str,
) -> list[Tensor]:
    """The gradients of ``fxopt::residual_norm_forward``.

    Args:
        dnormal: ``[..., C]``, the gradient of the norm, any strides.
        dsum: ``[..., C]``, that of the sum, if it is read elsewhere, any strides.
        total: ``[..., C]``, the sum, contiguous.
        mean: ``[...]``, the rows' means; empty for an RMSNorm.
        scale: ``[...]``, their inverse deviations.
        weight: ``[C]`` or ``None``.
        bias: ``[C]`` or ``None``; only its dtype matters.
        wanted: whether weight and bias need gradients.
        kind: ``"layer_norm"`` or ``"rms_norm"``.
        eps: as of the forward; the inverse deviations hold it already.
        scale_after_cast: as of the forward.
        config: the printed configuration of the backward.

    Returns:
        The gradient of ``x`` and ``residual``, contiguous and in the dtype of the sum; then those that are wanted.
    """
    dx, *sums = plain.backward(dnormal, dsum, total, mean, scale, weight, bias, wanted, kind, scale_after_cast)
    return [dx.contiguous(), *sums]


@residual_norm_backward.register_kernel("cuda")
def _cuda(
    dnormal: Tensor,
    dsum: Tensor | None,
    total: Tensor,
    mean: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    wanted: Sequence[bool],
    kind: str,
    eps: float,
    scale_after_cast: bool,
    config: str,
) -> list[Tensor]:
    asked = [want and w is not None for want, w in zip(wanted, (weight, bias), strict=True)]
    operands = (dnormal, dsum, total, mean, scale, weight)
    key = key_of((kind, eps, scale_after_cast, config, *asked, None if bias is None else bias.dtype), operands)
    found = remembered(key, operands)
    if found is None:
        problem = problem_of(total, total, weight, bias, kind, eps, scale_after_cast)
        names = tuple(name for name, ask in zip(("weight", "bias"), asked, strict=True) if ask)
        found = launched(key, module(problem, config, names), operands)
    dx, *sums = found
    return [dx, *(x for x, ask in zip(sums, asked, strict=True) if ask)]


@residual_norm_backward.register_fake
def _fake(
    dnormal: Tensor,
    dsum: Tensor | None,
    total: Tensor,
    mean: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    wanted: Sequence[bool],
    kind: str,
    eps: float,
    scale_after_cast: bool,
    config: str,
) -> list[Tensor]:
    kept = [w for want, w in zip(wanted, (weight, bias), strict=True) if want and w is not None]
    return [total.new_empty(total.shape), *(w.new_empty(w.shape) for w in kept)]


@lru_cache(maxsize=1024)
def module(problem: Problem, config: str, wanted: tuple[str, ...]) -> ModuleType:
    """The generated module of the backward, from the source cache."""
    return import_source(KIND, backward_source(problem, config, wanted))


bare("residual_norm_backward", _cuda, _fake, residual_norm_backward)
