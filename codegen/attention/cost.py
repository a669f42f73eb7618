"""How long a generated kernel should take, from what it computes and moves: what orders candidates before any is built.

A kernel is a `Schedule`: programs that go through blocks of keys, several on a multiprocessor. A step of a program
keeps the multiprocessor busy with its products and exponentials; alone on it, it waits for them and for memory as well.
The whole takes as long as its rounds of programs take, or as long as memory does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from fxopt.codegen.attention.kept import kept_blocks, listed_blocks
from fxopt.codegen.attention.problem import Problem


@dataclass(frozen=True, slots=True)
class Device:
    """What the full-size device of a compute capability does.

    Attributes:
        multiprocessors: how many it has.
        clock: cycles per second under load.
        products: multiplications and additions of half precision per cycle and multiprocessor.
        memory: bytes per second of a copy.
        cache: bytes per cycle that a multiprocessor gets from the cache that all share.
    """

    multiprocessors: int
    clock: float
    products: float
    memory: float
    cache: float = 40.0


#: H100: a copy and products as measured; the others from their data sheets.
DEVICES: Final[dict[tuple[int, int], Device]] = {
    (8, 0): Device(108, 1.3e9, 2048, 1.7e12),
    (9, 0): Device(132, 1.7e9, 4096, 3.0e12),
    (10, 0): Device(148, 1.8e9, 8192, 7.0e12),
    (10, 3): Device(148, 1.8e9, 8192, 7.0e12),
}
_OTHERS: Final = Device(84, 1.7e9, 1024, 0.8e12, 24.0)
#: Per cycle and multiprocessor: exponentials, and products of float32, which tensor cores don't compute.
_EXPONENTIALS: Final = 16
_SINGLE_PRODUCTS: Final = 256
#: What is assumed of sizes that are not known: a large problem.
_BATCH, _HEADS, _LENGTH = 16, 16, 2048
#: Cycles per score of what stands around its product, on an H100 (`benchmarks/results/h100-attention.json`: N = 8192
#: with and without a bias): a captured tensor read by row and key, one read by their distance, another operation.
_TILE, _BAND, _OPERATION = 0.07, 0.06, 0.005
#: How much longer a tile takes whose rows don't begin at a multiple of 16 bytes (the same, windows of 49 tokens).
_UNALIGNED: Final = 8


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of a problem, those that are not known assumed."""

    batch: int
    heads: int
    kv_heads: int
    rows: int
    keys: int

    @classmethod
    def of(cls, problem: Problem) -> Sizes:
        """Those of ``problem``."""
        heads = problem.heads or problem.kv_heads or _HEADS
        rows = problem.rows or problem.keys or _LENGTH
        keys = problem.keys or (_LENGTH if problem.rows is None else max(problem.rows, _LENGTH))
        return cls(problem.batch or _BATCH, heads, problem.kv_heads or heads, rows, keys)


def lengths(problem: Problem) -> tuple[int, int]:
    """The numbers of queries and keys; one that is not known is as the other."""
    rows, keys = problem.rows, problem.keys
    return rows or keys or _LENGTH, keys or rows or _LENGTH


@dataclass(frozen=True, slots=True)
class Schedule:
    """How a configuration cuts a problem.

    Attributes:
        rows: of a block.
        keys: of a step.
        resident: programs that share a multiprocessor.
        widths: of keys and values together, as padded.
        pace: how much longer a step takes than its products and exponentials one after the other.
        start: cycles that a program keeps its multiprocessor busy beside its steps.
        latency: cycles of a step that waits for everything.
        served: query heads whose rows lie in the same block.
        even: whether the work is cut evenly over the device, whatever the number of blocks.
        tile: cycles per score of a captured tensor read by row and key that comes by TMA, ``None`` where none does.
        listed: whether it goes through a list of the blocks that the mask keeps, which is made before.
    """

    rows: int
    keys: int
    resident: int
    widths: int
    pace: float = 1.0
    start: float = 1500.0
    latency: float = 1000.0
    served: int = 1
    even: bool = False
    tile: float | None = None
    listed: bool = False


def device_of(capability: tuple[int, int]) -> Device:
    """The device that a compute capability stands for."""
    return DEVICES.get(capability, _OTHERS)


def seconds(problem: Problem, schedule: Schedule) -> float:
    """How long ``schedule`` should take on ``problem``, launching it left out."""
    sizes, device = Sizes.of(problem), device_of(problem.capability)
    rows = sizes.rows * schedule.served
    leaves = listed_blocks if schedule.listed else kept_blocks
    counts = leaves(problem.spec, sizes.rows, sizes.keys, schedule.rows, schedule.keys)
    if schedule.served > 1:
        counts = (max(counts),) * -(-rows // schedule.rows)
    heads = sizes.batch * sizes.heads // schedule.served
    busy = _step(problem, schedule, device)
    cycles = _cycles(schedule, counts, heads, busy, device)
    return max(cycles / device.clock, _bytes(problem, sizes) / device.memory)


def _cycles(schedule: Schedule, counts: tuple[int, ...], heads: int, busy: float, device: Device) -> float:
    """The rounds of programs; blocks of different lengths fill one another's gaps."""
    slots = device.multiprocessors * schedule.resident
    steps, blocks = sum(counts) * heads, len(counts) * heads
    if schedule.even:
        return schedule.start + steps / slots * max(schedule.latency + busy, schedule.resident * busy)
    sharing = min(schedule.resident, -(-blocks // device.multiprocessors))
    step = max(schedule.latency + busy, sharing * busy)
    longest = sharing * schedule.start + max(counts) * step
    rounds = blocks / slots if len(set(counts)) > 1 else -(-blocks // slots)
    return max(longest, rounds * (sharing * schedule.start + steps / blocks * step))


def _step(problem: Problem, schedule: Schedule, device: Device) -> float:
    """Cycles that one step keeps a multiprocessor busy."""
    scores = schedule.rows * schedule.keys
    rate = _SINGLE_PRODUCTS if problem.dtype is torch.float32 else device.products
    computed = scores * (2 * schedule.widths / rate + 1 / _EXPONENTIALS) * schedule.pace
    moved = schedule.keys * schedule.widths * problem.dtype.itemsize / device.cache
    return max(computed + scores * around(problem, schedule.tile), moved)


def around(problem: Problem, streamed: float | None = None) -> float:
    """Cycles per score of what is read and computed around its product; ``streamed`` as `Schedule.tile`."""
    spec = problem.spec
    aligned = (problem.keys or _LENGTH) * 2 % 16 == 0
    tile = _TILE * (1 if aligned else _UNALIGNED) if streamed is None else streamed
    read = sum(_BAND if c.is_band else tile if c.is_tile else 0.0 for c in spec.captures)
    return read + _OPERATION * sum(bool(node.args) for node in spec.score.walk())


def _bytes(problem: Problem, sizes: Sizes) -> float:
    """What has to come from memory and to go there."""
    queries = sizes.batch * sizes.heads * sizes.rows
    keys = sizes.batch * sizes.kv_heads * sizes.keys
    return (queries + keys) * (problem.head_dim + problem.value_dim) * problem.dtype.itemsize
