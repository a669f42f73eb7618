"""What the generated kernel of a narrow feed-forward block depends on besides its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from fxopt.codegen.mlp.reference import ACTIVATIONS
from fxopt.ir.nodes import same_shape

#: The widest rows that a program holds, before and after, besides a part of the hidden elements.
WIDEST: Final = 192
#: Products come in pieces of so many elements.
PIECE: Final = 16
_SERVED: Final = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Problem:
    """``activation(x·upᵀ + up_bias)·downᵀ + down_bias + residual`` for rows of ``width`` elements.

    Attributes:
        width: ``C``, the elements of a row of ``x``.
        hidden: ``H``, those between the two products.
        out: ``D``, those of a row of the result.
        activation: a name in `ACTIVATIONS`.
        dtype: of all operands and the result.
        up_bias: whether the first product has a bias.
        down_bias: whether the second one has.
        residual: whether something is added to the result.
    """

    width: int
    hidden: int
    out: int
    activation: str
    dtype: torch.dtype
    up_bias: bool
    down_bias: bool
    residual: bool


def problem_of(
    x: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> Problem:
    """The problem of these operands."""
    given = (up_bias is not None, down_bias is not None, residual is not None)
    return Problem(x.shape[-1], up.shape[0], down.shape[0], activation, x.dtype, *given)


def objection(problem: Problem) -> str | None:
    """Why no kernel can be generated, as a sentence, or ``None`` when one can."""
    sizes = {"input": problem.width, "hidden": problem.hidden, "output": problem.out}
    dynamic = [name for name, size in sizes.items() if not isinstance(size, int)]
    if dynamic:
        return f"the {dynamic[0]} width is dynamic"
    uneven = [f"the {name} width {size}" for name, size in sizes.items() if size % PIECE or not size]
    if uneven:
        return f"{uneven[0]} is no multiple of {PIECE}"
    widest = max(problem.width, problem.out)
    if widest > WIDEST:
        return f"rows of {widest} elements; a program holds rows of up to {WIDEST}"
    if problem.activation not in ACTIVATIONS:
        return f"{problem.activation!r} is none of {', '.join(ACTIVATIONS)}"
    if problem.dtype not in _SERVED:
        return f"{problem.dtype} operands; products of half precision are what pays, of bfloat16 and float16"
    return None


def operands_objection(
    x: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    residual: Tensor | None,
) -> str | None:
    """Why these operands don't provably belong together, as a sentence, or ``None`` if they do; adds no guard."""
    given = [operand for operand in (x, up, up_bias, down, down_bias, residual) if operand is not None]
    dtypes = dict.fromkeys(operand.dtype for operand in given)
    if len(dtypes) > 1:
        return f"operands of several dtypes: {', '.join(map(str, dtypes))}"
    if up.dim() != 2 or down.dim() != 2:
        return f"weights of {up.dim()} and {down.dim()} axes, not two"
    if not same_shape((up.shape[1], down.shape[1]), (x.shape[-1], up.shape[0])):
        return f"x {tuple(x.shape)}, up {tuple(up.shape)} and down {tuple(down.shape)} don't fit one another"
    for name, bias, size in (("up", up_bias, up.shape[0]), ("down", down_bias, down.shape[0])):
        if bias is not None and not same_shape(tuple(bias.shape), (size,)):
            return f"the bias of {name} has the shape {tuple(bias.shape)}, not ({size},)"
    if residual is not None and not same_shape(tuple(residual.shape), (*x.shape[:-1], down.shape[0])):
        return f"the residual has the shape {tuple(residual.shape)}, not that of the result"
    return None
