"""One attention on operands of known sizes: what a family of kernels is asked whether, and how, it would run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fxopt.ir.attention import AttentionSpec


@dataclass(frozen=True, slots=True)
class Problem:
    """An attention and the sizes of its operands, ``None`` where they are not known when it is lowered.

    Attributes:
        spec: what is computed.
        head_dim: ``D``, of queries and keys.
        value_dim: ``E``, of values.
        dtype: of ``q``, ``k`` and ``v``.
        capability: of the device, as ``torch.cuda.get_device_capability`` gives it.
        batch: ``B``.
        heads: ``H``, of queries.
        kv_heads: ``G``, of keys and values.
        rows: ``S``, the number of queries.
        keys: ``T``, the number of keys.
        dynamic_keys: whether ``keys`` is what was seen rather than what it will always be.
        with_lse: whether the log-sum-exp is read as well, as in training.
    """

    spec: AttentionSpec
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    capability: tuple[int, int]
    batch: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    rows: int | None = None
    keys: int | None = None
    dynamic_keys: bool = False
    with_lse: bool = False
