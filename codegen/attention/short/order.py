"""Which configurations of a kernel for few keys to measure: a small model of what a multiprocessor does orders them.

A step of a program is one block of rows against all keys. In clock cycles,

    time = rounds · (start + steps · max(latency + work, resident · work))

with ``resident`` programs at a time on a multiprocessor, as their registers and shared memory allow, ``work`` the
instructions of a step on its four schedulers, ``latency`` what a step waits for when alone, and ``rounds`` the times
that all multiprocessors are filled.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Final

import torch

from fxopt.codegen.attention.portable.config import padded
from fxopt.codegen.attention.problem import Problem
from fxopt.codegen.attention.short.config import LONGEST, Config, Walk, cut

#: Configurations measured for a site.
TRIED: Final = 2
#: Multiprocessors, by capability: the full-size device of each.
_MULTIPROCESSORS: Final = {(8, 0): 108, (9, 0): 132, (10, 0): 148, (10, 3): 148}
_SHARED: Final = {(8, 0): 166_912, (9, 0): 232_448, (10, 0): 232_448, (10, 3): 232_448}
_SHARED_DEFAULT: Final = 101_376
_REGISTERS: Final = 65_536
#: Registers of a thread, as compiled: besides its logits and results; for each further piece of keys; for operands that
#: products don't take from shared memory, as wgmma does.
_OTHER_REGISTERS: Final = 16
_PIECE_REGISTERS: Final = {"batch": 24, "rows": 16}
_OPERAND_REGISTERS: Final = 36
#: The most expected registers that compile without spilling.
_MOST_REGISTERS: Final = 239
#: Keys of float32, whose products take registers for both operands.
_MOST_SINGLE: Final = 64
#: Rows and warps of a block: 16 rows a warp.
_BLOCKS: Final = ((16, 1), (32, 2), (64, 4), (128, 8))
_BLOCKS_SINGLE: Final = ((16, 4), (32, 4))
#: Cycles before the first step, and those of a step alone that wait for memory and products, by stages.
_START: Final = 1500
_LATENCY: Final = {1: 1500, 2: 800}
#: Cycles of a step for each logit, and for each element of queries, keys, values and results that it moves.
_PER_LOGIT: Final = 0.1
_PER_ELEMENT: Final = 0.02
#: How much longer kernels take than these cycles say (`benchmarks/results/h100-windows.json`).
_PACE: Final = 1.5
_STEPS: Final = (1, 2, 4, 8, 16)
_WALKS: Final[tuple[tuple[Walk, int], ...]] = (("batch", 1), ("batch", 2), ("rows", 1), ("rows", 2))


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the model knows of a problem; unknown sizes are as in a large one.

    Attributes:
        batch, heads, rows: as launched.
        head_dim, value_dim: padded.
        itemsize: bytes of an operand's element.
        tiles: captured tensors that vary with both row and key: those that all steps along the batch share, and the
            others.
        masked: whether keys are left out one by one.
        capability: of the device.
    """

    batch: int
    heads: int
    rows: int
    head_dim: int
    value_dim: int
    itemsize: int
    tiles: tuple[int, int]
    masked: bool
    capability: tuple[int, int]


def ordered(problem: Problem) -> tuple[Config, ...]:
    """The configurations worth measuring, best guess first, at most three; none where none fits the registers."""
    if problem.keys is None or not 0 < problem.keys <= LONGEST:
        return ()
    sizes = _sizes(problem)
    shapes = [(c, _cost(c, sizes)) for c in _shapes(problem)]
    shapes.sort(key=lambda pair: pair[1])
    best: dict[tuple[object, ...], Config] = {}
    for config, _ in shapes:
        best.setdefault((config.rows, config.pieces, config.walk, config.stages), config)
    return tuple(best.values())[:TRIED]


def cycles(config: Config, problem: Problem) -> float:
    """The cycles that a configuration should take on a whole problem."""
    return _PACE * _cost(config, _sizes(problem))


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
        problem.spec.mask is not None,
        problem.capability,
    )


