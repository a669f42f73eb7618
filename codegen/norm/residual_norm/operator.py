"""``fxopt::residual_norm_forward``: a residual sum and its norm by a generated Triton kernel, as a PyTorch operator.

On CUDA it runs the kernel, on the CPU the same maths in plain PyTorch; it has fake and autograd implementations, so it
stands in graphs like any other operator.
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fxopt.cache import import_source
from fxopt.codegen.launching import bare, key_of, launched, remembered
from fxopt.codegen.norm import reference
from fxopt.codegen.norm.residual_norm import plain
from fxopt.codegen.norm.residual_norm.backward_operator import residual_norm_backward
from fxopt.codegen.norm.residual_norm.config import split_config
from fxopt.codegen.norm.residual_norm.kernel import KIND, source
from fxopt.codegen.norm.residual_norm.problem import Problem, objection, problem_of
from fxopt.errors import LoweringError


@torch.library.custom_op("fxopt::residual_norm_forward", mutates_args=(), device_types="cpu")
def residual_norm_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kind: str,
    eps: float,
    scale_after_cast: bool,
    config: str,
    with_sum: bool,
    with_statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What ``fxopt::residual_layer_norm`` and ``fxopt::residual_rms_norm`` mean, by the kernel of one configuration.

    Args:
        x: ``[..., C]``, any strides.
        residual: ``[..., C]``, any strides.
        weight: ``[C]`` or ``None`` for 1.
        bias: ``[C]`` or ``None`` for 0; a LayerNorm's only.
        kind: ``"layer_norm"`` or ``"rms_norm"``.
        eps: added to the variance or the mean of squares.
        scale_after_cast: as of the canonical norms.
        config: the printed configuration, followed by ``/`` and that of the backward, if there is to be one.
        with_sum: whether the sum is wanted.
        with_statistics: whether mean and inverse deviation of the rows are; the backward needs them and the sum.

    Returns:
        The norm and the sum, ``[..., C]`` and contiguous; mean and inverse deviation, ``[...]`` in float32. What is not
        wanted is empty, and so is the mean of an RMSNorm.

    Raises:
        LoweringError: the kernel can't serve the operands.
    """
    problem = _checked(x, residual, weight, bias, kind, eps, scale_after_cast)
    empty = _empty(problem, x, with_sum, with_statistics)
    values = plain.forward(x, residual, weight, bias, kind, eps, scale_after_cast)
    for result, value in zip(empty, values, strict=True):
        if value is not None and result.numel():
            result.copy_(value)
    return empty


@residual_norm_forward.register_kernel("cuda")
def _cuda(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kind: str,
    eps: float,
    scale_after_cast: bool,
    config: str,
    with_sum: bool,
    with_statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    operands = (x, residual, weight, bias)
    key = key_of((kind, eps, scale_after_cast, config, with_sum, with_statistics), operands)
    known = remembered(key, operands)
    if known is not None:
        return known[0], known[1], known[2], known[3]
    problem = _checked(x, residual, weight, bias, kind, eps, scale_after_cast)
    kernel = module(problem, split_config(config)[0])
    normal, total, mean, scale = launched(key, kernel, operands, with_sum, with_statistics)
    return normal, total, mean, scale


@residual_norm_forward.register_fake
def _fake(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kind: str,
    eps: float,
    scale_after_cast: bool,
    config: str,
    with_sum: bool,
    with_statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    problem = _checked(x, residual, weight, bias, kind, eps, scale_after_cast)
    return _empty(problem, x, with_sum, with_statistics)


def _empty(problem: Problem, x: Tensor, with_sum: bool, with_statistics: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    statistics = torch.promote_types(problem.total, torch.float32)
    rows = x.shape[:-1] if with_statistics else (0,)
    return (
        x.new_empty(x.shape, dtype=problem.out),
        x.new_empty(x.shape if with_sum else (0,), dtype=problem.total),
        x.new_empty(rows if problem.kind == "layer_norm" else (0,), dtype=statistics),
        x.new_empty(rows, dtype=statistics),
    )


def _checked(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kind: str,
    eps: float,
    scale_after_cast: bool,
) -> Problem:
    problem = problem_of(x, residual, weight, bias, kind, eps, scale_after_cast)
    if x.shape != residual.shape:
        raise LoweringError(f"x {tuple(x.shape)} and residual {tuple(residual.shape)} differ; lower it to ATen instead")
    reason = objection(problem)
    # Elsewhere than on CUDA no kernel is generated, and float64 serves as an oracle.
    if reason is not None and x.is_cuda:
        raise LoweringError(f"no Triton kernel for this residual norm: {reason}; lower it to ATen instead")
    return problem


@lru_cache(maxsize=1024)
def module(problem: Problem, config: str) -> ModuleType:
    """The generated module of the forward, from the source cache."""
    return import_source(KIND, source(problem, config))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, kind, eps, scale_after_cast, config, with_sum, with_statistics = inputs
    if not (with_sum and with_statistics):
        raise LoweringError("the backward of a residual norm needs its sum and its statistics; ask for both")
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:], weight, bias)
    ctx.dtypes, ctx.norm = (x.dtype, residual.dtype), (kind, eps, scale_after_cast)
    ctx.config = split_config(config)[1]


def _backward(ctx: Any, dnormal: Tensor | None, dsum: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    total, mean, scale, weight, bias = ctx.saved_tensors
    dnormal = torch.zeros_like(total) if dnormal is None else dnormal
    wanted = [bool(need) for need in ctx.needs_input_grad[2:4]]
    if torch.is_grad_enabled():
        # Gradients that are differentiated again need operations that can be.
        dx, both = _differentiable(total, weight, bias, ctx.norm, dnormal)
        present = [want for want, given in zip(wanted, (weight, bias), strict=True) if given is not None]
        found = [gradient for gradient, want in zip(both, present, strict=True) if want]
        dx = dx if dsum is None else dx + dsum
    else:
        statistics = (total, mean, scale, weight, bias)
        dx, *found = residual_norm_backward(dnormal, dsum, *statistics, wanted, *ctx.norm, ctx.config)
    rest = iter(found)
    weights = (next(rest) if want else None for want in wanted)
    return (*(dx.to(dtype) for dtype in ctx.dtypes), *weights, *(None,) * 6)


def _differentiable(
    total: Tensor, weight: Tensor | None, bias: Tensor | None, norm: tuple[str, float, bool], dnormal: Tensor
) -> tuple[Tensor, list[Tensor]]:
    kind, eps, scale_after_cast = norm
    wide = torch.promote_types(total.dtype, torch.float32)
    weights = [w for w in (weight, bias) if w is not None]

    def normal(s: Tensor, *given: Tensor) -> Tensor:
        rest = iter(given)
        w, b = (None if x is None else next(rest) for x in (weight, bias))
        if kind == "rms_norm":
            return reference.rms_norm(s, 1, w, eps, wide, scale_after_cast)
        return reference.layer_norm(s, 1, w, b, eps, wide, scale_after_cast)

    dx, *found = torch.func.vjp(normal, total, *weights)[1](dnormal)
    return dx, found


residual_norm_forward.register_autograd(_backward, setup_context=_setup_context)
bare("residual_norm_forward", _cuda, _fake, residual_norm_forward)
