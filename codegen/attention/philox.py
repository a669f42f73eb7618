"""Which attention weights dropout keeps, in plain PyTorch: a function of a seed and of the weight's place alone.

Philox 4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011) turns a counter of four 32-bit words
and a key of two into four words that look random. The key is the seed, the counter the place ``(j, i, h, b)``, so no
tensor is too large for it. Kernels compute the same words (`fxopt.codegen.attention.dropout`), block by block and again
in the backward, whatever their blocks are.

`PRINTED` are also printed into generated files, whose check they serve: they read nothing but torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor


def wide_product(a: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The upper and the lower 32 bits of ``a·x``, both below 2³²; in halves, because int64 has no room for all."""
    lower, upper = a * (x & 0xFFFF), a * (x >> 16)
    lower = lower + ((upper & 0xFFFF) << 16)
    return (upper >> 16) + (lower >> 32), lower & 0xFFFFFFFF


def philox(
    seed: torch.Tensor, c0: torch.Tensor, c1: torch.Tensor, c2: torch.Tensor, c3: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Philox 4x32-10 of the counter ``(c0, c1, c2, c3)`` under the 64 bits of ``seed``: words below 2³² in int64."""
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        (high0, low0), (high2, low2) = wide_product(0xD2511F53, c0), wide_product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def kept_weights(weights: torch.Tensor, seed: torch.Tensor, threshold: int) -> torch.Tensor:
    """Whether each of the weights [B, H, S, T] is kept: its word is at least ``threshold``.

    Four weights 8 rows and 8 keys apart share a counter, that of the first of them.
    """
    b, h, i, j = (
        torch.arange(size, device=weights.device).view([-1 if n == axis else 1 for n in range(4)])
        for axis, size in enumerate(weights.shape)
    )
    left, right, left_below, right_below = philox(seed, j - (j & 8), i - (i & 8), h, b)
    above, below = torch.where(j & 8 == 0, left, right), torch.where(j & 8 == 0, left_below, right_below)
    return torch.where(i & 8 == 0, above, below) >= threshold


#: What generated files hold of it.
PRINTED: Final[tuple[Callable[..., object], ...]] = (wide_product, philox, kept_weights)


def lowest_kept(probability: float) -> int:
    """The lowest of 2³² words whose weight is kept where ``probability`` is that of being dropped."""
    return min(round(probability * 2**32), 2**32 - 1)


def factors(weights_BHST: Tensor, seed: Tensor, probability: float) -> Tensor:
    """What dropout multiplies the weights ``[B, H, S, T]`` with: 0, or ``1/(1 − probability)``; in their dtype.

    Args:
        weights_BHST: the weights; their shape, dtype and device are read.
        seed: ``[1]``, int64, on the same device.
        probability: with which a weight is dropped, below 1.
    """
    kept_BHST = kept_weights(weights_BHST, seed, lowest_kept(probability))
    return kept_BHST.to(weights_BHST.dtype) * (1 / (1 - probability))
