"""The split attention kernel: few queries against many keys, which all multiprocessors share evenly."""

from __future__ import annotations

from typing import Final

import torch

from fxopt.codegen.attention import cost
from fxopt.codegen.attention.portable import kernel as portable
from fxopt.codegen.attention.portable.config import padded
from fxopt.codegen.attention.problem import Problem
from fxopt.codegen.attention.split.config import LARGEST_TILE, fitting, largest_tile, read_config
from fxopt.codegen.attention.split.source import text_of
from fxopt.errors import LoweringError
from fxopt.ir.attention import AttentionSpec

__all__ = ["KIND", "candidates", "objection", "read_config", "seconds", "source"]

#: The kind under which the sources are kept in the cache.
KIND: Final = portable.KIND
#: With fewer keys the whole of them is read in the time that a launch takes, and partial results only add to it.
_FEWEST_KEYS: Final = 1024
#: Cycles of merging the parts of a head, and those that a single warp waits in a step.
_MERGE, _LATENCY = 8000, 4000


def objection(problem: Problem) -> str | None:
    """Why the kernel can't serve a problem, or should not be tried, as a sentence; ``None`` when it can."""
    reason = portable.objection_to(problem)
    if reason is not None:
        return reason
    if problem.dtype is torch.float32:
        return "merging parts of the keys rounds float32 results more often than the model does"
    sizes = (problem.rows, problem.heads, problem.kv_heads)
    if any(size is None for size in sizes):
        return "the number of queries or heads is not known, and only few queries are worth splitting the keys"
    rows = _rows(problem)
    if rows > LARGEST_TILE:
        return f"{rows} rows of queries share a key/value head; splitting the keys is for {LARGEST_TILE} at most"
    # Unknown lengths are what a cache of keys has.
    if problem.keys is not None and problem.keys < _FEWEST_KEYS:
        return f"{problem.keys} keys are too few to split; it is for {_FEWEST_KEYS} and more"
    if not _configs(problem):
        return "no block of keys fits the shared memory of the device"
    return None


def candidates(problem: Problem) -> tuple[str, ...]:
    """The printed configurations to measure for a problem without objections, best guess first, at most two."""
    return tuple(map(str, _configs(problem)))


def seconds(problem: Problem, config: str) -> float:
    """How long a configuration should take on a problem (`fxopt.codegen.attention.cost`)."""
    cut = read_config(config)
    schedule = cost.Schedule(
        min(padded(_rows(problem)), largest_tile(problem.head_dim, problem.value_dim)),
        cut.block_n,
        cut.programs,
        padded(problem.head_dim) + padded(problem.value_dim),
        start=_MERGE,
        latency=_LATENCY / cut.num_warps,
        served=(problem.heads or 1) // (problem.kv_heads or 1),
        even=True,
    )
    return cost.seconds(problem, schedule)


def source(spec: AttentionSpec, head_dim: int, value_dim: int, dtype: torch.dtype, config: str) -> str:
    """The source of the forward kernel: a module that defines ``launch(q, k, v, captures, with_lse)`` and runs alone.

    It is right for any number of queries and keys. The same arguments always give the same text.

    Raises:
        LoweringError: no kernel can be generated, or ``config`` is none of this family.
    """
    reason = portable.objection(spec, head_dim, value_dim, dtype)
    if reason is not None:
        raise LoweringError(f"no Triton kernel for this attention: {reason}; lower it to ATen instead ({spec})")
    return text_of(spec, head_dim, value_dim, dtype, read_config(config))


def _configs(problem: Problem) -> tuple[object, ...]:
    return fitting(problem.head_dim, problem.value_dim, problem.dtype, problem.capability, _rows(problem))


def _rows(problem: Problem) -> int:
    """Rows (query, head) that share a key/value head."""
    return (problem.rows or 1) * ((problem.heads or 1) // (problem.kv_heads or 1))
