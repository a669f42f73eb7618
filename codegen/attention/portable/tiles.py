"""How a generated attention kernel reads blocks of keys and values: by pointers, or by tensor descriptors.

Pointers are one 64-bit address per block plus 32-bit offsets that no loop changes (64-bit ones where the strides are
huge). Descriptors leave addresses and tails to the tensor memory accelerator (TMA); tensors that it can't read go by
pointers in the same kernel.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

_POINTERS: Final = """\
k_base = k_ptr + b_wide * k_stride_b + g_wide * k_stride_h
k_tile = n[None, :] * k_stride_j + d[:, None] * k_stride_d
v_base = v_ptr + b_wide * v_stride_b + g_wide * v_stride_h
v_tile = n[:, None] * v_stride_j + e[None, :] * v_stride_e"""
_DESCRIPTORS: Final = "k_base, k_tile, v_base, v_tile = k_ptr, 0, v_ptr, 0"
_LOAD: Final = """\
{0}_block = {0}_base + tl.cast(start, tl.int64) * {0}_stride_j
if BOUNDED and not EVEN:
    {0} = tl.load({0}_block + {0}_tile, mask={1}, other=0.0)
else:
    {0} = tl.load({0}_block + {0}_tile{2})"""
_LOAD_DESCRIBED: Final = {
    "k": "k = tl.reshape(k_base.load([b, g, start, 0]), [BLOCK_N, BLOCK_D]).T",
    "v": "v = tl.reshape(v_base.load([b, g, start, 0]), [BLOCK_N, BLOCK_E])",
}
#: An offset within a block is a sum of two products; with each below this it fits 32 bits.
_FAR: Final = "2**30"
_DESCRIBE: Final = """\
tma = all(describable(x) for x in (k, v))
k_source = TensorDescriptor.from_tensor(k, [1, 1, {rows}, {width_k}]) if tma else k
v_source = TensorDescriptor.from_tensor(v, [1, 1, {rows}, {width_v}]) if tma else v"""
IMPORT: Final = "from triton.tools.tensor_descriptor import TensorDescriptor"
DESCRIBABLE: Final = '''
def describable(x: torch.Tensor) -> bool:
    """Whether TMA can read ``x``: dense rows, and everything else in steps of 16 bytes."""
    *steps, last = x.stride()
    # A power of two divides all of them where it divides their bits taken together.
    bits = x.data_ptr() | (steps[0] | steps[1] | steps[2]) * x.element_size()
    return last == 1 and min(steps) > 0 and bits % 16 == 0

'''


@dataclass(frozen=True, slots=True)
class Tiles:
    """The text of the loads of keys and values.

    Attributes:
        described: whether they go by tensor descriptors where they can.
        k_inside: the condition on the head dimension, where that is padded.
        v_inside: the same for values.
    """

    described: bool
    k_inside: str
    v_inside: str

    @property
    def constants(self) -> tuple[str, ...]:
        """The compile-time constants that only these loads need of a block update."""
        return ("BLOCK_D", "BLOCK_E", "TMA") if self.described else ()

    @property
    def attend_names(self) -> tuple[str, ...]:
        """What a block update needs to read them."""
        padding = (("d",) if self.k_inside else ()) + (("e",) if self.v_inside else ())
        place = ("b", "g") if self.described else ()
        return ("k_base", "k_tile", "v_base", "v_tile", "k_stride_j", "v_stride_j", *place, *padding)

    @property
    def bases(self) -> str:
        """The lines before the loops."""
        return self._either(_DESCRIPTORS, _POINTERS)

    def load(self, name: str) -> str:
        """The lines that read one block of ``"k"`` or ``"v"``."""
        inside = self.k_inside if name == "k" else self.v_inside
        key = "j < Sk" if name == "k" else "(start + n)[:, None] < Sk"
        bounded = f"({key}) & ({inside})" if inside else key
        by_pointer = _LOAD.format(name, bounded, f", mask={inside}, other=0.0" if inside else "")
        return self._either(_LOAD_DESCRIBED[name], by_pointer)

    def _either(self, described: str, by_pointer: str) -> str:
        if not self.described:
            return by_pointer
        return f"if TMA:\n{_indented(described)}\nelse:\n{_indented(by_pointer)}"

    def describe(self, rows: int, width_k: int, width_v: int) -> str:
        """The launcher's lines that build the descriptors of blocks of these sizes."""
        return _DESCRIBE.format(rows=rows, width_k=width_k, width_v=width_v) if self.described else ""

    @property
    def arguments(self) -> tuple[str, str]:
        """What the launcher passes as ``k_ptr`` and ``v_ptr``."""
        return ("k_source", "v_source") if self.described else ("k", "v")


def wide(reaches: Iterable[tuple[int, str]]) -> str:
    """The launcher's test for strides too long for 32-bit offsets; a reach is a number of steps and their stride."""
    listed = "\n".join(f"    {steps} * {stride}," for steps, stride in reaches)
    return f"reaches = (\n{listed}\n)\nwide = max(reaches) >= {_FAR}"


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
