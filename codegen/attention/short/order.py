"""Which configurations of a kernel for few keys to measure: a small model of what a multiprocessor does orders them.

A step of a program is one block of rows against all keys. In clock cycles,

    time = rounds · (start + steps · max(_LATENCY[config.stages], resident · work))

with ``resident`` programs at a time on a multiprocessor, as their registers and shared memory allow, ``work`` the
instructions of a step on its four schedulers, ``latency`` what a step takes alone, and ``rounds`` the number of times
that all multiprocessors are filled.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Final

import torch

from fxopt.codegen.attention.portable.config import padded
from fxopt.codegen.attention.problem import Problem
from fxopt.codegen.attention.short.config import LONGEST, Config, Walk, cut

#: Configurations measured for a site.
TRIED: Final = 3
#: Multiprocessors, by capability: the full-size device of each.
_MULTIPROCESSORS: Final = {(8, 0): 108, (9, 0): 132, (10, 0): 148, (10, 3): 148}
_SHARED: Final = {(8, 0): 166_912, (9, 0): 232_448, (10, 0): 232_448, (10, 3): 232_448}
_SHARED_DEFAULT: Final = 101_376
_REGISTERS: Final = 65_536
#: Registers of a thread besides its logits and results, and for each further piece of keys, as compiled.
_OTHER_REGISTERS: Final = 40
_PIECE_REGISTERS: Final = {"batch": 24, "rows": 16}
#: Registers of addresses, where keys and values are read in each step and not ahead.
_ADDRESS_REGISTERS: Final = 8
#: The most expected registers that compile without spilling, by wgmma and by older instructions.
_MOST_REGISTERS: Final = {True: 248, False: 225}
#: Keys of float32, whose products take registers for both operands.
_MOST_SINGLE: Final = 64
#: Rows and warps of a block: 16 rows a warp.
_BLOCKS: Final = ((16, 1), (32, 2), (64, 4), (128, 8))
_BLOCKS_SINGLE: Final = ((16, 4), (32, 4))
#: Cycles before the first step, and of a step alone: its loads from memory and its dependent products.
_START: Final = 1500
_LATENCY: Final = {1: 2200, 2: 1200}
#: Cycles of a step for each logit, and for each element of queries, keys, values and results that it moves.
_PER_LOGIT: Final = 0.1
_PER_ELEMENT: Final = 0.02
_STEPS: Final = (1, 2, 4, 8, 16)
_WALKS: Final[tuple[tuple[Walk, int], ...]] = (("batch", 1), ("batch", 2), ("rows", 1))


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the model knows of a problem; unknown sizes are as in a large one.

    Attributes:
        batch, heads, rows: as launched.
        head_dim, value_dim: padded.
        itemsize: bytes of an operand's element.
        tiles: captured tensors that vary with both row and key: those that all batch entries of a step's lane share,
            and the others.
    """

    batch: int
    heads: int
    rows: int
    head_dim: int
    value_dim: int
    itemsize: int
    tiles: tuple[int, int]


def ordered(problem: Problem) -> tuple[Config, ...]:
    """The configurations worth measuring, best guess first, at most three; none where none fits the registers."""
    if problem.keys is None or not 0 < problem.keys <= LONGEST:
        return ()
    sizes = _sizes(problem)
    shapes = [(c, _cost(c, sizes, problem.capability)) for c in _shapes(problem)]
    shapes.sort(key=lambda pair: pair[1])
    best: dict[tuple[object, ...], Config] = {}
    for config, _ in shapes:
        best.setdefault((config.rows, config.pieces, config.walk, config.stages), config)
    return tuple(best.values())[:TRIED]


def _sizes(problem: Problem) -> Sizes:
    tiles = [c.dims[0] for c in problem.spec.captures if {"i", "j"} <= set(c.dims)]
    return Sizes(
        problem.batch or 64,
        problem.heads or 16,
        problem.rows or problem.keys or 1,
        padded(problem.head_dim),
        padded(problem.value_dim),
        problem.dtype.itemsize,
        (sum(letter != "b" for letter in tiles), tiles.count("b")),
    )


