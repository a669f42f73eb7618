"""What one entry of the spelling matrices is, and the inputs that they share.

Legend: ``B`` batch, ``H`` query heads, ``G`` key/value heads, ``S`` queries, ``T`` keys of another sequence, ``D`` head
dimension, ``E`` head dimension of values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from fxopt.testing import Sizes, draw

Dims = Sizes
Args = tuple[Any, ...]
Program = Callable[..., Any]
Inputs = Callable[[Dims, torch.dtype], Args]
Outcome = Literal["rewritten", "kept", "either"]
Mode = Literal["inference", "training"]

ALL_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """One program around an attention, or around what only looks like one.

    Attributes:
        number: its number in the matrix: ``"1"``…``"36"``, ``"P…"`` further positives, ``"N…"`` near misses.
        name: what is particular about it.
        program: a function of the tensors, or a module class that is made from the sizes.
        inputs: makes the tensors from the sizes and the dtype.
        expected: what must become of its attention sites; ``"either"`` if both are right, as long as the numbers are.
        sites: how many attention sites it has.
        why: for what is kept: a regular expression that the site's reason must match.
        constant: positions of floating arguments that need no gradient.
        modes: in which of the modes it can run.
        dtypes: in which dtypes it can run.
        fit: brings the sizes into the form that the program needs (a square, equal axes, …).
        again: makes other arguments for the same compiled program, whose values must be honoured as well.
    """

    number: str
    name: str
    program: Program
    inputs: Inputs
    expected: Outcome = "rewritten"
    sites: int = 1
    why: str = ""
    constant: tuple[int, ...] = ()
    modes: tuple[Mode, ...] = ("inference", "training")
    dtypes: tuple[torch.dtype, ...] = ALL_DTYPES
    fit: Callable[[Dims], Dims] | None = None
    again: Inputs | None = None

    def build(self, dims: Dims, dtype: torch.dtype, mode: Mode = "inference") -> tuple[nn.Module, Args]:
        """The program as a module in ``mode``, and its arguments, those that need a gradient marked in training."""
        dims = self.fit(dims) if self.fit else dims
        module = self._module(dims, dtype).train(mode == "training")
        return module, self._marked(self.inputs(dims, dtype), mode)

    def others(self, dims: Dims, dtype: torch.dtype, mode: Mode = "inference") -> Args | None:
        """A second set of arguments, if the case has one."""
        dims = self.fit(dims) if self.fit else dims
        return self._marked(self.again(dims, dtype), mode) if self.again else None

    def _module(self, dims: Dims, dtype: torch.dtype) -> nn.Module:
        if isinstance(self.program, type) and issubclass(self.program, nn.Module):
            return self.program(dims).to(dtype)
        return FunctionModule(self.program)

    def _marked(self, args: Args, mode: Mode) -> Args:
        if mode == "training":
            for position, value in enumerate(args):
                if position not in self.constant and isinstance(value, Tensor) and value.dtype.is_floating_point:
                    value.requires_grad_()
        return args


class FunctionModule(nn.Module):
    """A function as a module, so that one test body serves every entry point."""

    def __init__(self, function: Program) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


def plan(*shapes: str) -> Inputs:
    """Inputs given by letters: ``plan("BHSD", "B1ST")``; ``1`` is a broadcast axis."""

    def inputs(dims: Dims, dtype: torch.dtype) -> Args:
        sizes = {**vars(dims), "1": 1}
        return tuple(draw([sizes[x] for x in shape], dtype=dtype, seed=seed) for seed, shape in enumerate(shapes))

    return inputs


def then(first: Inputs, *more: Callable[[Dims, torch.dtype], Any]) -> Inputs:
    """The inputs of ``first`` followed by one more for each of ``more``."""
    return lambda dims, dtype: (*first(dims, dtype), *(make(dims, dtype) for make in more))


def key_t(k: Tensor) -> Tensor:
    """``kᵀ``: the last two axes swapped."""
    return k.transpose(-2, -1)


def scale_of(q: Tensor) -> float:
    """``D**-0.5`` from the queries."""
    scale: float = q.shape[-1] ** -0.5
    return scale


def scores(q: Tensor, k: Tensor) -> Tensor:
    """The scaled dot products ``[…, S, T]``."""
    return (q @ key_t(k)) * scale_of(q)


QKV: Final = plan("BHSD", "BHSD", "BHSD")
CROSS: Final = plan("BHSD", "BHTD", "BHTD")
GROUPED: Final = plan("BHSD", "BGSD", "BGSD")
