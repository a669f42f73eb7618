"""The portable Triton kernel of an attention: which configurations to try, and its source."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import torch

from fxopt.codegen.attention import cost
from fxopt.codegen.attention.portable import key_lists
from fxopt.codegen.attention.portable.config import (
    Captured,
    Config,
    fitting,
    padded,
    read_config,
    resident,
)
from fxopt.codegen.attention.portable.source import KernelText
from fxopt.codegen.attention.problem import Problem
from fxopt.errors import LoweringError
from fxopt.ir.attention import AttentionSpec

__all__ = [
    "KIND", "Config", "candidates", "candidates_for", "objection", "objection_to", "read_config", "seconds", "source",
]  # fmt: skip

#: The kind under which generated attention sources are kept in the cache.
KIND: Final = "attention_triton"
_LARGEST_HEAD: Final = 256
#: How much longer a step takes than its products and exponentials one after the other, by padded head dimension: from
#: `benchmarks/results/h100-attention.json`, plain attention of 8192 keys.
_PACE: Final = {16: 1.0, 32: 1.0, 64: 0.95, 128: 1.05, 256: 1.05}
#: And for each place behind the first in the tables, which stand in the order measured.
_PACE_BEHIND: Final = 0.15
#: Cycles of a program beside its steps, those for each element of its rows, and those that one warp waits in a step.
_START, _START_ELEMENT, _LATENCY = 1000, 0.25, 2000


def objection(spec: AttentionSpec, head_dim: int, value_dim: int, dtype: torch.dtype) -> str | None:
    """Why no kernel can be generated, as a sentence, or ``None`` when one can."""
    if spec.dropout == 1:
        return "dropout leaves nothing"
    if spec.dropout and spec.empty_rows == "uniform":
        return "dropout of weights that rows without keys share equally is not generated"
    if max(head_dim, value_dim) > _LARGEST_HEAD or min(head_dim, value_dim) < 1:
        return f"head dimensions must be 1 to {_LARGEST_HEAD}, not {head_dim} and {value_dim}"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"inputs must be bfloat16, float16 or float32, not {dtype}"
    wide = [n for n, c in enumerate(spec.captures) if c.dtype is torch.float64]
    if wide or spec.out_dtype is torch.float64:
        return "float64 captures and results need float64 arithmetic, which the kernel does not have"
    return None


def objection_to(problem: Problem) -> str | None:
    """`objection` to a whole problem."""
    return objection(problem.spec, problem.head_dim, problem.value_dim, problem.dtype)


def candidates_for(problem: Problem) -> tuple[str, ...]:
    """The printed configurations that fit a problem, in the order measured."""
    return tuple(map(str, candidates(problem)))


def seconds(problem: Problem, config: str) -> float:
    """How long a configuration should take on a problem (`fxopt.codegen.attention.cost`)."""
    cut = read_config(config)
    plain = replace(cut, listed=False)
    places = list(dict.fromkeys(replace(c, listed=False) for c in candidates(problem)))
    key, value = padded(problem.head_dim), padded(problem.value_dim)
    width = max(key, value)
    behind = places.index(plain) if plain in places else 0
    schedule = cost.Schedule(
        cut.block_m,
        cut.block_n,
        resident(cut, problem.head_dim, problem.value_dim, problem.dtype, problem.capability),
        key + value,
        pace=_PACE[width] * (1 + _PACE_BEHIND * behind),
        start=_START + _START_ELEMENT * width * cut.block_m,
        latency=_LATENCY / cut.num_warps,
        listed=cut.listed,
    )
    made = key_lists.seconds(problem, cut.block_m, cut.block_n) if cut.listed else 0.0
    return made + cost.seconds(problem, schedule)


def candidates(problem: Problem) -> tuple[Config, ...]:
    """The configurations worth measuring, best guess first, at most four; none where no kernel can be generated.

    Few queries want small blocks. Those that go through lists of blocks of keys come first where these leave out many,
    and are among them where they perhaps do.
    """
    if objection_to(problem) is not None:
        return ()
    spec, capability = problem.spec, problem.capability
    widths = (problem.head_dim, problem.value_dim)
    found = fitting(*widths, problem.dtype, capability, _captured(spec), problem.rows, drops=spec.dropout > 0)
    lists = _lists_of(spec, capability, *cost.lengths(problem))
    listed = tuple(replace(config, listed=True) for config in found if _suits_lists(config, capability))[:2]
    if lists == "few" or not listed:
        return found
    return (*listed, *found[:2]) if lists == "many" else (found[0], listed[0], *found[1:3])


def _suits_lists(config: Config, capability: tuple[int, int]) -> bool:
    """Narrow blocks leave out more; descriptors spill, and on Blackwell warps of more than 16 rows."""
    spills = config.loads == "tma" or (capability[0] > 9 and config.block_m > 16 * config.num_warps)
    return config.block_n <= 64 and not spills


def _lists_of(spec: AttentionSpec, capability: tuple[int, int], rows: int, keys: int) -> key_lists.LeftOut:
    lists = key_lists.left_out(spec, rows, keys)
    # What is measured is vectors that leave out nothing. Where the Hopper kernel serves them it takes less time then.
    return "few" if lists == "perhaps" and capability == (9, 0) else lists


def _captured(spec: AttentionSpec) -> Captured:
    if any(c.is_tile for c in spec.captures):
        return "tile"
    return "vector" if any("j" in c.dims for c in spec.captures) else "nothing"


def source(spec: AttentionSpec, head_dim: int, value_dim: int, dtype: torch.dtype, config: Config) -> str:
    """The source of the forward kernel: a module that defines ``launch(q, k, v, captures, with_lse)`` and runs alone.

    With dropout ``launch`` takes a ``seed`` as well. The same arguments always give the same text.

    Raises:
        LoweringError: no kernel can be generated; `objection` says why.
    """
    reason = objection(spec, head_dim, value_dim, dtype)
    if reason is not None:
        raise LoweringError(f"no Triton kernel for this attention: {reason}; lower it to ATen instead ({spec})")
    if config.listed and not key_lists.can_list(spec):
        raise LoweringError(f"{config} goes through a list of the blocks that a mask keeps, and there is none ({spec})")
    return str(KernelText(spec, head_dim, value_dim, dtype, config))
