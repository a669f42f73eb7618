"""The kernel for few keys: all keys of a head at once, one softmax. Whether it serves, what to try, its source."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import torch

from fxopt.codegen.attention.cost import device_of
from fxopt.codegen.attention.portable import kernel as portable
from fxopt.codegen.attention.problem import Problem
from fxopt.codegen.attention.short.config import LONGEST, read_config
from fxopt.codegen.attention.short.order import cycles, ordered
from fxopt.codegen.attention.short.source import KernelText
from fxopt.codegen.attention.weights.wants import Want
from fxopt.errors import LoweringError
from fxopt.ir.attention import AttentionSpec

__all__ = ["candidates", "candidates_with_weights", "objection", "seconds", "source"]

_LARGEST_HEAD: Final = 128
#: The most keys of kernels that write weights as well.
_MOST_WITH_WEIGHTS: Final = 208


def objection(problem: Problem) -> str | None:
    """Why it can't serve ``problem``, as a sentence, or ``None`` when it can."""
    reason = _objection(problem.spec, problem.head_dim, problem.value_dim, problem.dtype)
    if reason is not None:
        return reason
    if problem.keys is None:
        return "the number of keys is not known"
    if problem.dynamic_keys:
        return "the number of keys may change"
    if problem.keys > LONGEST:
        return f"it holds {LONGEST} keys at most, and here are {problem.keys}"
    if not ordered(problem):
        return f"the registers of a program don't hold the logits of {problem.keys} keys ({problem.dtype})"
    return None


def candidates(problem: Problem) -> tuple[str, ...]:
    """The printed configurations to measure, best guess first, at most two; none where there is an objection."""
    return () if objection(problem) is not None else tuple(map(str, ordered(problem)))


def candidates_with_weights(problem: Problem) -> tuple[str, ...]:
    """The same for kernels that write weights as well, which need registers for that: without a cap on them, and up to
    as many keys as leave them enough.
    """
    if objection(problem) is not None or (problem.keys or 0) > _MOST_WITH_WEIGHTS:
        return ()
    return tuple(str(replace(config, registers=0)) for config in ordered(problem))


def seconds(problem: Problem, config: str) -> float:
    """How long a configuration should take on a problem."""
    return cycles(read_config(config), problem) / device_of(problem.capability).clock


def _objection(spec: AttentionSpec, head_dim: int, value_dim: int, dtype: torch.dtype) -> str | None:
    reason = portable.objection(spec, head_dim, value_dim, dtype)
    if reason is None and max(head_dim, value_dim) > _LARGEST_HEAD:
        return f"with all keys at once head dimensions are at most {_LARGEST_HEAD}, not {head_dim} and {value_dim}"
    if reason is None and any(c.is_band for c in spec.captures):
        return "a captured tensor varies with the distance of key and row, which it does not read"
    return reason


def source(
    spec: AttentionSpec,
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    config: str,
    *,
    wants: tuple[Want, ...] = (),
) -> str:
    """The source of the forward kernel: a module that defines ``launch(q, k, v, captures, with_lse)`` and runs alone.

    It returns the output, the log-sum-exp, and what is in ``wants`` of the weights. The same arguments always give the
    same text.

    Raises:
        LoweringError: no kernel can be generated.
    """
    reason = _objection(spec, head_dim, value_dim, dtype)
    if reason is not None:
        raise LoweringError(f"no kernel for few keys: {reason}; use another family of kernels ({spec})")
    return str(KernelText(spec, head_dim, value_dim, dtype, read_config(config), wants))
