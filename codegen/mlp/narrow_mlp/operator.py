"""``fxopt::mlp_forward``: a narrow feed-forward block by a generated Triton kernel, as a PyTorch operator.

On CUDA it runs the kernel, on the CPU its plain meaning. It has no gradients: they need the hidden elements, which the
kernel doesn't keep.
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from fxopt.cache import import_source
from fxopt.codegen.launching import as_rows, bare, key_of, launched, remembered
from fxopt.codegen.mlp import reference
from fxopt.codegen.mlp.narrow_mlp.kernel import KIND, source
from fxopt.codegen.mlp.narrow_mlp.problem import Problem, objection, operands_objection, problem_of
from fxopt.errors import LoweringError

#: Elements of a weight, from its first to its last, that 32 bits can count.
_FAR = 2**31


@torch.library.custom_op("fxopt::mlp_forward", mutates_args=(), device_types="cpu")
def mlp_forward(
    x: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    config: str,
) -> Tensor:
    """What ``fxopt::mlp`` means, by the kernel of one configuration.

    Args:
        x: ``[..., C]``, any strides.
        up: ``[H, C]``, any strides.
        up_bias: ``[H]`` or ``None``.
        down: ``[D, H]``, any strides.
        down_bias: ``[D]`` or ``None``.
        residual: ``[..., D]``, any strides, or ``None``.
        activation: as of ``fxopt::mlp``.
        config: the printed configuration.

    Returns:
        ``[..., D]``, contiguous, in the dtype of the operands. Sums are in float32; hidden elements are rounded once,
        after the activation, and the result once, after the residual was added.

    Raises:
        LoweringError: the kernel can't serve the operands.
    """
    _checked(x, up, up_bias, down, down_bias, residual, activation)
    out = reference.mlp(x, up, up_bias, down, down_bias, residual, activation)
    return torch.empty_like(out, memory_format=torch.contiguous_format).copy_(out)


@mlp_forward.register_kernel("cuda")
def _cuda(
    x: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    config: str,
) -> Tensor:
    operands = (x, up, up_bias, down, down_bias, residual)
    key = key_of((activation, config), operands)
    known = remembered(key, operands)
    if known is not None:
        return known[0]
    kernel = module(_checked(*operands, activation), config)

    def laid(operand: Tensor) -> Tensor:
        weight = (operand is up or operand is down) and operand is not x and operand is not residual
        return _near(operand) if weight else as_rows(operand)

    return launched(key, kernel, operands, laid=laid)[0]


@mlp_forward.register_fake
def _fake(
    x: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    config: str,
) -> Tensor:
    _checked(x, up, up_bias, down, down_bias, residual, activation)
    return x.new_empty((*x.shape[:-1], down.shape[0]))


def _near(weight: Tensor) -> Tensor:
    """``weight``, copied where its elements lie too far apart."""
    distance = sum((size - 1) * stride for size, stride in zip(weight.shape, weight.stride(), strict=True))
    return weight if distance < _FAR else weight.contiguous()


def _checked(
    x: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> Problem:
    problem = problem_of(x, up, up_bias, down, down_bias, residual, activation)
    reason = operands_objection(x, up, up_bias, down, down_bias, residual)
    # Elsewhere than on CUDA no kernel is generated, and float64 serves as an oracle.
    reason = objection(problem) if reason is None and x.is_cuda else reason
    if reason is not None:
        raise LoweringError(f"no Triton kernel for this feed-forward block: {reason}; lower it to ATen instead")
    return problem


@lru_cache(maxsize=1024)
def module(problem: Problem, config: str) -> ModuleType:
    """The generated module, from the source cache."""
    return import_source(KIND, source(problem, config))


bare("mlp_forward", _cuda, _fake, mlp_forward)
