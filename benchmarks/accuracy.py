"""Errors against a reference in float64, computed sample by sample so that it fits beside the model."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.model_cases import Inputs
from benchmarks.model_peers import main_output


@dataclass(frozen=True)
class Reference:
    """The output in higher precision, on the CPU, and the dtype it was computed in."""

    output: torch.Tensor
    dtype: str


@dataclass(frozen=True)
class Error:
    """Largest absolute difference, and ‖out - ref‖ / ‖ref‖; both infinite where the output is not finite."""

    maximal: float
    relative: float


def reference(model: Any, inputs: Inputs) -> Reference:
    """``model`` on ``inputs`` in float64, in float32 without TF32 where float64 does not fit in memory.

    Parts that the model itself computes in float32 (softmax, norms and rotary angles of many models) stay so.
    """
    try:
        return Reference(_upcast(model, inputs, torch.float64), "float64")
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
    with torch.backends.cudnn.flags(allow_tf32=False):
        return Reference(_upcast(model, inputs, torch.float32), "float32")


def compare(output: torch.Tensor, expected: Reference) -> Error:
    """Error of ``output`` against the reference; a wrong shape is an error like a wrong value."""
    if output.shape != expected.output.shape:
        raise ValueError(f"output has shape {tuple(output.shape)}, expected {tuple(expected.output.shape)}")
    difference = output.detach().to("cpu", torch.float64) - expected.output
    if not bool(difference.isfinite().all()):
        return Error(math.inf, math.inf)
    norm = expected.output.norm().clamp(min=1e-30)
    return Error(float(difference.abs().max()), float(difference.norm() / norm))


def largest_error(found: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> float:
    """The largest of max |found - exact| / max |exact| over pairs of tensors; infinite where one is not a number."""
    pairs = zip(found, exact, strict=True)
    errors = [float((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs]
    return math.inf if any(map(math.isnan, errors)) else max(errors)


def _upcast(model: Any, inputs: Inputs, dtype: torch.dtype) -> torch.Tensor:
    upcast = copy.deepcopy(model).to(dtype)
    batch = next(iter(inputs.values())).shape[0]
    rows = []
    for index in range(batch):
        row = {name: tensor[index : index + 1] for name, tensor in inputs.items()}
        row = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in row.items()}
        rows.append(main_output(upcast(**row)).to("cpu", torch.float64))
    return torch.cat(rows)
