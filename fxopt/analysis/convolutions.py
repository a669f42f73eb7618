"""Reading convolutions: the window and how it moves, whichever operator says it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.fx import Node

from fxopt.ir.nodes import arguments, is_tensor, scalar, shape

aten = torch.ops.aten

#: The operators that `read_convolution` reads; ``convolution`` is all of them, and transposed ones too.
CONVOLUTIONS: Final = (
    aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding, aten.conv3d.default,
    aten.conv3d.padding, aten.convolution.default,
)  # fmt: skip


@dataclass(frozen=True)
class Convolution:
    """A convolution over ``len(kernel)`` spatial axes, one number an axis in each tuple.

    Attributes:
        x: ``[B, C, …]``, or ``[C, …]`` without a batch.
        weight: ``[O, C / groups, *kernel]``.
        bias: ``[O]``, or ``None``.
    """

    x: Node
    weight: Node
    bias: Node | None
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def cuts_patches(self) -> bool:
        """Whether the window moves by its own size, more than one element, along at least one axis."""
        return any(size == step > 1 for size, step in zip(self.kernel, self.stride, strict=True))


def read_convolution(node: Node) -> Convolution | None:
    """The convolution that ``node`` computes; ``None`` for anything else.

    A transposed one, ``padding="same"`` and a window of symbolic size are not read.
    """
    if node.op != "call_function" or node.target not in CONVOLUTIONS:
        return None
    given = arguments(node)
    x, weight = given["input"], given["weight"]
    if given.get("transposed") or not is_tensor(x) or not is_tensor(weight):
        return None
    axes = len(shape(weight)) - 2
    kernel, stride = _numbers(list(shape(weight)[2:]), axes), _numbers(given["stride"], axes)
    padding = _numbers(0 if given["padding"] == "valid" else given["padding"], axes)
    dilation, groups = _numbers(given["dilation"], axes), scalar(given["groups"])
    if kernel is None or stride is None or padding is None or dilation is None or not isinstance(groups, int):
        return None
    return Convolution(x, weight, given["bias"], kernel, stride, padding, dilation, groups)


def _numbers(value: Any, count: int) -> tuple[int, ...] | None:
    """One integer an axis, a single one standing for all; ``None`` for what is no integer (``"same"``, a symbol)."""
    values = [scalar(v) for v in (value if isinstance(value, list | tuple) else [value])]
    values = values * count if len(values) == 1 else values
    return tuple(v for v in values if isinstance(v, int)) if all(isinstance(v, int) for v in values) else None
