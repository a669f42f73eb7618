"""From what the kernels write of the gradient of a captured tensor to the gradient: scratch, sums, launches of these.

Sums run in a fixed order, so that the same inputs give the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fxopt.codegen.attention.backward.plan import Flow
from fxopt.codegen.attention.portable.config import Config

SUMS: Final = '''
@triton.jit(do_not_specialize=["batch", "heads", "length", "kept_batches", "kept_heads"])
def sums_kernel(
    source_ptr,
    target_ptr,
    batch,
    heads,
    length,
    kept_batches,
    kept_heads,
    ALONG: tl.constexpr,
    TURNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Sums of ``source [batch, heads, length]`` over batches that lie kept_batches apart, over heads unless all of them
    are kept, and ALONG the length if that is wanted.
    """
    places = kept_batches * kept_heads
    place = tl.program_id(0) % places
    kept_h, kept_b = place % kept_heads, place // kept_heads
    heads_summed = heads // kept_heads
    turns = tl.cdiv(batch - kept_b, kept_batches) * heads_summed
    begin = tl.program_id(0) // places * STEP
    end = length if ALONG else begin + 1
    total = tl.zeros([TURNS, STEP], tl.float32)
    for first in range(0, turns, TURNS):
        turn = first + tl.arange(0, TURNS)
        b = kept_b + turn // heads_summed * kept_batches
        h = kept_h + turn % heads_summed
        row = source_ptr + ((b * heads + h).to(tl.int64) * length)[:, None]
        for start in range(begin, end, STEP):
            x = (start + tl.arange(0, STEP))[None, :]
            total += tl.load(row + x, mask=(turn < turns)[:, None] & (x < length), other=0.0)
    if ALONG:
        tl.store(target_ptr + place, tl.sum(tl.sum(total, 0), 0).to(target_ptr.dtype.element_ty))
    else:
        x = begin + tl.arange(0, STEP)
        target = target_ptr + place.to(tl.int64) * length + x
        tl.store(target, tl.sum(total, 0).to(target_ptr.dtype.element_ty), mask=x < length)

