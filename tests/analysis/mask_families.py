"""Masks and biases as models build them out of sizes, with what each must become.

Every family is a function of queries ``q [B, H, S, D]`` and keys ``k [B, H, T, D]`` (their sizes are all that counts)
and of run-time data, and gives a tensor that broadcasts with ``[B, H, S, T]``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

LOWEST: Final = torch.finfo(torch.float32).min
Build = Callable[..., Tensor]
Data = Callable[[int, int], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Family:
    """One way to build a mask or a bias.

    Attributes:
        build: makes it.
        form: the expression that it must become, over the lengths where they are symbolic.
        square: whether queries and keys are equally many.
        dims: how each captured tensor is read, in order.
        data: makes the run-time data for ``S`` and ``T``, the batch being 2.
    """

    build: Build
    form: str
    square: bool = True
    dims: tuple[str, ...] = ()
    data: Data = lambda s, t: ()


def rows(q: Tensor) -> Tensor:
    return torch.arange(q.shape[2], device=q.device)[:, None]


def columns(k: Tensor) -> Tensor:
    return torch.arange(k.shape[2], device=k.device)[None]


def whole(q: Tensor, k: Tensor) -> Tensor:
    return torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)


def additive(keep: Tensor) -> Tensor:
    return torch.where(keep, torch.tensor(0.0, device=keep.device), LOWEST)


def packed_positions(q: Tensor, k: Tensor) -> Tensor:
    """What transformers does with position ids that are consecutive."""
    ids = torch.arange(q.shape[2], device=q.device).unsqueeze(0).expand(q.shape[0], -1)
    jumps = torch.diff(ids, prepend=ids[:, :1] - 1, dim=-1) != 1
    documents = jumps.cumsum(-1)
    b = torch.arange(q.shape[0], device=q.device)[:, None, None, None]
    i = torch.arange(q.shape[2], device=q.device)[None, None, :, None]
    j = torch.arange(k.shape[2], device=q.device)[None, None, None, :]
    same = documents[b, i] == documents[b, j]
    return q.new_ones((), dtype=torch.bool) & (ids[b, j] <= ids[b, i]) & same


def arithmetic_causal(q: Tensor, k: Tensor) -> Tensor:
    keep = torch.ones(q.shape[2], k.shape[2], device=q.device).tril()
    return (1.0 - keep)[None, None] * LOWEST


def padding(q: Tensor, k: Tensor, keep: Tensor) -> Tensor:
    return whole(q, k).tril() & keep[:, None, None, :].to(torch.bool)


def expanded_padding(q: Tensor, k: Tensor, keep: Tensor) -> Tensor:
    """BERT's older way: a plane of floats, inverted."""
    inverted = 1.0 - keep[:, None, None, :].expand(keep.shape[0], 1, q.shape[2], keep.shape[1]).to(torch.float32)
    return inverted.masked_fill(inverted.to(torch.bool), LOWEST)


def documents(q: Tensor, k: Tensor, ids: Tensor) -> Tensor:
    return (ids[:, None, :, None] == ids[:, None, None, :]) & (columns(k) <= rows(q))


