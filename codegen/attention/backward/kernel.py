"""The generated backward of an attention: where it can serve, which configurations to try, and its source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import torch

from fxopt.codegen.attention.backward import plan
from fxopt.codegen.attention.backward.config import BackwardConfig, fitting, read_backward
from fxopt.codegen.attention.backward.source import BackwardText
from fxopt.codegen.attention.cost import lengths
from fxopt.codegen.attention.portable.kernel import objection as forward_objection
from fxopt.codegen.attention.portable.key_lists import can_list, left_out
from fxopt.codegen.attention.problem import Problem
from fxopt.errors import LoweringError
from fxopt.ir.attention import AttentionSpec

__all__ = ["KIND", "candidates", "listed", "objection", "read_backward", "source"]

#: The kind under which generated sources are kept in the cache.
KIND: Final = "attention_backward"


def objection(
    spec: AttentionSpec, head_dim: int, value_dim: int, dtype: torch.dtype, averages: bool = False
) -> str | None:
    """Why no kernels can be generated, as a sentence, or ``None`` when they can.

    ``averages`` tells that the kernels in question share the gradients of rows without keys, which give the mean of the
    values, among these: the portable ones do.
    """
    reason = forward_objection(spec, head_dim, value_dim, dtype)
    if reason is not None:
        return reason
    if plan.averages(spec) and not averages:
        return "rows without keys give the mean of the values, whose gradient it does not compute"
    if spec.out_dtype.itemsize < dtype.itemsize:
        return f"the result is {spec.out_dtype}, too coarse to be summed in place of the weights of {dtype} inputs"
    return None


def candidates(problem: Problem) -> tuple[BackwardConfig, ...]:
    """The configurations worth measuring, best guess first, at most two; none where no kernels can be generated.

    The first one goes through lists of blocks where these leave out many of those that there are.
    """
    spec, head_dim, value_dim, dtype = problem.spec, problem.head_dim, problem.value_dim, problem.dtype
    if objection(spec, head_dim, value_dim, dtype, averages=True) is not None:
        return ()
    heavy = plan.slope(spec)[0] is not None or any(c.is_tile for c in spec.captures)
    bands = any(c.is_band for c in spec.captures)
    found = fitting(head_dim, value_dim, dtype, problem.capability, heavy, drops=spec.dropout > 0, bands=bands)
    lists = left_out(spec, *lengths(problem))
    return (listed(found[0]), found[0]) if found and lists == "many" and not bands else found


def listed(config: BackwardConfig) -> BackwardConfig:
    """``config`` with lists."""
    return BackwardConfig(replace(config.keys, listed=True), replace(config.rows, listed=True))


def source(
    spec: AttentionSpec,
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    config: BackwardConfig,
    wanted: Sequence[bool],
) -> str:
    """The source of the backward: a module that runs alone and defines

        launch(q, k, v, captures, out, lse, dout, dlse) -> [dq, dk, dv, gradient of each captured tensor in ``wanted``]

    The same arguments always give the same text.

    Raises:
        LoweringError: no kernels can be generated; `objection` says why.
    """
    reason = objection(spec, head_dim, value_dim, dtype, averages=True)
    if reason is not None:
        raise LoweringError(f"no Triton kernels for the backward of this attention: {reason} ({spec})")
    if config.listed and (not can_list(spec) or any(c.is_band for c in spec.captures)):
        lacking = "bands have none" if can_list(spec) else "there is none"
        raise LoweringError(f"{config} goes through lists of the blocks that a mask keeps, and {lacking} ({spec})")
    return str(BackwardText(spec, head_dim, value_dim, dtype, config, tuple(wanted)))
