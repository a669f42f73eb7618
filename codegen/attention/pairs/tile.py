"""A tensor captured by row and key beside whole pairs: TMA brings what a block of rows needs, piece by piece.

A group of warps reads it from shared memory in the order of its products and adds it to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from fxopt.codegen.attention.captured import CapturedTensor
from fxopt.codegen.attention.hopper.tile import DescribedTile
from fxopt.codegen.attention.pairs.config import BLOCK, Config

#: Shared memory of a program, less what barriers take.
SHARED: Final = 227 * 1024 - 1024
#: Bytes of a value.
SIZE: Final = 2

_PRODUCE: Final = """\
own = number % TILE_STAGES
mbarrier.wait({0}_free.index(own), ((number // TILE_STAGES) & 1) ^ 1)
mbarrier.expect({0}_ready.index(own), {1})"""
_COPY: Final = """\
tma.async_copy_global_to_shared(
    {0}_source_{1}, [{2}, {3}, first, {4}], {0}_ready.index(own), {0}_tiles_{1}.index(own)
)"""
_ALLOCATE: Final = """\
{0}_tiles_{1} = gl.allocate_shared_memory(
    {0}_source_{1}.dtype, [TILE_STAGES] + {0}_source_{1}.block_shape, {0}_source_{1}.layout
)"""
_BARRIERS: Final = """\
{0}_ready = gl.allocate_shared_memory(gl.int64, [TILE_STAGES, 1], mbarrier.MBarrierLayout())
{0}_free = gl.allocate_shared_memory(gl.int64, [TILE_STAGES, 1], mbarrier.MBarrierLayout())
for n in gl.static_range(TILE_STAGES):
    mbarrier.init({0}_ready.index(n), count=1)
    mbarrier.init({0}_free.index(n), count=1)"""
_AWAIT: Final = """\
own = (block - begin) % TILE_STAGES
mbarrier.wait({0}_ready.index(own), ((block - begin) // TILE_STAGES) & 1)"""
_RELEASE: Final = """\
# Given back as late as here: the products have taken every weight, so that every value read has come.
mbarrier.arrive({0}_free.index(own), count=1)"""

DESCRIBED: Final = '''
TILE_LAYOUTS = {keys: gl.NVMMASharedLayout.get_default_for([1, 1, 64, keys], gl.$element) for keys in ($tile_keys)}


def aligned(x: torch.Tensor) -> torch.Tensor:
    """``x``, copied where TMA can't read it: to rows that begin with a line of the cache."""
    if describable(x):
        return x
    wide = x.new_empty((*x.shape[:3], -(-x.shape[3] // 64) * 64))
    return wide[..., : x.shape[3]].copy_(x)


def tiled(x: torch.Tensor, keys: int) -> TensorDescriptor:
    """``x`` as blocks of 64 rows and so many keys."""
    return TensorDescriptor.from_tensor(x, [1, 1, 64, keys], TILE_LAYOUTS[keys])

'''


@dataclass(frozen=True, slots=True)
class PairTile(DescribedTile):
    """One whose pieces, beside those of the keys, have a descriptor each."""

    def sources(self, config: Config) -> tuple[str, ...]:
        """The names of its descriptors, one for each piece."""
        return tuple(f"{self.name}_source_{n}" for n in range(len(config.pieces)))

    def arguments(self, config: Config) -> tuple[str, ...]:
        """What the launcher passes for them."""
        return tuple(f"tiled({self.name}, {keys})" for keys in config.pieces)

    def shared(self, config: Config) -> tuple[str, ...]:
        """The names of the shared memory that it takes, and of barriers that say when it may be read and written."""
        return (
            *(f"{self.name}_tiles_{n}" for n in range(len(config.pieces))),
            f"{self.name}_ready",
            f"{self.name}_free",
        )

    def produce(self, config: Config) -> str:
        """The lines that load what a block of rows reads."""
        b, h = ("0" if letter == "-" else letter for letter in self.capture.dims[:2])
        copies = (_COPY.format(self.name, n, b, h, start) for n, start in enumerate(config.starts))
        return "\n".join((_PRODUCE.format(self.name, BLOCK * config.keys * SIZE), *copies))

    def allocate(self, config: Config) -> str:
        """The lines that make its shared memory and barriers."""
        tiles = (_ALLOCATE.format(self.name, n) for n in range(len(config.pieces)))
        return "\n".join((*tiles, _BARRIERS.format(self.name)))

    @property
    def await_values(self) -> str:
        """The lines after which a block of rows may read it."""
        return _AWAIT.format(self.name)

    @property
    def release(self) -> str:
        """The lines that give its place back."""
        return _RELEASE.format(self.name)

    def values(self, n: int, keys: int) -> str:
        """What is read of the ``n``-th piece."""
        return f"widened({self.name}_tiles_{n}.index(own).reshape([64, {keys}]).load(SCORES_{n}))"


def shared_bytes(config: Config, width: int) -> int:
    """The shared memory of everything but captured tensors."""
    return (config.stages * 2 * config.keys + (config.queries + config.groups) * BLOCK) * width * SIZE


def tile_stages(config: Config, width: int) -> int:
    """How many blocks of a captured tensor are in flight: one for each group, none where they don't fit."""
    fit = (SHARED - shared_bytes(config, width)) // (BLOCK * config.keys * SIZE)
    return config.groups if fit >= config.groups else 0


def tile_of(tensors: Sequence[CapturedTensor]) -> PairTile | None:
    """The one that TMA brings, if there is one."""
    return next((c for c in tensors if isinstance(c, PairTile)), None)
