"""The meaning of the canonical operators of feed-forward layers, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from fxopt.ir.operators import define_meaning

#: The activations of feed-forward layers by name.
ACTIVATIONS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
    "sigmoid": torch.sigmoid,
}


def glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """A gated linear unit without its linears: ``activation(gate) * up``.

    Args:
        gate: ``[..., N]``.
        up: ``[..., N]``.
        activation: a name in `ACTIVATIONS`.

    Returns:
        ``[..., N]`` in the dtype that the two promote to.

    Raises:
        ValueError: ``activation`` is not such a name.
    """
    return _activation(activation)(gate) * up


def mlp(
    x: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    """A feed-forward block: ``activation(x·upᵀ + up_bias)·downᵀ + down_bias + residual``.

    Args:
        x: ``[..., C]``.
        up: ``[H, C]``.
        up_bias: ``[H]`` or ``None``.
        down: ``[D, H]``.
        down_bias: ``[D]`` or ``None``.
        residual: ``[..., D]``, added to the result, or ``None``.
        activation: a name in `ACTIVATIONS`.

    Returns:
        ``[..., D]`` in the dtype of the operands.

    Raises:
        ValueError: ``activation`` is not such a name.
    """
    hidden = _activation(activation)(functional.linear(x, up, up_bias))
    out = functional.linear(hidden, down, down_bias)
    return out if residual is None else residual + out


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    if name not in ACTIVATIONS:
        raise ValueError(f"{name!r} is not an activation of a feed-forward layer; they are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


define_meaning("glu", glu)
define_meaning("mlp", mlp)
