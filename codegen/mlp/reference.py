"""The meaning of the canonical operators of feed-forward layers, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from fxopt.ir.operators import define_meaning

#: The activations of a gated linear unit by name.
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
    if activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"{activation!r} is not an activation of a gated linear unit; they are {known}")
    return ACTIVATIONS[activation](gate) * up


define_meaning("glu", glu)
