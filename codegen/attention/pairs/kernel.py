"""The kernel of few keys on Hopper, whole (batch, head) pairs at a time; when it can serve, what to try, its source.

The libraries' kernels, as the portable one, take a tile of rows to a program: with few keys that has hardly begun when
it ends. Here a program goes on from pair to pair; keys, queries and values of the next one come while it works.
"""

from __future__ import annotations

from typing import Final

import torch

from fxopt.codegen.attention import cost
from fxopt.codegen.attention.hopper.tile import form_objection, is_tile
from fxopt.codegen.attention.machine import hopper_objection
from fxopt.codegen.attention.pairs.config import BLOCK, LONGEST, Config, read_config
from fxopt.codegen.attention.pairs.source import PairsText
from fxopt.codegen.attention.pairs.tile import SHARED, shared_bytes, tile_stages
from fxopt.codegen.attention.portable import kernel as portable
from fxopt.codegen.attention.portable.config import padded
from fxopt.codegen.attention.problem import Problem
from fxopt.codegen.attention.short.config import cut
from fxopt.errors import LoweringError
from fxopt.ir.attention import AttentionSpec
from fxopt.ir.expression import S

_HALF: Final = (torch.bfloat16, torch.float16)
_WIDTHS: Final = (16, 32, 64)
#: How much longer a turn takes than its products and exponentials one after the other, as measured on an H100, and the
#: cycles per score of a tensor captured by row and key, read where it is or from a copy for TMA.
_PACE: Final = 1.2
_TILE, _COPIED = 0.03, 0.08
#: More keys than these leave no registers for what a score reads beside products and a tile, and with a mask want to
#: be worked on in pieces.
_ROOMY: Final = 208
_MASKED: Final = (128, 64, 64)
#: Blocks of a turn, at most.
_MOST_BLOCKS: Final = 4
#: Groups of warps, turns and blocks of queries in flight; what fits is tried in this order.
_FLIGHTS: Final = ((3, 2, 3), (2, 2, 4), (2, 2, 2), (2, 1, 2))


def objection(problem: Problem) -> str | None:
    """Why the kernel can't serve, as a sentence, or ``None`` when it can."""
    return _problem_objection(problem) or hopper_objection(problem.capability)


def _problem_objection(problem: Problem) -> str | None:
    reason = _objection(problem.spec, problem.head_dim, problem.value_dim, problem.dtype)
    if reason is not None:
        return reason
    if problem.rows is not None and problem.rows <= BLOCK:
        return f"it is for more than {BLOCK} rows, and there are {problem.rows}"
    if problem.keys is None or problem.dynamic_keys:
        return "the number of keys may change" if problem.keys else "the number of keys is not known"
    if problem.keys > LONGEST:
        return f"it holds {LONGEST} keys at most, and here are {problem.keys}"
    if problem.keys > _ROOMY and _is_placed(problem.spec):
        return f"registers hold {_ROOMY} keys where the score reads places or vectors, and here are {problem.keys}"
    copied = problem.keys % 8 and any(is_tile(c) and c.dims[0] == "b" for c in problem.spec.captures)
    return f"a tile for every batch element needs a multiple of 8 keys, not {problem.keys}" if copied else None


def _is_placed(spec: AttentionSpec) -> bool:
    """Whether the score reads more than products and a tile."""
    symbols = (leaf for leaf in spec.score.walk() if leaf.op == "symbol" and leaf != S)
    captures = (leaf for leaf in spec.score.walk() if leaf.op == "capture")
    return any(symbols) or any(not is_tile(spec.captures[int(leaf.value or 0)]) for leaf in captures)


def _objection(spec: AttentionSpec, head_dim: int, value_dim: int, dtype: torch.dtype) -> str | None:
    general = portable.objection(spec, head_dim, value_dim, dtype)
    if general is not None:
        return general
    if dtype not in _HALF or spec.out_dtype is not dtype:
        return f"inputs and results must be bfloat16 or float16 alike, not {dtype} and {spec.out_dtype}"
    if head_dim % 8 or value_dim % 8 or padded(head_dim) != padded(value_dim) or padded(head_dim) not in _WIDTHS:
        return f"head dimensions must be multiples of 8 up to {_WIDTHS[-1]} that pad alike, not {head_dim}, {value_dim}"
    if any(c.is_band for c in spec.captures):
        return "a captured tensor varies with the distance of key and row, which it does not read"
    return form_objection(spec, dtype)


def candidates(problem: Problem) -> tuple[str, ...]:
    """The printed configurations to measure, best guess first."""
    return tuple(str(config) for config in _configs(problem))


def _configs(problem: Problem) -> tuple[Config, ...]:
    pieces, width = cut(problem.keys or 1, LONGEST), padded(problem.head_dim)
    if pieces == (LONGEST,) and problem.spec.mask is not None:
        pieces = _MASKED
    blocks = -(-(problem.rows or LONGEST) // BLOCK)
    # As few blocks beyond the last row as a turn of at most four allows.
    blocks = -(-blocks // -(-blocks // _MOST_BLOCKS))
    tiled = any(map(is_tile, problem.spec.captures))
    found = []
    for groups, stages, queries in _FLIGHTS:
        if groups > blocks or (groups > 2 and not _bare(problem)):
            continue
        config = Config(BLOCK * blocks, pieces, groups, stages, queries)
        if fits(config, width, tiled=tiled):
            found.append(config)
    return tuple(found[:2])


def _bare(problem: Problem) -> bool:
    """Whether three groups have the registers: few keys, or nothing around the products."""
    spec, keys = problem.spec, cut(problem.keys or 1, LONGEST)
    return sum(keys) <= 128 or (sum(keys) <= 208 and spec.mask is None and not spec.captures)


def fits(config: Config, width: int, *, tiled: bool) -> bool:
    """Whether shared memory holds it."""
    return shared_bytes(config, width) <= SHARED and (not tiled or tile_stages(config, width) > 0)


def seconds(problem: Problem, config: str) -> float:
    """How long a configuration should take on a problem (`fxopt.codegen.attention.cost`)."""
    found, width = read_config(config), padded(problem.head_dim)
    tile = _TILE if (problem.keys or 0) % 8 == 0 else _COPIED
    # A turn's work is shared evenly; two groups or three overlap by as much.
    schedule = cost.Schedule(found.rows, found.keys, 1, 2 * width, pace=_PACE, start=0, latency=0, even=True, tile=tile)
    return cost.seconds(problem, schedule)


def source(spec: AttentionSpec, head_dim: int, value_dim: int, dtype: torch.dtype, config: str) -> str:
    """The source of the forward kernel: a module that defines ``launch(q, k, v, captures, with_lse)`` and runs alone.

    Raises:
        LoweringError: no kernel can be generated.
    """
    reason = _objection(spec, head_dim, value_dim, dtype)
    if reason is not None:
        raise LoweringError(f"no kernel of whole pairs for this attention: {reason} ({spec})")
    found = read_config(config)
    if not fits(found, padded(head_dim), tiled=any(map(is_tile, spec.captures))):
        raise LoweringError(f"no kernel of whole pairs for this attention: {config} takes too much shared memory")
    return str(PairsText(spec, head_dim, value_dim, dtype, found))