def _shapes(problem: Problem) -> Iterator[Config]:
    """Every configuration that fits."""
    exact = problem.dtype is torch.float32
    sizes = _sizes(problem)
    if exact and (problem.keys or 1) > _MOST_SINGLE:
        return
    pieces = cut(problem.keys or 1, 32 if exact else LONGEST)
    blocks = _BLOCKS_SINGLE if exact else _BLOCKS
    # Reductions of larger blocks spill where the products' results lie in tensor memory.
    blocks = tuple(b for b in blocks if b[0] <= 64 or problem.capability[0] < 10)
    for (rows, warps), steps, (walk, stages) in product(blocks, _STEPS, _WALKS):
        config = Config(rows, pieces, warps, walk, steps, stages)
        if _useful(config, sizes) and _fits(config, sizes, problem.capability):
            yield config


def _fits(config: Config, sizes: Sizes, capability: tuple[int, int]) -> bool:
    most = _MOST_REGISTERS[capability[0] == 9]
    limit = _SHARED.get(capability, _SHARED_DEFAULT)
    return registers(config, sizes) <= most and shared_bytes(config, sizes) <= limit


def _useful(config: Config, sizes: Sizes) -> bool:
    """Whether a block has not twice the rows there are, and a program no more steps than there are."""
    if config.rows > 16 and config.rows >= 2 * sizes.rows:
        return False
    if config.steps == 1:
        return config.stages == 1 and config.walk == "rows"
    steps = sizes.batch if config.walk == "batch" else -(-sizes.rows // config.rows)
    return config.steps < 2 * steps


def registers(config: Config, sizes: Sizes) -> int:
    """The registers that a thread is expected to take."""
    logits = config.rows * config.keys // (32 * config.warps)
    results = config.rows * sizes.value_dim // (32 * config.warps)
    kept = logits if config.walk == "batch" and sizes.tiles[0] else 0
    others = _OTHER_REGISTERS + _PIECE_REGISTERS[config.walk] * (len(config.pieces) - 1)
    if config.walk == "batch" and config.stages == 1:
        others += _ADDRESS_REGISTERS
    return others + logits * 5 // 4 + results + kept


def shared_bytes(config: Config, sizes: Sizes) -> int:
    """The shared memory that queries, keys and values take."""
    keys = config.keys * (sizes.head_dim + sizes.value_dim)
    queries = config.rows * sizes.head_dim
    return (keys + queries) * sizes.itemsize * config.stages


def _cost(config: Config, sizes: Sizes, capability: tuple[int, int]) -> float:
    """Cycles of the whole problem."""
    blocks = -(-sizes.rows // config.rows)
    walked, others = (sizes.batch, blocks) if config.walk == "batch" else (blocks, sizes.batch)
    programs = sizes.heads * others * -(-walked // config.steps)
    steps = min(config.steps, walked)
    by_registers = _REGISTERS // (32 * config.warps * registers(config, sizes))
    resident = max(1, min(by_registers, _SHARED.get(capability, _SHARED_DEFAULT) // shared_bytes(config, sizes)))
    filled = resident * _MULTIPROCESSORS.get(capability, 128)
    start, step = _work(config, sizes)
    return -(-programs // filled) * (_START + resident * start + steps * max(_LATENCY[config.stages], resident * step))


def _work(config: Config, sizes: Sizes) -> tuple[float, float]:
    """Cycles that a multiprocessor is busy with what a program does before its loop, and with one step."""
    logits = config.rows * config.keys
    kept, moved = sizes.tiles
    keys = config.keys * (sizes.head_dim + sizes.value_dim) * _PER_ELEMENT
    queries = config.rows * (sizes.head_dim + sizes.value_dim) * _PER_ELEMENT
    per_logit = _PER_LOGIT if sizes.itemsize < 4 else (sizes.head_dim + sizes.value_dim) / 128
    step = logits * per_logit + queries
    if config.walk == "rows":
        return keys, step + (kept + moved) * logits * _PER_LOGIT
    return kept * logits * _PER_LOGIT, step + keys + moved * logits * _PER_LOGIT