'''

WINDOWS: Final = '''
@triton.jit(do_not_specialize=["Sq", "length", "planes", "parts", "lines"])
def windows_kernel(
    windows_ptr,
    target_ptr,
    Sq,
    length,
    planes,
    parts,
    lines,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PARTS: tl.constexpr,
    STEP: tl.constexpr,
):
    """One stretch of the gradient of a band: the windows that overlap there, of diagonals of ROWS x KEYS, added up."""
    plane = tl.program_id(0)
    d = tl.program_id(1) * STEP + tl.arange(0, STEP)
    distance = d - (Sq - 1)
    # The multiple of KEYS at or below a distance: windows of that shift, and of ROWS // KEYS more above, hold it.
    behind = tl.cdiv(Sq, KEYS)
    nearest = (distance + behind * KEYS) // KEYS - behind
    total = tl.zeros([PARTS, STEP], tl.float32)
    for further in range(0, ROWS // KEYS + 1):
        step = nearest + further
        line = tl.where(step < 0, -2 * step - 1, 2 * step)
        place = distance - step * KEYS + ROWS - 1
        held = (d < length) & (line < lines) & (place >= 0)
        for first in range(0, parts, PARTS):
            part = (first + tl.arange(0, PARTS))[:, None]
            window = ((line * parts)[None, :] + part).to(tl.int64) * planes + plane
            source = windows_ptr + window * (ROWS + KEYS) + place[None, :]
            total += tl.load(source, mask=held[None, :] & (part < parts), other=0.0)
    target = target_ptr + plane.to(tl.int64) * length + d
    tl.store(target, tl.sum(total, 0).to(target_ptr.dtype.element_ty), mask=d < length)

'''
#: Programs that a kernel of few blocks is split into, several for each multiprocessor of the largest devices.
_PROGRAMS: Final = 512
#: The same for diagonals, which are not all of the same length.
_PROGRAMS_OF_DIAGONALS: Final = 1024
#: Partial sums that one step of a sum adds, and how many sums stand beside each other.
_TURNS, _STEP = 16, 128
_SCRATCH: Final = "{0}_grad = torch.empty(({1}), dtype=torch.float32, device=q.device)"
_TOTAL: Final = "{0}_total = torch.empty({0}.shape, dtype={0}.dtype, device=q.device)"
_TABLE: Final = """\
{0}_programs = -(-rows // {1}) * -(-keys // {2}) * {0}.shape[0] * {0}.shape[1]
{0}_parts = max(1, min(batch * heads // ({0}.shape[0] * {0}.shape[1]), {3} // {0}_programs))
{0}_total = torch.empty({0}.shape, dtype={0}.dtype, device=q.device)
{0}_grad = {0}_total
if {0}_parts > 1:
    {0}_grad = torch.empty(({0}_parts, *{0}.shape), dtype=torch.float32, device=q.device)"""
_BAND: Final = """\
{0}_lines = max(2 * -(-keys // {2}) - 1, 2 * (-(-rows // {1}) - 1) * {4})
{0}_planes = {0}.shape[0] * {0}.shape[1]
{0}_programs = {0}_lines * {0}_planes
{0}_parts = max(1, min(batch * heads // {0}_planes, {3} // {0}_programs))
{0}_total = torch.empty({0}.shape, dtype={0}.dtype, device=q.device)
{0}_grad = torch.empty(({0}_programs * {0}_parts, {5}), dtype=torch.float32, device=q.device)"""
_ADD_VECTORS: Final = """\
sums_kernel[({0}.shape[0] * {0}.shape[1]{1},)](
    {0}_grad, {0}_total, batch, heads, {2}, {0}.shape[0], {0}.shape[1],
    ALONG={3}, TURNS={4}, STEP={5},
)"""
_ADD_PARTS: Final = """\
if {0}_parts > 1:
    sums_kernel[(-(-{0}_total.numel() // {2}),)](
        {0}_grad, {0}_total, {0}_parts, 1, {0}_total.numel(), 1, 1, ALONG=False, TURNS={1}, STEP={2},
    )"""
_ADD_WINDOWS: Final = """\
windows_kernel[({0}_planes, -(-{0}.shape[3] // {4}))](
    {0}_grad, {0}_total, rows, {0}.shape[3], {0}_planes, {0}_parts, {0}_lines,
    ROWS={1}, KEYS={2}, PARTS={3}, STEP={4},
)"""


@dataclass(frozen=True, slots=True)
class Total:
    """The host's part in one gradient; ``blocks`` are those of its own kernel, ``rows`` the rows of a block of dq's."""

    flow: Flow
    blocks: Config
    rows: int

    @property
    def kernels(self) -> tuple[str, ...]:
        """The kernels that add up what the others write."""
        if self.flow.side == "band":
            return (WINDOWS,)
        return () if self._whole else (SUMS,)

    @property
    def result(self) -> str:
        """The variable that holds the gradient in the end."""
        return f"{self.flow.name}_{'grad' if self._whole else 'total'}"

    @property
    def allocate(self) -> str:
        """The launcher's lines that allocate it, and the scratch for its parts."""
        name, blocks = self.flow.name, self.blocks
        if self.flow.side == "table":
            return _TABLE.format(name, blocks.block_m, blocks.block_n, _PROGRAMS)
        if self.flow.side == "band":
            further = (blocks.block_m // blocks.block_n, blocks.block_m + blocks.block_n)
            return _BAND.format(name, blocks.block_m, blocks.block_n, _PROGRAMS_OF_DIAGONALS, *further)
        if self._whole:
            return f"{name}_grad = torch.empty({name}.shape, dtype={name}.dtype, device=q.device)"
        return f"{_SCRATCH.format(name, f'batch, heads, {self._length}')}\n{_TOTAL.format(name)}"

    @property
    def launch(self) -> str:
        """The launcher's lines that add the parts up."""
        name, blocks = self.flow.name, self.blocks
        if self._whole:
            return ""
        if self.flow.side == "table":
            return _ADD_PARTS.format(name, _TURNS, _STEP)
        if self.flow.side == "band":
            return _ADD_WINDOWS.format(name, blocks.block_m, blocks.block_n, _TURNS, _STEP)
        along = self.flow.sums_rows
        pieces = "" if along else f" * -(-{self._length} // {_STEP})"
        return _ADD_VECTORS.format(name, pieces, self._length, along, _TURNS, _STEP)

    @property
    def _length(self) -> str:
        if self.flow.side == "keys":
            return "keys"
        return f"-(-rows // {self.rows})" if self.flow.sums_rows else "rows"

    @property
    def _whole(self) -> bool:
        """Whether the kernel that goes through the keys or rows writes the gradient itself."""
        vector = self.flow.side in ("rows", "keys") and not self.flow.sums_rows
        return vector and self.flow.how.dims[:2] == "bh"
