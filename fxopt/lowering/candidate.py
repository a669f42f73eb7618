"""One way to run a site."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Candidate:
    """One way to run a site: a call of ``target`` on the site's operands followed by ``extra``.

    ``family`` is what the option ``lower`` names; ``first`` tells that the result is the first of several outputs.
    ``arguments``, where given, stand in place of the site's operands: nodes and constants.
    """

    name: str
    family: str
    target: Callable[..., Any]
    extra: tuple[Any, ...] = ()
    first: bool = False
    arguments: tuple[Any, ...] | None = None

    def __call__(self, *operands: Any) -> Tensor:
        """Run the site on real operands."""
        result: Any = self.target(*operands, *self.extra)
        out: Tensor = result[0] if self.first else result
        return out


def triton_objection(operands: tuple[Tensor, ...], widths: tuple[object, ...]) -> str | None:
    """Why no generated kernel can run on ``operands`` whatever it computes; ``widths`` are their head dimensions."""
    device = operands[0].device.type
    if device != "cuda":
        return f"Triton kernels run on CUDA devices, not on {device}"
    if find_spec("triton") is None:
        return "triton is not installed"
    if not all(isinstance(width, int) for width in widths):
        return "the head dimension is dynamic"
    if len({x.dtype for x in operands}) > 1:
        return f"operands of several dtypes: {', '.join(str(x.dtype) for x in operands)}"
    return None
