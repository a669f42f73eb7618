"""Inputs that make a wrong rewrite show: extreme values, empty mask rows, and sizes that hide a transposed axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Final

import torch
from torch import Tensor

Draw = Callable[[Sequence[int], torch.Generator], Tensor]


def _normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _wide(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    exponents = torch.rand(shape, generator=generator, dtype=torch.float64) * 16 - 12
    return _normal(shape, generator).sign() * torch.exp2(exponents)


def _large(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return 12 * _normal(shape, generator)


def _equal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.full(tuple(shape), float(_normal((1,), generator)), dtype=torch.float64)


def _zeros(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.zeros(tuple(shape), dtype=torch.float64)


#: The distributions by name: standard normal; magnitudes from 2⁻¹² to 2⁴; logits that saturate a softmax; one value
#: everywhere (ties); zeros.
DISTRIBUTIONS: Final[dict[str, Draw]] = {
    "normal": _normal, "wide": _wide, "large": _large, "equal": _equal, "zeros": _zeros,
}  # fmt: skip


def draw(
    shape: Sequence[int], distribution: str = "normal", *, dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu", seed: int = 0,
) -> Tensor:  # fmt: skip
    """A tensor from one of `DISTRIBUTIONS`: drawn in float64 on the CPU, the same numbers for every dtype and device.

    Raises:
        ValueError: the distribution has no such name; the message lists those there are.
    """
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"unknown distribution {distribution!r}; use one of {', '.join(DISTRIBUTIONS)}")
    values = DISTRIBUTIONS[distribution](shape, torch.Generator().manual_seed(seed))
    return values.to(device=device, dtype=dtype)


def padding_mask(batch: int, keys: int, *, empty: bool = False, device: torch.device | str = "cpu") -> Tensor:
    """A boolean mask ``[B, T]``, true for keys that take part: sample ``b`` lacks its last ``b mod T`` keys.

    With ``empty=True`` the last sample has no key at all, so each of its rows is fully masked.
    """
    lengths = keys - torch.arange(batch) % max(keys, 1)
    mask = torch.arange(keys)[None] < lengths[:, None]
    if empty:
        mask[-1:] = False
    return mask.to(device)


def row_mask(shape: Sequence[int], *, empty_rows: int = 0, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """A boolean mask ``[…, S, T]``: about two keys in three per row, at least one, none in the first ``empty_rows``."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(tuple(shape), generator=generator) < 2 / 3
    mask[..., 0] = True
    mask[..., :empty_rows, :] = False
    return mask.to(device)


@dataclass(frozen=True)
class Sizes:
    """Sizes of an attention: ``B`` batch, ``H`` query heads, ``G`` key/value heads, ``S`` queries, ``T`` keys of
    another sequence, ``D`` head dimension, ``E`` head dimension of values. All differ unless a test makes them collide.
    """

    B: int = 3
    H: int = 8
    G: int = 2
    S: int = 12
    T: int = 7
    D: int = 16
    E: int = 10

    def __str__(self) -> str:
        return "-".join(f"{f.name}{getattr(self, f.name)}" for f in fields(self))


DISTINCT: Final = Sizes()

#: Sizes under which a wrong axis still has a right shape, by what they make equal.
SIZE_COLLISIONS: Final[dict[str, Sizes]] = {
    "S=D": replace(DISTINCT, S=16),
    "H=S": replace(DISTINCT, S=8),
    "B=H": replace(DISTINCT, B=8),
    "S=T": replace(DISTINCT, T=12),
    "all-equal": Sizes(B=4, H=4, G=4, S=4, T=4, D=4, E=4),
    "B=1": replace(DISTINCT, B=1),
    "H=1": replace(DISTINCT, H=1, G=1),
    "S=1": replace(DISTINCT, S=1),
    "T=1": replace(DISTINCT, T=1),
}
