"""Attentions as kernels are asked for them, on the device there is."""

from __future__ import annotations

import torch
from torch import Tensor

from fxopt.codegen.attention.problem import Problem
from fxopt.ir.attention import AttentionSpec


def problem(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> Problem:
    """On these operands, with all of their sizes."""
    sizes = (*q.shape[:2], k.shape[1], q.shape[2], k.shape[2])
    return Problem(spec, q.shape[3], v.shape[3], q.dtype, torch.cuda.get_device_capability(), *sizes)


def of_any_size(spec: AttentionSpec, head_dim: int, value_dim: int, dtype: torch.dtype) -> Problem:
    """Of heads of these widths; no other size is known."""
    return Problem(spec, head_dim, value_dim, dtype, torch.cuda.get_device_capability())
