"""The order of a kernel's tiles where captured vectors limit their keys: the longest first, those without keys last.

Programs take tiles in turn, and each should have as much to do as any other. A small kernel after the one that finds
the hulls (`fxopt.codegen.attention.portable.hull`) ranks these by their blocks of keys:

    rank(e) = #{f : n(f) > n(e), or n(f) = n(e) and f < e},    order[rank(e)] = e

which is kept before the hulls' own numbers, with the limits of hull order[rank(e)], and before it, once, how many have
any keys. Programs are dealt the tiles in that order, from the first program to the last and back: where a tile stands
in it tells where its limits are, at the same time as whose they are. Tiles without keys are not loaded for: their rows
are written when everything else is done.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fxopt.codegen.attention.gluon import parameters
from fxopt.codegen.attention.portable.hull import Hull
from fxopt.codegen.template import fill, listing

KERNEL: Final = '''
@triton.jit
def blocks_of(hull_ptr, entry, entries, BLOCK_N: tl.constexpr):
    """How many blocks of keys a hull takes; -1 beyond the last one."""
    hull = hull_ptr + $numbers * entry + $further
    $length
    return tl.where(entry < entries, blocks, -1)


@triton.jit(do_not_specialize=["entries"])
def order_kernel(
    hull_ptr, entries, BLOCK_N: tl.constexpr, RANKED: tl.constexpr, STEP: tl.constexpr, EARLY: tl.constexpr
):
    """The hulls in the order of their blocks of keys, most of them first; how many have any."""
    if EARLY:
        # It is launched while the hulls are found, as the next kernel may be; both wait.
        tl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; griddepcontrol.wait; // $$0",
            "=r", [], dtype=tl.int32, is_pure=False, pack=1,
        )
    entry = tl.program_id(0) * RANKED + tl.arange(0, RANKED)
    own = blocks_of(hull_ptr, entry, entries, BLOCK_N)[:, None]
    n, there = tl.arange(0, $own)[None, :], entry[:, None] < entries
    limits = tl.load(hull_ptr + $numbers * entry[:, None] + $further + n, mask=there, other=0)
    rank = tl.zeros([RANKED], tl.int32)
    filled = 0
    for start in range(0, entries, STEP):
        other = start + tl.arange(0, STEP)
        blocks = blocks_of(hull_ptr, other, entries, BLOCK_N)
        filled += tl.sum((blocks > 0).to(tl.int32), 0)
        earlier = (blocks[None, :] == own) & (other[None, :] < entry[:, None])
        rank += tl.sum(((blocks[None, :] > own) | earlier).to(tl.int32), 1)
    ranked = hull_ptr + $numbers * rank + 1
    tl.store(ranked, entry, mask=entry < entries)
    tl.store(ranked[:, None] + 1 + n, limits, mask=there)
    tl.store(hull_ptr, filled, mask=tl.program_id(0) == 0)

'''
#: The blocks of a hull without a list.
_WITHIN: Final = """\
begin = tl.load(hull, mask=entry < entries, other=0)
end = tl.load(hull + 1, mask=entry < entries, other=0)
blocks = tl.where(begin < end, tl.cdiv(end, BLOCK_N) - begin // BLOCK_N, 0)"""
PLACE: Final = '''
@gluon.jit
def place(turn, blocks, heads, hull_ptr, HULL: gl.constexpr):
    """Row block, batch entry and head of a program's tile, and its limits: those with most keys first."""
    index = turn * programs(blocks) + dealt(turn, blocks)
    entry = index // $together
    within = index - entry * $together
    hull = hull_ptr + $numbers * entry + 1
    if HULL:
        entry = gl.load(hull)
    return $row, $batch, $head, hull + 1


@gluon.jit
def programs(blocks):
    """How many programs there are, read anew each time: kept from tile to tile it would take a register."""
    return gl.inline_asm_elementwise(
        "mov.u32 $$0, %nctaid.x;", "=r,r", [blocks], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def dealt(turn, blocks):
    """The program's place in a round: tiles are dealt out from the first program to the last, and back."""
    return gl.where(turn % 2 == 0, gl.program_id(0), programs(blocks) - 1 - gl.program_id(0))


@gluon.jit
def turns_within(tiles, blocks):
    """How many of the first ``tiles`` tiles the program takes."""
    rounds = tiles // programs(blocks)
    return rounds + gl.where(dealt(rounds, blocks) < tiles % programs(blocks), 1, 0)


@gluon.jit
def turns_of(blocks, heads, pairs, hull_ptr, HULL: gl.constexpr):
    """How many tiles the program multiplies: those with keys, and at least one."""
    tiles = blocks * pairs
    if HULL:
        tiles = gl.load(hull_ptr) * $together
    return gl.maximum(turns_within(tiles, blocks), 1)

'''
CLEAR: Final = '''
@gluon.jit
def clear(
    $clear_parameters
):
    """Write the rows of group ``MEMBER`` of the tiles without keys, which come last."""
    own.reshape([64, WIDTH]).store(gl.full([64, WIDTH], $nothing, gl.float32, layout=RESULT).to(own.dtype))
    fence_async_shared()
    for turn in range($turns, turns_within(blocks * pairs, blocks)):
        row, b, h, hull = place(turn, $places)
        first = row * ROWS + MEMBER * 64
        tma.async_copy_shared_to_global(out_target, [b, h, first, 0], own)
        if WITH_LSE:
            rows = first + gl.arange(0, 64, layout=gl.SliceLayout(1, RESULT))
            none = gl.full([64], float("-inf"), gl.float32, layout=gl.SliceLayout(1, RESULT))
            gl.store(lse_ptr + (b * heads + h).to(gl.int64) * Sq + rows, none, mask=rows < Sq)
    tma.store_wait(0)

'''
#: What it takes beside the shared memory that the result leaves through.
_CLEARED: Final = (
    *("out_target", "lse_ptr", "hull_ptr", "Sq", "heads", "blocks", "pairs"),
    *("ROWS", "WIDTH", "MEMBER", "RESULT", "HULL", "WITH_LSE"),
)
_CLEARING: Final = """\
if HULL:
    clear(
        {0},
        {1}
    )"""
_LAUNCH: Final = """
    order_kernel[(-(-hulls // {ranked}),)](
        hull, hulls, BLOCK_N={keys}, RANKED={ranked}, STEP={step}, EARLY=q.is_cuda, launch_pdl=q.is_cuda
    )"""
#: Hulls that a program ranks, and that it compares with at a time.
_RANKED, _STEP = 32, 128


@dataclass(frozen=True, slots=True)
class Order:
    """The text around the order of the tiles that ``hull`` limits.

    ``left`` is the shared memory through which results have left when all are there, ``nothing`` what rows without keys
    give.
    """

    hull: Hull
    left: str
    nothing: str

    @property
    def kernel(self) -> str:
        """The small kernel."""
        hull = self.hull
        length = _WITHIN if hull.lists is None else f"blocks = {hull.lists.length}"
        return fill(KERNEL, {"length": length} | {n: str(getattr(hull, n)) for n in ("numbers", "own", "further")})

    @property
    def holes(self) -> dict[str, str]:
        """Those of `PLACE` and `CLEAR`, of their calls, and the call at a group's end."""
        return {
            **self._split,
            "placed": "row, b, h, hull",
            "paired": "",
            "numbers": str(self.hull.numbers),
            "places": "blocks, heads, hull_ptr, HULL",
            "turns": "turns_of(blocks, heads, pairs, hull_ptr, HULL)",
            "nothing": self.nothing,
            "clear_parameters": parameters(("own", *_CLEARED)),
            "clear": _CLEARING.format(self.left, listing(_CLEARED).replace("\n", "\n        ")),
        }

    @property
    def _split(self) -> dict[str, str]:
        """Tiles of one hull follow each other: all heads of a row block, or of a batch entry."""
        if self.hull.by_rows:
            return {
                "together": "heads",
                "row": "entry % blocks",
                "batch": "entry // blocks",
                "head": "within",
            }
        return {
            "together": "(heads * blocks)",
            "row": "within % blocks",
            "batch": "entry",
            "head": "within // blocks",
        }

    @property
    def launch(self) -> str:
        """The launcher's lines that run the small kernels."""
        return self.hull.launch + _LAUNCH.format(ranked=_RANKED, step=_STEP, keys=self.hull.block_n)
