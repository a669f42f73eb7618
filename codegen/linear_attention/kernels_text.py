"""One kernel's text: its parameters are those names that its body reads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from fxopt.codegen.linear_attention.operands import Operands
from fxopt.codegen.linear_attention.template import PLACE
from fxopt.codegen.template import fill, listing

_SIZES: Final = ("batch", "heads", "Sq", "Sk", "parts", "part_length", "state_parts", "shares")
_CONSTANTS: Final = (
    "BLOCK_N", "BLOCK_D", "BLOCK_E", "COLUMNS", "GROUP", "SPLIT", "SAVE", "EVEN_D", "EVEN_E", "PRECISION",
)  # fmt: skip
#: Tensors without strides, which are the launcher's own.
_OWN: Final = ("state", "total", "sums")


def text(piece: str, holes: Mapping[str, str]) -> str:
    """A piece of a template with its holes filled, without the last end of line."""
    return fill(piece, holes).rstrip("\n")


@dataclass(frozen=True)
class KernelText:
    """A kernel: its name, the kind of blocks that it is cut into, its text, and its parameters in order."""

    name: str
    kind: str
    text: str
    parameters: tuple[str, ...]

    @classmethod
    def of(
        cls,
        name: str,
        kind: str,
        template: str,
        tensors: Mapping[str, str],
        holes: Mapping[str, str],
        operands: Operands,
    ) -> KernelText:
        """Fill ``template``; ``tensors`` says along which axes each has strides."""
        bases = "\n".join(line for tensor, axes in tensors.items() if (line := _base(tensor, axes)))
        filled = {**holes, "place": PLACE.rstrip(), "bases": bases, "unspecialized": "", "parameters": ""}
        # Pieces hold holes of their own.
        body = fill(template, filled)
        read = set(re.findall(r"\w+", body))
        pointers = [f"{tensor}_ptr" for tensor in dict.fromkeys((*tensors, *_OWN)) if f"{tensor}_ptr" in read]
        strides = [f"{tensor}_stride_{axis}" for tensor, axes in tensors.items() for axis in axes]
        sizes = [size for size in _SIZES if size in read]
        constants = [constant for constant in _CONSTANTS if constant in read]
        parameters = (*pointers, *(stride for stride in strides if stride in read), *sizes, *constants)
        names = ", ".join(f'"{size}"' for size in sizes)
        filled |= {"unspecialized": f"do_not_specialize=[{names}]", "parameters": listing(parameters, annotate=True)}
        return cls(name, kind, fill(template, filled), parameters)

    def arguments(self, values: Mapping[str, str], axes: Mapping[str, str], options: tuple[str, ...]) -> str:
        """What the host passes: ``values`` by parameter, tensors by name, strides by the position of their axis."""
        return "\n".join(
            [*(f"{self._argument(p, values, axes)}," for p in self.parameters), *(f"{o}," for o in options)]
        )

    @staticmethod
    def _argument(parameter: str, values: Mapping[str, str], axes: Mapping[str, str]) -> str:
        tensor, _, axis = parameter.partition("_stride_")
        tensor = tensor.removesuffix("_ptr")
        if axis:
            return f"{values.get(tensor, tensor)}.stride({axes[tensor].index(axis)})"
        value = values.get(tensor, tensor)
        return f"{parameter}={value}" if parameter.isupper() and len(parameter) > 1 else value


def _base(tensor: str, axes: str) -> str:
    if tensor == "sums":
        return "sums = sums_ptr + (b * heads + h) * Sq"
    moved = "".join(f" + {axis} * {tensor}_stride_{axis}" for axis in axes if axis in "bh")
    return f"{tensor} = {tensor}_ptr{moved}" if moved else ""
