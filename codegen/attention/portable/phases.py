"""Bands read as fast as tiles: a row of a block starts at any element of the band, but vectors of eight must not.

A band holds one value for each distance of key and row, so that row ``i`` of a block reads it from element
``start + r`` on, ``r = Sq − 1 − i``, two bytes at a time. A small kernel before the main one writes eight copies,

    phases[p, x] = band[x + p],    p = 0 … 7,

and row ``i`` reads copy ``r mod 8`` from element ``start + 8·⌊r / 8⌋`` on: sixteen bytes at a time, copied to shared
memory while the block before is computed. The copies stay in the second level of the device's cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

from fxopt.codegen.attention.captured import CapturedTensor, captured_tensors
from fxopt.ir.attention import AttentionSpec

#: Elements that one program of the small kernel copies.
_STEP: Final = 1024
PHASES: Final = '''
@triton.jit(do_not_specialize=["heads", "length"])
def phases_kernel(
    band_ptr,
    phases_ptr,
    band_stride_b,
    band_stride_h,
    band_stride_d,
    heads,
    length,
    width,
    COUNT: tl.constexpr,
    STEP: tl.constexpr,
):
    """One stretch of ``phases[b, h, p, x] = band[b, h, 0, x + p]``; what lies beyond the end is zero."""
    program = tl.program_id(0)
    plane = program // COUNT
    x = tl.program_id(1) * STEP + tl.arange(0, STEP)
    d = x + program % COUNT
    band = band_ptr + (plane // heads).to(tl.int64) * band_stride_b + (plane % heads).to(tl.int64) * band_stride_h
    value = tl.load(band + d.to(tl.int64) * band_stride_d, mask=d < length, other=0)
    tl.store(phases_ptr + program.to(tl.int64) * width + x, value, mask=x < width)

'''
_ALLOCATE: Final = """\
# Rows of whole vectors, which blocks of keys may read beyond the last key.
reach = -(-(rows + keys + {keys}) // 16) * 16
{allocations}"""
_SCRATCH: Final = "{0}_phases = torch.empty(({0}.shape[0], {0}.shape[1], {1}, reach), dtype={0}.dtype, device=q.device)"
_LAUNCH: Final = """\
phases_kernel[({0}.shape[0] * {0}.shape[1] * {2}, -(-reach // {1}))](
    {0},
    {0}_phases,
    {0}.stride(0),
    {0}.stride(1),
    {0}.stride(3),
    {0}.shape[1],
    {0}.shape[3],
    reach,
    COUNT={2},
    STEP={1},
)"""


@dataclass(frozen=True, slots=True)
class PhasedBand(CapturedTensor):
    """A captured band inside a kernel that is given its phases instead, as many as elements are read at once."""

    count: ClassVar[int] = 8

    @property
    def argument(self) -> str:
        """What the launcher passes for it."""
        return f"{self.name}_phases"

    @property
    def strides(self) -> tuple[str, ...]:
        """The kernel arguments that hold the strides of the phases."""
        return tuple(f"{self.name}_stride_{axis}" for axis in (*self._planes, "p"))

    @property
    def stride_values(self) -> tuple[str, ...]:
        """The strides as the launcher reads them off the phases."""
        places = [*("bh".index(axis) for axis in self._planes), 2]
        return tuple(f"{self.argument}.stride({place})" for place in places)

    @property
    def _planes(self) -> tuple[str, ...]:
        return tuple(axis for axis in self.axes if axis != "d")

    @property
    def attend_names(self) -> tuple[str, ...]:
        """What a block update needs of it."""
        return (f"{self.name}_base", f"{self.name}_tile")

    @property
    def base(self) -> str:
        """The lines before the loop: its address for the head, and where the rows of a block begin."""
        name, rest = self.name, f"{self.name}_rest"
        tile = f"({rest} % 8) * {name}_stride_p + {rest} // 8 * 8 + n[None, :]"
        return f"{name}_base = {self.head_address()}\n{rest} = (Sq - 1 - i).to(n.dtype)\n{name}_tile = {tile}"

    @property
    def load_in_loop(self) -> str:
        """The line that reads one block, which may lie beyond the last key, and is masked there later."""
        return f"{self.name} = {self.load(f'{self.name}_base + tl.cast(start, tl.int64) + {self.name}_tile')}"

    def reaches(self, rows: int, keys: int) -> list[tuple[int, str]]:
        """How far the axes of a block of it reach: the phases, each as long as the band."""
        return [(9, f"{self.argument}.stride(2)")]


def phased(spec: AttentionSpec) -> tuple[CapturedTensor, ...]:
    """The captured tensors of ``spec`` in order, bands by their phases."""
    return tuple(PhasedBand(c.index, c.capture) if c.capture.is_band else c for c in captured_tensors(spec))


def allocate(bands: Sequence[PhasedBand], keys: int) -> str:
    """The launcher's lines that allocate the phases, for blocks of ``keys``."""
    allocations = "\n".join(_SCRATCH.format(band.name, band.count) for band in bands)
    return _ALLOCATE.format(keys=keys, allocations=allocations) if bands else ""


def launch(bands: Sequence[PhasedBand]) -> str:
    """The launcher's lines that fill them."""
    return "\n".join(_LAUNCH.format(band.name, _STEP, band.count) for band in bands)
