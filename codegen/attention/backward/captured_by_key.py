"""How the kernel that keeps a block of keys reads a captured tensor: once per head where it can, else row by row.

Bands are read from their phases (`fxopt.codegen.attention.portable.phases`), sixteen bytes at a time down the keys.
"""

from __future__ import annotations

from dataclasses import dataclass

from fxopt.codegen.attention.captured import CapturedTensor
from fxopt.codegen.attention.portable.phases import PhasedBand


@dataclass(frozen=True, slots=True)
class CapturedByKey:
    """A captured tensor inside that kernel, where keys run down and rows across a block."""

    tensor: CapturedTensor

    @property
    def in_loop(self) -> bool:
        """Whether it varies with the row and is read block by block."""
        return "i" in self.tensor.axes

    @property
    def attend_names(self) -> tuple[str, ...]:
        """What the update by a block of rows needs of it."""
        name = self.tensor.name
        return (f"{name}_base", f"{name}_tile", f"{name}_stride_i") if self.in_loop else (name,)

    @property
    def base(self) -> str:
        """The lines before the loop over rows: its address, or its value where that is the same for all rows."""
        name = self.tensor.name
        factors = {"b": "b_wide", "h": "h_wide", "p": f"(b_wide % {name}_period)"}
        terms = [f"{name}_ptr"]
        for letter, axis in zip(self.tensor.capture.dims[:2], "bh", strict=True):
            if letter != "-":
                terms.append(f"{factors[letter]} * {name}_stride_{axis}")
        keys = "j" in self.tensor.axes
        if not self.in_loop:
            terms += [f"j.to(tl.int64) * {name}_stride_j"] * keys
            return f"{name} = {self._load(' + '.join(terms))}"
        terms += [f"first.to(tl.int64) * {name}_stride_j"] * keys
        column = f"(j - first).to(m.dtype) * {name}_stride_j + " if keys else ""
        return f"{name}_base = {' + '.join(terms)}\n{name}_tile = {column}m[None, :] * {name}_stride_i"

    @property
    def load_in_loop(self) -> str:
        """The lines that read one block; what lies beyond the end is zero, and masked later."""
        name = self.tensor.name
        return "\n".join((
            f"{name}_block = {name}_base + tl.cast(start, tl.int64) * {name}_stride_i",
            "if BOUNDED and not EVEN:",
            f"    {name} = {self._load(f'{name}_block + {name}_tile', ', mask=i < Sq, other=0')}",
            "else:",
            f"    {name} = {self._load(f'{name}_block + {name}_tile')}",
        ))  # fmt: skip

    def _load(self, address: str, mask: str = "") -> str:
        return f"tl.load({address}{mask}){'.to(tl.float32)' if self.tensor.capture.kind == 'float' else ''}"


@dataclass(frozen=True, slots=True)
class BandByKey(CapturedByKey):
    """A captured band, given by its phases, inside that kernel."""

    @property
    def in_loop(self) -> bool:
        """Every block of rows reads other distances."""
        return True

    @property
    def attend_names(self) -> tuple[str, ...]:
        """What the update by a block of rows needs of it."""
        return (f"{self.tensor.name}_base", f"{self.tensor.name}_tile")

    @property
    def base(self) -> str:
        """The lines before the loop: its address for the head, and where the keys of a block begin."""
        name, rest = self.tensor.name, f"{self.tensor.name}_rest"
        # Keys beyond the end read on, where the phases hold zeros: clamped ones would not follow one another.
        tile = f"({rest} % 8) * {name}_stride_p + {rest} // 8 * 8 + columns.to(m.dtype)"
        return "\n".join((
            f"{name}_base = {self.tensor.head_address()} - BLOCK_M",
            # Of a first block of rows, and a block further on, where no remainder is negative.
            f"{rest} = (Sq - 1 + BLOCK_M - m)[None, :]",
            f"{name}_tile = {tile}",
        ))  # fmt: skip

    @property
    def load_in_loop(self) -> str:
        """The lines that read one block; rows beyond the end may lie before the first distance."""
        name = self.tensor.name
        return "\n".join((
            f"{name}_block = {name}_base - tl.cast(start, tl.int64)",
            "if BOUNDED and not EVEN:",
            f"    {name} = {self._load(f'{name}_block + {name}_tile', ', mask=i < Sq, other=0')}",
            "else:",
            f"    {name} = {self._load(f'{name}_block + {name}_tile')}",
        ))  # fmt: skip


def captured_by_key(tensor: CapturedTensor) -> CapturedByKey:
    """How that kernel reads a captured tensor."""
    return BandByKey(tensor) if isinstance(tensor, PhasedBand) else CapturedByKey(tensor)