def _shapes(problem: Problem) -> Iterator[Config]:
    """Every configuration that fits."""
    exact = problem.dtype is torch.float32
    sizes = _sizes(problem)
    if exact and (problem.keys or 1) > _MOST_SINGLE:
        return
    pieces = cut(problem.keys or 1, 32 if exact else LONGEST)
    # Reductions of larger blocks spill where the products' results lie in tensor memory.
    largest = 64 if problem.capability[0] >= 10 else 128
    blocks = [block for block in (_BLOCKS_SINGLE if exact else _BLOCKS) if block[0] <= largest]
    for (rows, warps), steps, (walk, stages) in product(blocks, _STEPS, _WALKS):
        config = Config(rows, pieces, warps, walk, steps, stages)
        if _useful(config, sizes) and _fits(config, sizes):
            yield _capped(config, sizes)


def _fits(config: Config, sizes: Sizes) -> bool:
    limit = _SHARED.get(sizes.capability, _SHARED_DEFAULT)
    return registers(config, sizes) <= _MOST_REGISTERS and shared_bytes(config, sizes) <= limit


def _capped(config: Config, sizes: Sizes) -> Config:
    """Windows with a cap on registers at which no program less fits, as they may take a few more than expected."""
    if not sizes.tiles[0] or config.walk != "batch" or not _has_wgmma(config, sizes):
        return config
    most = _REGISTERS // (32 * config.warps * _resident(config, sizes)) // 8 * 8
    return replace(config, registers=most) if most < 256 else config


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
    threads = 32 * config.warps
    logits = config.rows * config.keys // threads
    results = config.rows * sizes.value_dim // threads
    found = _OTHER_REGISTERS + _PIECE_REGISTERS[config.walk] * (len(config.pieces) - 1) + logits * 5 // 4 + results
    if config.walk == "batch":
        # Keys and values pass through them, and what stays lies in them.
        found += config.keys * (sizes.head_dim + sizes.value_dim) * sizes.itemsize // (4 * threads)
        found += logits * bool(sizes.tiles[0])
    if sizes.masked:
        found += logits // 8
    return found if _has_wgmma(config, sizes) else found + _OPERAND_REGISTERS


def _has_wgmma(config: Config, sizes: Sizes) -> bool:
    return sizes.capability[0] == 9 and config.warps >= 4 and sizes.itemsize < 4


def shared_bytes(config: Config, sizes: Sizes) -> int:
    """The shared memory that queries, keys and values take, what is loaded ahead included."""
    keys = config.keys * (sizes.head_dim + sizes.value_dim)
    queries = config.rows * sizes.head_dim
    ahead = keys + queries if config.walk == "batch" else queries
    return (keys + queries + ahead * (config.stages - 1)) * sizes.itemsize


def _cost(config: Config, sizes: Sizes) -> float:
    """Cycles of the whole problem."""
    blocks = -(-sizes.rows // config.rows)
    walked, others = (sizes.batch, blocks) if config.walk == "batch" else (blocks, sizes.batch)
    programs = sizes.heads * others * -(-walked // config.steps)
    steps = min(config.steps, walked)
    resident = _resident(config, sizes)
    filled = resident * _MULTIPROCESSORS.get(sizes.capability, 128)
    start, step = _work(config, sizes)
    return -(-programs // filled) * (
        _START + resident * start + steps * max(_LATENCY[config.stages] + step, resident * step)
    )


def _resident(config: Config, sizes: Sizes) -> int:
    """How many programs share a multiprocessor."""
    by_registers = _REGISTERS // (32 * config.warps * registers(config, sizes))
    return max(1, min(by_registers, _SHARED.get(sizes.capability, _SHARED_DEFAULT) // shared_bytes(config, sizes)))


def _work(config: Config, sizes: Sizes) -> tuple[float, float]:
    """Cycles that a multiprocessor is busy with what a program does before its loop, and with one step."""
    logits = config.rows * config.keys
    kept, moved = sizes.tiles
    keys = config.keys * (sizes.head_dim + sizes.value_dim) * _PER_ELEMENT
    queries = config.rows * (sizes.head_dim + sizes.value_dim) * _PER_ELEMENT
    width = sizes.head_dim + sizes.value_dim
    # Products by older instructions read shared memory again for every 16 rows, those of float32 go number by number.
    per_logit = (
        _PER_LOGIT if _has_wgmma(config, sizes) else max(_PER_LOGIT, width / (128 if sizes.itemsize == 4 else 1024))
    )
    step = logits * per_logit + queries
    if config.walk == "rows":
        return keys, step + (kept + moved) * logits * _PER_LOGIT
    return kept * logits * _PER_LOGIT, step + keys + moved * logits * _PER_LOGIT
