"""A tensor captured by row and key in a stream of blocks: TMA brings what a group of warps needs beside its keys.

From shared memory a group reads it in the order of its products, eight by eight values at once. Where the score is
``s·f + c`` with a power of two ``f``, its queries are multiplied by ``f``, which is exact, and the products are added
to ``c`` as they are computed: that costs one instruction a score, which widens ``c``. Adding them afterwards costs two.
A product of ``c`` with a multiple of the identity would cost none, but with one −∞ in ``c`` it is NaN in whole columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch

from fxopt.codegen.attention.captured import CapturedTensor
from fxopt.codegen.attention.hopper.config import Config
from fxopt.codegen.attention.possible import possible_keys
from fxopt.codegen.attention.softmax import split_factor
from fxopt.errors import LoweringError
from fxopt.ir.attention import NAME_OF, AttentionSpec, Capture
from fxopt.ir.expression import Expr, S, capture

#: Shared memory of a program, less what barriers take.
_SHARED: Final = 227 * 1024 - 512
#: Bytes of a value.
_SIZE: Final = 2

PRODUCER: Final = """\
# A ring for every group, so that none waits for another; they come last, as they are read last.
for member in gl.static_range(GROUPS):
    own = member * TILE_STAGES + (pair & (TILE_STAGES - 1))
    mbarrier.wait({0}_free.index(own), (pair & TILE_STAGES) // TILE_STAGES ^ 1)
    mbarrier.expect({0}_ready.index(own), {0}_source.block_type.nbytes)
    tma.async_copy_global_to_shared(
        {0}_source, [{1}, {2}, first + member * 64, n * BLOCK_N], {0}_ready.index(own),
        {0}_tiles.index(own),
    )"""

READ: Final = """\
own = MEMBER * TILE_STAGES + (pair & (TILE_STAGES - 1))
mbarrier.wait({0}_ready.index(own), (pair & TILE_STAGES) // TILE_STAGES)
{0} = widened({0}_tiles.index(own).reshape([64, BLOCK_N]).load(SCORES))"""

RELEASE: Final = "mbarrier.arrive({0}_free.index(own), count=1)"

ALLOCATE: Final = """\
{0}_tiles = gl.allocate_shared_memory(
    {0}_source.dtype, [TILE_STAGES * GROUPS] + {0}_source.block_shape, {0}_source.layout
)
{0}_ready = gl.allocate_shared_memory(gl.int64, [TILE_STAGES * GROUPS, 1], mbarrier.MBarrierLayout())
{0}_free = gl.allocate_shared_memory(gl.int64, [TILE_STAGES * GROUPS, 1], mbarrier.MBarrierLayout())
for n in gl.static_range(TILE_STAGES * GROUPS):
    mbarrier.init({0}_ready.index(n), count=1)
    mbarrier.init({0}_free.index(n), count=1)"""

#: By the dtype of the inputs.
WIDENED: Final = {
    torch.bfloat16: '''
@gluon.jit
def widened(c):
    """``c`` in float32: two values of a register in two instructions."""
    widen: gl.constexpr = "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;"
    return gl.inline_asm_elementwise(widen, "=r,=r,r", [c], dtype=gl.float32, is_pure=True, pack=2)

''',
    torch.float16: '''
@gluon.jit
def widened(c):
    """``c`` in float32."""
    return c.to(gl.float32)

''',
}
#: The pair at a place in a group of all batch entries of a head.
PAIR: Final = "within % size * (pairs // group) + before // group"
#: The holes of the templates that are empty without such a tensor.
HOLES: Final = (
    "produce_tile", "allocate_tile", "tiled", "read_tile", "release_tile", "release_added",
)  # fmt: skip
ZERO: Final = "zero = gl.zeros([64, BLOCK_N], gl.float32, layout=SCORES)"

SCALED: Final = '''
@gluon.jit
def scale(q, factor: gl.constexpr, WIDTH: gl.constexpr):
    """Multiply queries where they are, by a power of two; in which order they lie there doesn't matter."""
    LINES: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    lines = q._reinterpret(q.dtype, [WIDTH, 64], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    lines.store((lines.load(LINES).to(gl.float32) * factor).to(q.dtype))

'''
#: What a tile's queries go through before their products, which are added to a captured tensor.
SCALE: Final = """\
scale(q_tiles.index(query), {}, WIDTH)
fence_async_shared()"""

DESCRIBED: Final = '''
TILE_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=$swizzle, element_bitwidth=16, rank=4)


def tiled(x: torch.Tensor) -> TensorDescriptor:
    """``x`` as blocks of 64 rows and $keys keys; it is copied where TMA can't read it."""
    if not describable(x):
        wide = x.new_empty((*x.shape[:3], -(-x.shape[3] // 8) * 8))
        x = wide[..., : x.shape[3]].copy_(x)
    return TensorDescriptor.from_tensor(x, [1, 1, 64, $keys], TILE_LAYOUT)

'''


@dataclass(frozen=True, slots=True)
class DescribedTile(CapturedTensor):
    """A captured tensor that TMA brings: a kernel is given descriptors of it, and no address or strides."""

    @property
    def strides(self) -> tuple[str, ...]:
        """None: the descriptors have them."""
        return ()

    @property
    def stride_values(self) -> tuple[str, ...]:
        """None."""
        return ()

    @property
    def base(self) -> str:
        """No line before the loop."""
        return ""

    @property
    def load_in_loop(self) -> str:
        """No line: its values come with the products."""
        return ""


@dataclass(frozen=True, slots=True)
class StreamedTile(DescribedTile):
    """One in a stream of blocks."""

    @property
    def parameter(self) -> str:
        """What the kernel calls its argument."""
        return f"{self.name}_source"

    @property
    def argument(self) -> str:
        """What the launcher passes for it."""
        return f"tiled({self.name})"

    @property
    def attend_names(self) -> tuple[str, ...]:
        """Nothing: a block update is given its values with the products."""
        return ()

    @property
    def shared_by(self) -> str:
        """Whose pairs of batch entry and head read the same values, as the launcher calls them; nothing where none."""
        return {"-h": "batch", "b-": "heads", "--": "pairs", "bh": ""}[self.capture.dims[:2]]

    @property
    def produce(self) -> str:
        """The lines that load what the groups read of a block of keys."""
        b, h = ("0" if letter == "-" else letter for letter in self.capture.dims[:2])
        return PRODUCER.format(self.name, b, h)

    @property
    def shared(self) -> tuple[str, ...]:
        """The names of the shared memory that it takes, and of barriers that say when it may be read and written."""
        return (f"{self.name}_tiles", f"{self.name}_ready", f"{self.name}_free")


def is_tile(captured: Capture) -> bool:
    """Whether it has a value for each row and key."""
    return captured.is_tile and not captured.is_band


def form_objection(spec: AttentionSpec, dtype: torch.dtype) -> str | None:
    """Why TMA can't bring what varies with row and key to a kernel for inputs of ``dtype``, ``None`` when it can."""
    tiles = [c for c in spec.captures if is_tile(c)]
    if len(tiles) > 1:
        return "more than one captured tensor varies with both row and key"
    if any(c.dims[0] == "p" for c in tiles):
        return "a captured tensor that varies with both row and key is periodic"
    if any(c.dtype is not dtype for c in tiles):
        wanted = f"{NAME_OF[dtype]} as the inputs, not {NAME_OF[tiles[0].dtype]}"
        return f"a captured tensor that varies with both row and key must be {wanted}"
    return None


def objection(spec: AttentionSpec, width: int, dtype: torch.dtype) -> str | None:
    """Why what varies with row and key can't be streamed beside heads padded to ``width``, ``None`` when it can."""
    reason = form_objection(spec, dtype)
    if reason is not None:
        return reason
    tiles = any(map(is_tile, spec.captures))
    if tiles and width > 128:
        return "a captured tensor that varies with both row and key needs heads up to 128 wide"
    if tiles and width > 64 and possible_keys(spec, sure=True) is not None:
        return "beside a captured tensor that varies with both row and key, vectors limit keys of heads up to 64 wide"
    return None


def stages(config: Config, width: int) -> int:
    """How many blocks are in flight beside those of keys and values, for heads padded to ``width``: one or two.

    Raises:
        LoweringError: not even one fits.
    """
    rows = (config.queries + 1) * config.rows * width * _SIZE
    keys = config.stages * 2 * config.keys * width * _SIZE
    count = min(2, (_SHARED - rows - keys) // (config.rows * config.keys * _SIZE))
    if count < 1:
        raise LoweringError(f"{config} leaves no shared memory for a captured tensor that varies with row and key")
    return count


def swizzle(config: Config) -> int:
    """Over how many bytes rows are swizzled in shared memory: over 64 a thread needs two addresses, over 128 four.

    Three groups of warps have no registers for four. None of both has conflicts; 128 takes half as many copies by TMA.
    """
    return 64 if config.groups > 2 else 128


def beneath(spec: AttentionSpec, dtype: torch.dtype) -> tuple[Expr, float] | None:
    """The score as one of sums ``s`` that begin with a captured tile, and the factor of the queries in them.

    ``None`` where there is no such tile, or where the score isn't such a function: ``s·f + c`` must be all that is read
    of both. Other factors than 1 are for bfloat16, whose exponents have room.
    """
    tile = next((capture(index) for index, c in enumerate(spec.captures) if is_tile(c)), None)
    if tile is None:
        return None
    leaves = [leaf for e in (spec.score, spec.mask) if e is not None for leaf in e.walk() if not leaf.args]
    if leaves.count(S) != 1 or leaves.count(tile) != 1:
        return None
    for node in spec.score.walk():
        factor = _factor(node, tile)
        if factor is not None and (factor == 1.0 or dtype is torch.bfloat16):
            return _within(spec.score, node), factor
    return None


def _within(score: Expr, sums: Expr) -> Expr:
    """``score`` with ``s`` in the place of ``sums``."""
    return score.replace(lambda node: S if node == sums else node)


def _factor(node: Expr, tile: Expr) -> float | None:
    """The power of two ``f`` in ``s·f + tile``, or ``None`` where ``node`` is something else."""
    if node.op != "add" or tile not in node.args:
        return None
    scaled, factor = split_factor(node.args[1] if node.args[0] == tile else node.args[0])
    return factor if scaled == S and math.frexp(factor)[0] == 0.5 else None
