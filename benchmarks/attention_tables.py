"""Index tables that real models gather by: T5's distance buckets, Swin's shift mask, ids of packed documents."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_BUCKETS = 32
_MAX_DISTANCE = 128
_REGION_MASK = -100.0  # what Swin adds to the score of two tokens that are no neighbours


def t5_buckets(distance: Tensor) -> Tensor:
    """The bucket 0 … 31 of each ``distance`` (key − query), both directions: near ones exact, far ones logarithmic."""
    half = _BUCKETS // 2
    exact = half // 2
    length = distance.abs()
    # In float32 and in this order, as the model does: some distances lie on the edge of two buckets.
    octaves = (length.clamp(min=1).float() / exact).log() / math.log(_MAX_DISTANCE / exact)
    far = exact + (octaves * (half - exact)).long()
    return half * (distance > 0).long() + torch.where(length < exact, length, far.clamp(max=half - 1))


def t5_band(table_bucket_H: Tensor, rows: int, keys: int) -> Tensor:
    """The bias of every distance, ``[H, rows + keys - 1]``: entry ``j - i + rows - 1`` is that of key j at query i."""
    distance = torch.arange(1 - rows, keys, device=table_bucket_H.device)
    return table_bucket_H[t5_buckets(distance)].T.contiguous()


def shift_mask(side: int, window: int, shift: int) -> Tensor:
    """``[W, N, N]``: 0 within a region, else −100, for the W windows of a square image rolled by ``shift`` tokens."""
    bounds = torch.tensor([side - window, side - shift])
    region = torch.bucketize(torch.arange(side), bounds, right=True)
    label = 3 * region[:, None] + region[None, :]
    count = side // window
    tokens_WN = label.view(count, window, count, window).transpose(1, 2).reshape(count**2, window**2)
    return torch.where(tokens_WN[:, :, None] == tokens_WN[:, None, :], 0.0, _REGION_MASK)


def document_ids(batch: int, length: int, documents: int) -> Tensor:
    """``[B, N]`` int32: rows packed with ``documents`` documents each, cut at random places."""
    generator = torch.Generator().manual_seed(0)
    cuts = torch.stack([torch.randperm(length - 1, generator=generator)[: documents - 1] + 1 for _ in range(batch)])
    starts = torch.zeros(batch, length, dtype=torch.int32).scatter_(1, cuts, 1)
    return starts.cumsum(1).int()
