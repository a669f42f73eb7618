"""The Hopper kernel of an attention: TMA, wgmma and divided warps (Gluon); when it can serve, and its source.

Shah et al., FlashAttention-3 (arXiv 2407.08608) describes the schedule: products of one block overlap the softmax of
another.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import torch

from fxopt.codegen.attention import cost
from fxopt.codegen.attention.hopper import tile
from fxopt.codegen.attention.hopper.config import Config, read_config
from fxopt.codegen.attention.hopper.slopes import is_linear
from fxopt.codegen.attention.hopper.source import HopperText
from fxopt.codegen.attention.hopper.stream_source import StreamText
from fxopt.codegen.attention.hopper.tile import is_tile
from fxopt.codegen.attention.interval import key_range
from fxopt.codegen.attention.machine import hopper_objection
from fxopt.codegen.attention.portable import kernel as portable
from fxopt.codegen.attention.portable import key_lists
from fxopt.codegen.attention.portable.config import padded
from fxopt.codegen.attention.problem import Problem
from fxopt.codegen.attention.softmax import split_factor
from fxopt.errors import LoweringError
from fxopt.ir.attention import AttentionSpec
from fxopt.ir.expression import Expr, J, S

#: Heads up to 64 wide. Three groups of warps have fewer registers each: enough for masks by bounds and for scores of
#: the product and of the row, not for what is read by key. With a baton they take 1 to 3% less time for every kind of
#: mask and score, as measured with 64 wide heads and 2048 keys; two groups take up to 3% more,
_NARROW: Final = (Config(192, 128, 3, 2, 0, baton=True), Config(128, 128, 4, 2, 0))
#: but 3% less where the score has slopes (under a causal mask).
_NARROW_SLOPED: Final = (Config(192, 128, 3, 2, 0, baton=True), Config(128, 128, 4, 2, 0, baton=True))
#: By padded head dimension, best guess first (`read_config` explains the numbers).
_CONFIGS: Final[dict[int, tuple[Config, ...]]] = {
    16: _NARROW,
    32: _NARROW,
    64: _NARROW,
    128: (Config(128, 128, 2, 2, 0), Config(128, 128, 2, 2)),
    256: (Config(128, 64, 2, 1),),
}
#: The same where the score is linear in the key; wider heads have such scores in `_CONFIGS_BY_PLACE`.
_CONFIGS_SLOPED: Final[dict[int, tuple[Config, ...]]] = dict.fromkeys((16, 32, 64), _NARROW_SLOPED)
_NARROW_BY_KEY: Final = (Config(128, 128, 4, 2, 0), Config(128, 64, 4, 2, 0))
#: The same where each key has a number of its own beside its product: fewer rows or keys at a time.
_CONFIGS_BY_KEY: Final[dict[int, tuple[Config, ...]]] = {
    16: _NARROW_BY_KEY,
    32: _NARROW_BY_KEY,
    64: _NARROW_BY_KEY,
    128: (Config(128, 64, 3, 2, 0), Config(128, 64, 4, 2)),
    256: (Config(128, 64, 2, 1),),
}
#: The same where that number follows from the key's place, or from a band: no loads wait, few registers hold it.
_CONFIGS_BY_PLACE: Final[dict[int, tuple[Config, ...]]] = {
    **_CONFIGS_BY_KEY,
    128: (Config(128, 128, 2, 2, 0), Config(128, 64, 3, 2, 0)),
}
#: The same where a block of keys comes with a value for each of its rows.
_PLAIN_TILED: Final = (Config(192, 128, 3, 2, 0, baton=True), Config(128, 128, 3, 2, 0))
_NARROW_TILED: Final = (Config(128, 128, 4, 2, 0), Config(128, 64, 4, 2, 0))
_CONFIGS_TILED: Final[dict[int, tuple[Config, ...]]] = {
    16: _NARROW_TILED,
    32: _NARROW_TILED,
    64: _NARROW_TILED,
    128: (Config(128, 64, 3, 2, 0), Config(128, 64, 2, 2, 0)),
}
#: With fewer rows a program has too little work to hide where its tiles begin and end.
_FEWEST_ROWS: Final = 256
_HALF: Final = (torch.bfloat16, torch.float16)
#: How much longer a step takes than its products and exponentials one after the other, which overlap, by padded head
#: dimension: at 128 and 256 as measured on an H100 of tiles one after the other.
_PACE: Final = {16: 0.8, 32: 0.8, 64: 0.75, 128: 0.9, 256: 1.0}
#: The same for each place behind the first.
_PACE_BEHIND: Final = 0.05
#: Cycles per score of a tensor captured by row and key, as products are added to it and as it is added to them: by the
#: instructions that are more (85 and 155 to 64 rows and 128 keys), at what those of bands cost on an H100.
_BENEATH, _ADDED = 0.028, 0.05
#: Cycles of a tile beside its steps (`benchmarks/results/h100-attention-quick.json`, causal attention of 512 keys), and
#: of a tile in a stream, whose blocks go on.
_START, _START_STREAM = 6000, 2500


def objection(problem: Problem) -> str | None:
    """Why the kernel can't serve, as a sentence, or ``None`` when it can."""
    if problem.rows is not None and problem.rows < _FEWEST_ROWS:
        return f"it is for {_FEWEST_ROWS} rows and more, and there are {problem.rows}"
    if problem.keys is not None and problem.keys % 8 and any(map(is_tile, problem.spec.captures)):
        return f"a captured tensor that varies with both row and key needs a multiple of 8 keys, not {problem.keys}"
    reason = _objection(problem.spec, problem.head_dim, problem.value_dim, problem.dtype)
    return reason if reason is not None else hopper_objection(problem.capability)


