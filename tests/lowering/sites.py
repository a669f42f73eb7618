"""Functions with several attentions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def sites_at(scale: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Two sites alike and one that isn't."""

    def layers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for _ in range(2):
            q = (q @ k.mT * scale).softmax(-1) @ v
        return (torch.tanh(q @ k.mT) * scale).softmax(-1) @ v

    return layers