def chunked(q: Tensor, k: Tensor) -> Tensor:
    return (columns(k) <= rows(q)) & (rows(q) // 4 == columns(k) // 4)


def bloom(q: Tensor, k: Tensor, slopes: Tensor) -> Tensor:
    ones = torch.ones(q.shape[0], q.shape[2], device=q.device)
    places = ((ones.cumsum(-1) - 1) * ones)[:, None, :]
    return (slopes[..., None] * places).reshape(q.shape[0], slopes.shape[0], 1, q.shape[2])


def repeated(q: Tensor, k: Tensor, slopes: Tensor) -> Tensor:
    """bloom's as transformers builds it now: for batch and heads merged."""
    places = slopes[:, None, None] * torch.arange(k.shape[2], device=k.device)[None, None, :]
    return places.repeat(q.shape[0], 1, 1).view(q.shape[0], slopes.shape[0], 1, k.shape[2])


def truth_of_fill(q: Tensor, k: Tensor) -> Tensor:
    """MPT's: an additive mask taken for its truth."""
    return ~additive(columns(k) <= rows(q)).to(torch.bool)


def mpt(q: Tensor, k: Tensor, slopes: Tensor) -> Tensor:
    places = torch.arange(1 - k.shape[2], 1, dtype=torch.int32, device=k.device).view(1, 1, 1, k.shape[2])
    return places.to(torch.float32) * slopes.view(1, -1, 1, 1)


def _keep(s: int, t: int) -> tuple[Tensor, ...]:
    keep = torch.ones(2, t, dtype=torch.long)
    keep[1, t // 2 + 1 :] = 0
    return (keep,)


def _ids(s: int, t: int) -> tuple[Tensor, ...]:
    return (torch.stack([torch.arange(t) // 3, torch.arange(t) // 4]),)


def _slopes(s: int, t: int) -> tuple[Tensor, ...]:
    return (torch.tensor([0.5, 0.25, 0.125]),)


FAMILIES: Final[dict[str, Family]] = {
    "all-true": Family(lambda q, k: columns(k) >= 0, "True", square=False),
    "causal-compare": Family(lambda q, k: columns(k) <= rows(q), "j <= i", square=False),
    "causal-negated": Family(lambda q, k: ~(columns(k) > rows(q)), "j <= i", square=False),
    "causal-tril": Family(lambda q, k: whole(q, k).tril(), "j <= i"),
    "causal-triu": Family(
        lambda q, k: torch.full((q.shape[2], k.shape[2]), -torch.inf, device=q.device).triu(1),
        "where(j >= i + 1, -inf, 0.0)",
    ),
    "causal-arithmetic": Family(arithmetic_causal, f"where(j <= i, 0.0, {LOWEST!r})"),
    "causal-bottom-right": Family(
        lambda q, k: whole(q, k).tril(k.shape[2] - q.shape[2]), "j <= i + Sk - Sq", square=False
    ),
    "causal-packed": Family(packed_positions, "j <= i"),
    "strictly-causal": Family(lambda q, k: columns(k) < rows(q), "j <= i + -1", square=False),
    "anti-causal": Family(lambda q, k: columns(k) >= rows(q), "j >= i", square=False),
    "window": Family(
        lambda q, k: (columns(k) <= rows(q)) & (columns(k) > rows(q) - 5), "(j <= i) & (j >= i + -4)", square=False
    ),
    "window-both-sides": Family(
        lambda q, k: (columns(k) - rows(q)).abs() <= 2, "(j <= i + 2) & (j >= i + -2)", square=False
    ),
    "window-additive": Family(
        lambda q, k: additive((columns(k) <= rows(q)) & (rows(q) - columns(k) < 3)),
        f"where((j <= i) & (j >= i + -2), 0.0, {LOWEST!r})",
    ),
    "prefix": Family(lambda q, k: (columns(k) <= rows(q)) | (columns(k) < 4), "(j <= i) | (j <= 3)", square=False),
    "chunked": Family(chunked, "(j <= i) & ((i // 4) == (j // 4))", square=False),
    "dilated": Family(
        lambda q, k: (columns(k) <= rows(q)) & ((rows(q) - columns(k)) % 3 == 0), "(j <= i) & (((i - j) % 3) == 0)",
        square=False,
    ),
    "padding": Family(padding, "(j <= i) & c0", dims=("b--j",), data=_keep),
    "padding-plane": Family(expanded_padding, f"where(c0 != 1, {LOWEST!r}, 0.0)", dims=("b--j",), data=_keep),
    "documents": Family(documents, "(c0 == c1) & (j <= i)", dims=("b-i-", "b--j"), data=_ids),
    "alibi": Family(
        lambda q, k, m: m[:, None, None] * (columns(k) - rows(q)), "c0 * float(j - i)", False, ("-h--",), _slopes
    ),
    "bloom": Family(bloom, "c0 * float(j)", dims=("-h--",), data=_slopes),
    "bloom-repeated": Family(repeated, "c0 * float(j)", dims=("-h--",), data=_slopes),
    "causal-truth-of-fill": Family(truth_of_fill, "j <= i", square=False),
    "mpt": Family(mpt, "float(j - Sq + 1) * c0", dims=("-h--",), data=_slopes),
}  # fmt: skip


def _one_more(q: Tensor, k: Tensor) -> Tensor:
    keep = columns(k) <= rows(q)
    return keep | ((rows(q) == 1) & (columns(k) == 2))


#: What is nearly causal, and must not become ``j <= i``.
NEARLY_CAUSAL: Final[dict[str, Build]] = {
    "one-element-more": _one_more,
    "one-element-less": lambda q, k: (columns(k) <= rows(q)) & ((rows(q) != 2) | (columns(k) != 1)),
    "one-diagonal-more-from-row-3": lambda q, k: columns(k) <= torch.where(rows(q) < 3, rows(q), rows(q) + 1),
    "transposed": lambda q, k: columns(k) >= rows(q),
    "one-diagonal-less": lambda q, k: columns(k) < rows(q),
    "from-the-end": lambda q, k: columns(k).flip(1) <= rows(q),
    "every-other-row": lambda q, k: columns(k) <= rows(q) // 2 * 2,
    "double-speed": lambda q, k: columns(k) <= 2 * rows(q),
}
