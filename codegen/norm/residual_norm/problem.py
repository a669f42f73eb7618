"""What the generated kernels of a residual norm depend on besides their configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from fxopt.codegen.norm.residual_norm.reference import norm_dtype

KINDS: Final = ("layer_norm", "rms_norm")
_SERVED: Final = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Problem:
    """One kind of norm over rows of ``width`` elements.

    Attributes:
        kind: ``"layer_norm"`` or ``"rms_norm"``.
        width: ``C``.
        x: the dtype of ``x``.
        residual: the dtype of ``residual``.
        weight: that of the weight, ``None`` where there is none.
        bias: that of the bias, ``None`` where there is none.
        eps: added to the variance or the mean of squares.
        scale_after_cast: whether weight and bias come after rounding to the dtype of the sum.
    """

    kind: str
    width: int
    x: torch.dtype
    residual: torch.dtype
    weight: torch.dtype | None
    bias: torch.dtype | None
    eps: float
    scale_after_cast: bool

    @property
    def total(self) -> torch.dtype:
        """The dtype of the sum."""
        return torch.promote_types(self.x, self.residual)

    @property
    def out(self) -> torch.dtype:
        """The dtype of the norm."""
        found = [dtype for dtype in (self.weight, self.bias) if dtype is not None]
        return norm_dtype(self.total, found, self.scale_after_cast)

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Those of all operands."""
        return tuple(dtype for dtype in (self.x, self.residual, self.weight, self.bias) if dtype is not None)


def problem_of(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kind: str,
    eps: float,
    scale_after_cast: bool,
) -> Problem:
    """The problem of these operands."""
    weights = (None if weight is None else weight.dtype, None if bias is None else bias.dtype)
    return Problem(kind, x.shape[-1], x.dtype, residual.dtype, *weights, eps, scale_after_cast)


def objection(problem: Problem) -> str | None:
    """Why no kernel can be generated, as a sentence, or ``None`` when one can."""
    width: object = problem.width
    if problem.kind not in KINDS:
        return f"{problem.kind!r} is none of {', '.join(KINDS)}"
    if not isinstance(width, int):
        return "the size of the last axis is dynamic"
    if not 0 < width < 2**20:
        return f"rows of {width} elements are too long" if width else "the last axis is empty"
    unknown = [dtype for dtype in problem.dtypes if dtype not in _SERVED]
    if unknown:
        return f"{unknown[0]} operands; it computes in float32 and takes bfloat16, float16 and float32"
    if problem.bias is not None and problem.kind == "rms_norm":
        return "an RMSNorm has no bias"
    return None
