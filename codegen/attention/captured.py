"""How a generated attention kernel reads a captured tensor: once where it can, else one vector or tile per block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fxopt.ir.attention import NAME_OF, AttentionSpec, Capture

_AXES: Final = {"b": "b_wide", "h": "h_wide", "p": "b_wide % {name}_period"}
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
        terms = [f"{name}_ptr"]
        for letter, axis in zip(self.capture.dims[:2], "bh", strict=True):
            if letter != "-":
                factor = _AXES[letter].format(name=name)
                factor = f"({factor})" if "%" in factor else factor
                terms.append(f"{factor} * {name}_stride_{axis}")
        rows = "i" in self.axes
        if not self.in_loop:
            terms += [f"i.to(tl.int64) * {name}_stride_i"] * rows
            return f"{name} = {self._load(' + '.join(terms))}"
        if self.capture.is_band:
            # Within a block the offsets are as small as rows and keys; row and key at its start give the base.
            terms.append(f"(Sq - 1 - first).to(tl.int64) * {self._along}")
            tile = f"(n[None, :] - (i - first).to(n.dtype)) * {self._along}"
            return f"{name}_base = {' + '.join(terms)}\n{name}_tile = {tile}"
        terms += [f"first.to(tl.int64) * {name}_stride_i"] * rows
        row = f"(i - first).to(n.dtype) * {name}_stride_i + " if rows else ""
        return f"{name}_base = {' + '.join(terms)}\n{name}_tile = {row}n[None, :] * {self._along}"

    @property
    def load_in_loop(self) -> str:
        """The lines that read one block; what lies beyond the end is zero, and masked later."""
        name = self.name
        return "\n".join((
            f"{name}_block = {name}_base + tl.cast(start, tl.int64) * {self._along}",
            "if BOUNDED and not EVEN:",
            f"    {name} = {self._load(f'{name}_block + {name}_tile', ', mask=j < Sk, other=0')}",
            "else:",
            f"    {name} = {self._load(f'{name}_block + {name}_tile')}",
        ))  # fmt: skip

    def reaches(self, rows: int, keys: int) -> list[tuple[int, str]]:
        """How far the axes of a block of it reach: the extent, and the stride as the launcher reads it."""
        extents = {"i": (rows, 2), "j": (keys, 3), "d": (rows + keys, 3)} if self.in_loop else {}
        return [(extents[a][0], f"{self.name}.stride({extents[a][1]})") for a in self.axes if a in extents]

    def _load(self, address: str, mask: str = "") -> str:
        return f"tl.load({address}{mask}){'.to(tl.float32)' if self.capture.kind == 'float' else ''}"

    @property
    def description(self) -> str:
        """One line of the header."""
        shape = ", ".join(_DIMENSION[letter] for letter in self.capture.dims)
        read = ", read at b mod P" * bool(self.period) + ", read at j - i + (Sq - 1)" * self.capture.is_band
        return f"    {self.name} is [{shape}] {NAME_OF[self.capture.dtype]}{read}"


def _position(axis: str) -> int:
    """Which axis of a captured tensor belongs to an index."""
    return _AXIS.index("j" if axis == "d" else axis)


def captured_tensors(spec: AttentionSpec) -> tuple[CapturedTensor, ...]:
    """The captured tensors of ``spec`` in order."""
    return tuple(CapturedTensor(index, capture) for index, capture in enumerate(spec.captures))
