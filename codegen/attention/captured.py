"""How a generated attention kernel reads a captured tensor: once where it can, else one vector or tile per block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fxopt.ir.attention import NAME_OF, AttentionSpec, Capture

_AXES: Final = {"b": "b_wide", "h": "h_wide", "p": "b_wide % {name}_period"}
_DIMENSION: Final = {"b": "B", "h": "H", "i": "Sq", "j": "Sk", "-": "1", "p": "P"}


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
        """The indices it varies with, ``b`` for a periodic batch."""
        return tuple("bhij"[n] for n, letter in enumerate(self.capture.dims) if letter != "-")

    @property
    def strides(self) -> tuple[str, ...]:
        """The kernel arguments that hold its strides."""
        return tuple(f"{self.name}_stride_{axis}" for axis in self.axes)

    @property
    def stride_values(self) -> tuple[str, ...]:
        """The strides as the launcher reads them off the tensor."""
        return tuple(f"{self.name}.stride({'bhij'.index(axis)})" for axis in self.axes)

    @property
    def in_loop(self) -> bool:
        """Whether it varies with the key and is read block by block."""
        return "j" in self.axes

    @property
    def attend_names(self) -> tuple[str, ...]:
        """What a block update needs of it."""
        return (f"{self.name}_tile", f"{self.name}_stride_j") if self.in_loop else (self.name,)

    @property
    def base(self) -> str:
        """The lines before the loop: its address, and its value where that is the same for all keys."""
        terms = [f"{self.name}_ptr"]
        for letter, axis in zip(self.capture.dims[:2], "bh", strict=True):
            if letter != "-":
                factor = _AXES[letter].format(name=self.name)
                factor = f"({factor})" if "%" in factor else factor
                terms.append(f"{factor} * {self.name}_stride_{axis}")
        if "i" in self.axes:
            terms.append(f"i.to(tl.int64) * {self.name}_stride_i")
        address = " + ".join(terms)
        return f"{self.name}_tile = {address}" if self.in_loop else f"{self.name} = {self._load(address)}"

    @property
    def load_in_loop(self) -> str:
        """The lines that read one block; columns beyond the end repeat the last one."""
        column = f"(step + column[None, :]) * {self.name}_stride_j"
        return f"{self.name} = {self._load(f'{self.name}_tile + {column}')}"

    def _load(self, address: str) -> str:
        return f"tl.load({address}){'.to(tl.float32)' if self.capture.kind == 'float' else ''}"

    @property
    def description(self) -> str:
        """One line of the header."""
        shape = ", ".join(_DIMENSION[letter] for letter in self.capture.dims)
        periodic = ", read at b mod P" if self.period else ""
        return f"    {self.name} is [{shape}] {NAME_OF[self.capture.dtype]}{periodic}"


def captured_tensors(spec: AttentionSpec) -> tuple[CapturedTensor, ...]:
    """The captured tensors of ``spec`` in order."""
    return tuple(CapturedTensor(index, capture) for index, capture in enumerate(spec.captures))
