"""How a generated attention kernel reads a captured tensor: once where it can, else one vector or tile per block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fxopt.ir.attention import NAME_OF, AttentionSpec, Capture

_DIMENSION: Final = {"b": "B", "h": "H", "i": "Sq", "j": "Sk", "-": "1", "p": "P", "d": "Sq + Sk - 1"}
_AXIS: Final = "bhij"


@dataclass(frozen=True, slots=True)
class CapturedTensor:
    """The ``index``-th captured tensor inside a kernel, where it is called ``c<index>``."""

    index: int
    capture: Capture

    @property
    def name(self) -> str:
        """Its name in expressions."""
        return f"c{self.index}"

    @property
    def argument(self) -> str:
        """What the launcher passes for it."""
        return self.name

    @property
    def parameter(self) -> str:
        """What the kernel calls that."""
        return f"{self.name}_ptr"

    @property
    def period(self) -> tuple[str, ...]:
        """The kernel argument that holds its size along a periodic batch."""
        return (f"{self.name}_period",) if self.capture.dims[0] == "p" else ()

    @property
    def axes(self) -> tuple[str, ...]:
        """The indices it varies with, ``b`` for a periodic batch; ``d`` for the distance of key and row."""
        named = zip(_AXIS, self.capture.dims, strict=True)
        return tuple("d" if letter == "d" else axis for axis, letter in named if letter != "-")

    @property
    def strides(self) -> tuple[str, ...]:
        """The kernel arguments that hold its strides."""
        return tuple(f"{self.name}_stride_{axis}" for axis in self.axes)

    @property
    def stride_values(self) -> tuple[str, ...]:
        """The strides as the launcher reads them off the tensor."""
        return tuple(f"{self.name}.stride({_position(axis)})" for axis in self.axes)

    @property
    def in_loop(self) -> bool:
        """Whether it varies with the key and is read block by block."""
        return "j" in self.axes or self.capture.is_band

    @property
    def _along(self) -> str:
        """The stride from key to key."""
        return f"{self.name}_stride_{self.axes[-1]}"

    @property
    def attend_names(self) -> tuple[str, ...]:
        """What a block update needs of it."""
        if not self.in_loop:
            return (self.name,)
        return (f"{self.name}_base", f"{self.name}_tile", self._along)

    @property
    def base(self) -> str:
        """The lines before the loop: its address, or its value where that is the same for all keys."""
        name = self.name
        if self.capture.is_band:
            # Within a block the offsets are as small as rows and keys; row and key at its start give the base.
            base = f"{self.head_address()} + (Sq - 1 - first).to(tl.int64) * {self._along}"
            return f"{name}_base = {base}\n{name}_tile = (n[None, :] - (i - first).to(n.dtype)) * {self._along}"
        if not self.in_loop or "i" not in self.axes:
            return self.gathered_base
        base = f"{self.head_address()} + first.to(tl.int64) * {name}_stride_i"
        row = f"(i - first).to(n.dtype) * {name}_stride_i"
        return f"{name}_base = {base}\n{name}_tile = {row} + n[None, :] * {self._along}"

    @property
    def gathered_base(self) -> str:
        """The same where the rows ``i`` do not follow one another, and may belong to several heads ``h``."""
        name = self.name
        if self.capture.is_band:
            base = f"{self.head_address()} + (Sq - 1 - i).to(tl.int64) * {self._along}"
            return f"{name}_base = {base}\n{name}_tile = n[None, :] * {self._along}"
        rows = f" + i.to(tl.int64) * {name}_stride_i" if "i" in self.axes else ""
        if not self.in_loop:
            return f"{name} = {self.load(self.head_address() + rows)}"
        return f"{name}_base = {self.head_address()}{rows}\n{name}_tile = n[None, :] * {self._along}"

    @property
    def load_keys(self) -> str:
        """The line that reads the keys ``j`` of one that varies with no row; what lies beyond the end is zero."""
        address = f"{self.head_address()} + j.to(tl.int64) * {self.name}_stride_j"
        return f"{self.name} = {self.load(address, ', mask=j < Sk, other=0')}"

    @property
    def load_in_loop(self) -> str:
        """The lines that read one block; what lies beyond the end is zero, and masked later."""
        name = self.name
        return "\n".join((
            f"{name}_block = {name}_base + tl.cast(start, tl.int64) * {self._along}",
            "if BOUNDED and not EVEN:",
            f"    {name} = {self.load(f'{name}_block + {name}_tile', ', mask=j < Sk, other=0')}",
            "else:",
            f"    {name} = {self.load(f'{name}_block + {name}_tile')}",
        ))  # fmt: skip

    def reaches(self, rows: int, keys: int) -> list[tuple[int, str]]:
        """How far the axes of a block of it reach: the extent, and the stride as the launcher reads it."""
        extents = {"i": (rows, 2), "j": (keys, 3), "d": (rows + keys, 3)} if self.in_loop else {}
        return [(extents[a][0], f"{self.name}.stride({extents[a][1]})") for a in self.axes if a in extents]

    def head_address(self, periodic: str = "b_wide") -> str:
        """The address of what it holds for batch entry ``b_wide`` (``periodic`` where it is so) and head ``h_wide``."""
        terms = [f"{self.name}_ptr"]
        factors = {"b": "b_wide", "h": "h_wide", "p": f"({periodic} % {self.name}_period)"}
        for letter, axis in zip(self.capture.dims[:2], "bh", strict=True):
            if letter != "-":
                terms.append(f"{factors[letter]} * {self.name}_stride_{axis}")
        return " + ".join(terms)

    def load(self, address: str, mask: str = "") -> str:
        """The value at ``address``, real ones in float32; ``mask`` is the rest of the arguments of the load."""
        return f"tl.load({address}{mask}){'.to(tl.float32)' if self.capture.kind == 'float' else ''}"

    @property
    def description(self) -> str:
        """One line of the header."""
        shape = ", ".join(_DIMENSION[letter] for letter in self.capture.dims)
        periodic = ", read at b mod P" if self.period else ""
        return f"    {self.name} is [{shape}] {NAME_OF[self.capture.dtype]}{periodic}"


def captured_tensors(spec: AttentionSpec) -> tuple[CapturedTensor, ...]:
    """The captured tensors of ``spec`` in order."""
    return tuple(CapturedTensor(index, capture) for index, capture in enumerate(spec.captures))


def _position(axis: str) -> int:
    """Which axis of a captured tensor belongs to an index."""
    return _AXIS.index("j" if axis == "d" else axis)
