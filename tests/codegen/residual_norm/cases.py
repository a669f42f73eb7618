"""Residual norms that the kernels are tested on: operands, the meaning, and gradients of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxopt.codegen.norm.residual_norm.problem import Problem
from fxopt.codegen.norm.residual_norm.reference import residual_layer_norm, residual_rms_norm

B16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    """A norm and the dtypes of its operands."""

    kind: str
    x: torch.dtype
    residual: torch.dtype
    weight: torch.dtype | None
    bias: torch.dtype | None = None
    scale_after_cast: bool = False
    eps: float = 1e-3

    def operands(self, *sizes: int, device: str = "cpu", seed: int = 0) -> list[Tensor | None]:
        """``x``, ``residual``, weight and bias for rows ``[..., C]``."""
        generator = torch.Generator().manual_seed(seed)

        def draw(dtype: torch.dtype | None, *shape: int) -> Tensor | None:
            values = torch.randn(shape, generator=generator)
            return None if dtype is None else (values + 0.25).to(device, dtype)

        rows = [draw(dtype, *sizes) for dtype in (self.x, self.residual)]
        return [*rows, *(draw(dtype, sizes[-1]) for dtype in (self.weight, self.bias))]

    def problem(self, width: int) -> Problem:
        """The problem of rows of ``width`` elements."""
        weights = (self.weight, self.bias)
        return Problem(self.kind, width, self.x, self.residual, *weights, self.eps, self.scale_after_cast)

    def meaning(self, operands: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
        """Norm and sum, in plain PyTorch in the dtypes of ``operands``."""
        x, residual, weight, bias = operands
        assert x is not None and residual is not None
        dtype = torch.promote_types(torch.promote_types(x.dtype, residual.dtype), torch.float32)
        if self.kind == "rms_norm":
            return residual_rms_norm(x, residual, weight, self.eps, dtype, self.scale_after_cast)
        return residual_layer_norm(x, residual, weight, bias, self.eps, dtype, self.scale_after_cast)


#: What differs in the text of the kernels: the kind, weights that are not there, and where is rounded.
CASES = {
    "layer bf16": Case("layer_norm", B16, B16, B16, B16),
    "layer f16": Case("layer_norm", F16, F16, F16, F16),
    "layer f32": Case("layer_norm", F32, F32, F32, F32),
    "layer plain": Case("layer_norm", B16, B16, None),
    "layer scaled": Case("layer_norm", B16, B16, B16),
    "layer wide stream": Case("layer_norm", B16, F32, F32, F32),
    "layer after": Case("layer_norm", B16, B16, B16, F32, scale_after_cast=True),
    "rms bf16": Case("rms_norm", B16, B16, B16),
    "rms llama": Case("rms_norm", B16, B16, B16, scale_after_cast=True),
    "rms llama f32 weight": Case("rms_norm", B16, B16, F32, scale_after_cast=True),
    "rms f32": Case("rms_norm", F32, F32, F32),
    "rms plain": Case("rms_norm", F16, F16, None),
}


def wide(operands: Sequence[Tensor | None]) -> list[Tensor | None]:
    """``operands`` in float64."""
    return [None if x is None else x.double() for x in operands]


def gradients(case: Case, operands: Sequence[Tensor | None], cotangents: Sequence[Tensor | None]) -> list[Tensor]:
    """Gradients of the operands that there are, by autograd of the meaning; a cotangent may be ``None``."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in operands]
    pairs = [(out, c) for out, c in zip(case.meaning(leaves), cotangents, strict=True) if c is not None]
    found = torch.autograd.grad([out for out, _ in pairs], [x for x in leaves if x is not None], [c for _, c in pairs])
    return list(found)
