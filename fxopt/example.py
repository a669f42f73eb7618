"""The call of a model that it is captured with, and that call once the model was moved."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxopt.errors import CaptureError


def check_args(args: Any) -> None:
    """Raises `CaptureError` when ``args`` is no tuple: one tensor, or a list, is a mistake that torch would take."""
    if not isinstance(args, tuple):
        raise CaptureError(
            f"args must be a tuple of positional arguments, not {type(args).__name__}: write (x,) for one"
        )


def kind_of(model: nn.Module) -> Tensor:
    """An empty tensor on the device, and of the dtype, of the first floating parameter of ``model``, or else buffer."""
    state = chain(model.parameters(), model.buffers())
    first = next((tensor for tensor in state if tensor.is_floating_point()), torch.empty(0))
    return torch.empty(0, dtype=first.dtype, device=first.device)


def moved(arguments: Any, before: Tensor, now: Tensor) -> Any:
    """``arguments`` of a model of the kind ``before``, as one of the kind ``now`` takes them.

    All tensors go to the device; those of the model's own dtype get its new one, others (masks, tokens) keep theirs.
    """

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(now.device, now.dtype if value.dtype == before.dtype else value.dtype)

    same = (before.device, before.dtype) == (now.device, now.dtype)
    return arguments if same else pytree.tree_map(move, arguments)