def _objection(spec: AttentionSpec, head_dim: int, value_dim: int, dtype: torch.dtype) -> str | None:
    general = portable.objection(spec, head_dim, value_dim, dtype)
    if general is not None:
        return general
    if dtype not in _HALF or spec.out_dtype is not dtype:
        return f"inputs and results must be bfloat16 or float16 alike, not {dtype} and {spec.out_dtype}"
    if head_dim % 8 or value_dim % 8 or padded(head_dim) != padded(value_dim) or padded(head_dim) not in _CONFIGS:
        return f"head dimensions must be multiples of 8 that pad alike, not {head_dim} and {value_dim}"
    bands = [c for c in spec.captures if c.is_band]
    if bands and (padded(head_dim) > 128 or any(c.dtype.itemsize != 2 for c in bands)):
        return "a band, read by row and key, needs half precision and heads up to 128 wide"
    return tile.objection(spec, padded(head_dim), dtype)


def candidates(problem: Problem) -> tuple[str, ...]:
    """The printed configurations to measure."""
    spec, width = problem.spec, padded(problem.head_dim)
    found = _by_captures(spec, width)[width]
    if any(map(is_tile, spec.captures)):
        bare = width <= 64 and spec.mask is None and split_factor(_around_sums(spec, problem.dtype))[0] == S
        found = _PLAIN_TILED if bare else _CONFIGS_TILED[width]
    # Only streams leave out the holes of hulls, and what is measured has none.
    streams = any(c.is_tile for c in spec.captures) or (width <= 128 and key_lists.may_have_holes(spec))
    plain = [config for config in found if config.ahead is not None or not streams]
    listed = _listed(problem)
    return tuple(map(str, (*listed, *plain[:1]) if listed else plain))


def _listed(problem: Problem) -> tuple[Config, ...]:
    """The configurations that go through lists of blocks, where these leave out many. Three groups would spill."""
    spec, sizes = problem.spec, cost.Sizes.of(problem)
    if key_lists.left_out(spec, sizes.rows, sizes.keys) != "many":
        return ()
    found = _CONFIGS_BY_KEY if any(c.dims[3] == "j" for c in spec.captures) else _CONFIGS_BY_PLACE
    found = _CONFIGS_TILED if any(map(is_tile, spec.captures)) else found
    streams = (config for config in found.get(padded(problem.head_dim), ()) if config.ahead == 0)
    return tuple(replace(config, listed=True) for config in streams)


def _by_captures(spec: AttentionSpec, width: int) -> dict[int, tuple[Config, ...]]:
    """The configurations by whether each key has a number of its own, which takes registers or instructions."""
    if any(c.dims[3] == "j" for c in spec.captures):
        return _CONFIGS_BY_KEY
    if width > 64:
        return _CONFIGS_BY_PLACE if spec.score.reads(J) or any(c.is_band for c in spec.captures) else _CONFIGS
    if not spec.score.reads(J):
        return _CONFIGS
    # A linear score takes few registers, and so does a lower bound; both are too much.
    lower = key_range(spec, further=True).side("lower")
    return _CONFIGS_BY_PLACE if lower or not is_linear(spec.score, spec.captures) else _CONFIGS_SLOPED


def _around_sums(spec: AttentionSpec, dtype: torch.dtype) -> Expr:
    """The score of what the tensor cores sum."""
    beneath = tile.beneath(spec, dtype)
    return spec.score if beneath is None else beneath[0]


def seconds(problem: Problem, config: str) -> float:
    """How long a configuration should take on a problem (`fxopt.codegen.attention.cost`)."""
    cut, width = read_config(config), padded(problem.head_dim)
    places = [place for place in candidates(problem) if read_config(place).listed == cut.listed]
    behind = places.index(config) if config in places else 0
    pace = _PACE[width] * (1 + _PACE_BEHIND * behind)
    start = _START if cut.ahead is None else _START_STREAM
    read = _ADDED if tile.beneath(problem.spec, problem.dtype) is None else _BENEATH
    schedule = cost.Schedule(
        cut.rows, cut.keys, 1, 2 * width, pace=pace, start=start, latency=0, tile=read, listed=cut.listed
    )
    made = key_lists.seconds(problem, cut.rows, cut.keys) if cut.listed else 0.0
    return made + cost.seconds(problem, schedule)


def source(spec: AttentionSpec, head_dim: int, value_dim: int, dtype: torch.dtype, config: str) -> str:
    """The source of the forward kernel: a module that defines ``launch(q, k, v, captures, with_lse)`` and runs alone.

    Raises:
        LoweringError: no kernel can be generated.
    """
    reason = _objection(spec, head_dim, value_dim, dtype)
    if reason is not None:
        raise LoweringError(f"no Hopper kernel for this attention: {reason} ({spec})")
    cut = read_config(config)
    if cut.ahead is None and any(c.is_tile for c in spec.captures):
        raise LoweringError(f"no Hopper kernel for this attention: {config} reads no bands and tiles ({spec})")
    if cut.ahead and any(map(is_tile, spec.captures)):
        raise LoweringError(f"no Hopper kernel for this attention: {config} multiplies ahead of tiles ({spec})")
    if cut.listed and not key_lists.can_list(spec):
        raise LoweringError(f"{config} goes through a list of the blocks that a mask keeps, and there is none ({spec})")
    text = HopperText if cut.ahead is None else StreamText
    return str(text(spec, head_dim, value_dim, dtype, cut))
