"""One way to run a site."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Final

import torch
from torch import Tensor

from fxopt.codegen.attention.machine import Shortfall

#: The operator that draws a seed, and its positional arguments: one of 63 bits.
DRAW_SEED: Final = torch.ops.aten.randint.low
SEED_RANGE: Final = (0, 2**63 - 1, [1])


def seed_options(device: torch.device) -> dict[str, Any]:
    """The keyword arguments of `DRAW_SEED`."""
    return {"dtype": torch.int64, "device": device}


@dataclass(frozen=True)
class Candidate:
    """One way to run a site: a call of ``target`` on the site's operands followed by ``extra``.

    ``family`` is what the option ``lower`` names; ``first`` tells that the result is the first of several outputs.
    ``arguments``, where given, stand in place of the site's operands: nodes and constants. ``seeded`` tells that a seed
    follows ``extra``, drawn just before the call by PyTorch's generator of the device: replays of a program, and its
    recomputation in a backward, draw or keep it like any random tensor.
    """

    name: str
    family: str
    target: Callable[..., Any]
    extra: tuple[Any, ...] = ()
    first: bool = False
    arguments: tuple[Any, ...] | None = None
    seeded: bool = False

    def __call__(self, *operands: Any) -> Tensor:
        """Run the site on real operands."""
        result: Any = self.target(*operands, *self.extra, *self.seeds(operands[0].device))
        out: Tensor = result[0] if self.first else result
        return out

    def seeds(self, device: torch.device) -> tuple[Tensor, ...]:
        """A new seed on ``device``, if the candidate takes one."""
        return (DRAW_SEED(*SEED_RANGE, **seed_options(device)),) if self.seeded else ()


def triton_objection(operands: tuple[Tensor, ...], widths: tuple[object, ...]) -> str | None:
    """Why no generated kernel can run on ``operands`` whatever it computes; ``widths`` are their head dimensions."""
    device = operands[0].device.type
    if device != "cuda":
        return f"Triton kernels run on CUDA devices, not on {device}"
    if find_spec("triton") is None:
        return Shortfall("triton is not installed")
    if not all(isinstance(width, int) for width in widths):
        return "the head dimension is dynamic"
    if len({x.dtype for x in operands}) > 1:
        return f"operands of several dtypes: {', '.join(str(x.dtype) for x in operands)}"
    return None
