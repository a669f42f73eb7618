"""The example arguments of a model, moved to where the model is now."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Value = TypeVar("Value")


def kind_of(model: nn.Module) -> Tensor:
    """An empty tensor on the device, and of the dtype, of the first floating parameter or buffer of ``model``."""
    states = (*model.parameters(), *model.buffers())
    first = next((state for state in states if state.is_floating_point()), torch.empty(0))
    return torch.empty(0, dtype=first.dtype, device=first.device)


def moved(value: Value, before: Tensor, now: Tensor) -> Value:
    """``value`` with its tensors on the device of ``now``, those of the dtype of ``before`` in the one of ``now``."""

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or (before.device, before.dtype) == (now.device, now.dtype):
            return leaf
        return leaf.to(now.device, now.dtype if leaf.dtype == before.dtype else leaf.dtype)

    result: Value = pytree.tree_map(move, value)
    return result
