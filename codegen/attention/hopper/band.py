"""Bands in a stream of blocks: a thread holds pairs of neighbouring columns, and reads a pair of the band at once.

As in `fxopt.codegen.attention.portable.phases` copies of the band make that possible for every row; two are enough:

    phases[p, x] = band[x + p],    row i reads phases[r mod 2, start + 2·⌊r / 2⌋ + n],    r = Sq − 1 − i.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

from fxopt.codegen.attention.portable.phases import PhasedBand

BAND: Final = '''
@gluon.jit
def band(phases, stride, start, i, Sq, like, BLOCK_N: gl.constexpr):
    """What a band holds for the rows ``i`` and the keys from ``start`` on, as ``like``."""
    PARTS: gl.constexpr = by_thread(like, BLOCK_N).type.layout
    rest = gl.convert_layout(gl.reshape(Sq - 1 - i, [64]), gl.SliceLayout(1, gl.SliceLayout(2, PARTS)))
    row = (rest % 2) * stride + rest // 2 * 2
    n = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, PARTS)))
    eights = 8 * gl.arange(0, BLOCK_N // 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, PARTS)))
    pairs = phases + start + (row[:, None, None] + n[None, None, :])
    values = gl.load(pairs + eights[None, :, None])
    return gl.convert_layout(gl.reshape(values, [64, BLOCK_N]), like.type.layout).to(gl.float32)

'''


@dataclass(frozen=True, slots=True)
class PairedBand(PhasedBand):
    """A captured band inside a kernel that is given two phases of it instead."""

    count: ClassVar[int] = 2

    @property
    def attend_names(self) -> tuple[str, ...]:
        """What a block update needs of it."""
        return (f"{self.name}_base", f"{self.name}_stride_p")

    @property
    def base(self) -> str:
        """The line before the loop: its address for the head."""
        return f"{self.name}_base = {self.head_address()}"

    @property
    def load_in_loop(self) -> str:
        """The line that reads one block, which may lie beyond the last key, and is masked there later."""
        return f"{self.name} = band({self.name}_base, {self.name}_stride_p, start, i, Sq, s, BLOCK_N)"
