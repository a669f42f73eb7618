"""The meaning of the canonical operators on heads, in plain PyTorch.

Legend: B batch, G key/value heads, H = G·count query heads, S positions, D channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxopt.ir.operators import define_meaning


def repeat_heads(x: Tensor, count: int, order: str) -> Tensor:
    """Give every head ``count`` times.

    Args:
        x: ``[B, G, S, D]``, any dtype.
        count: how often each head is given.
        order: ``"group"``: head ``h`` of the result is head ``h // count`` of ``x`` (grouped-query attention);
            ``"tile"``: it is head ``h % G``.

    Returns:
        ``[B, G * count, S, D]``, contiguous, in the dtype of ``x``.

    Raises:
        ValueError: ``order`` is neither.
    """
    if order not in ("group", "tile"):
        raise ValueError(f"the order of repeated heads is 'group' or 'tile', not {order!r}")
    batch, heads, positions, channels = x.shape
    if order == "tile":
        return x.repeat(1, count, 1, 1)
    repeated = x.unsqueeze(2).expand(batch, heads, count, positions, channels)
    return repeated.reshape(batch, heads * count, positions, channels)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotary position embedding: ``x * cos + rotated(x) * sin``.

    Each pair of channels ``(a, b)`` becomes ``(a * cos - b * sin, b * cos + a * sin)``.

    Args:
        x: ``[..., D]`` with even ``D``.
        cos: cosines, which broadcast to ``x``; the two channels of a pair usually hold the same value.
        sin: sines, likewise.
        interleaved: pairs are channels ``(2i, 2i + 1)`` (GPT-J) if true, ``(i, i + D/2)`` (GPT-NeoX, Llama) if not.

    Returns:
        The shape of ``x``, in the dtype that the three promote to.
    """
    if interleaved:
        rotated = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    else:
        first, second = x.chunk(2, -1)
        rotated = torch.cat((-second, first), -1)
    return x * cos + rotated * sin


define_meaning("repeat_heads", repeat_heads)
define_meaning("rotary", rotary)
