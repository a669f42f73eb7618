"""Attention whose weights are read elsewhere too: whole, by rows, summed over queries, or along the diagonal."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn

from tests.attention.case import GROUPED, QKV, Case, Dims, Inputs, key_t, plan, scale_of, scores, then
from tests.attention.spellings import DROPOUT, alibi_bias

Two = tuple[Tensor, Tensor]


def weights_of(q: Tensor, k: Tensor) -> Tensor:
    return scores(q, k).softmax(-1)


def causal_weights(q: Tensor, k: Tensor) -> Tensor:
    kept = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    return scores(q, k).masked_fill(~kept, float("-inf")).softmax(-1)


def class_row_of_patches(q: Tensor, k: Tensor, v: Tensor) -> Two:
    p = weights_of(q, k)
    return p @ v, p[:, :, 0, 1:].mean(1)


def last_row(q: Tensor, k: Tensor, v: Tensor) -> Two:
    p = causal_weights(q, k)
    return p @ v, p[:, :, -1]


def several_rows(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    p = causal_weights(q, k)
    return p @ v, p[:, :, 1:3], p[:, :, 0::4]


def row_of_a_biased_head(q: Tensor, k: Tensor, v: Tensor) -> Two:
    p = (scores(q, k) + alibi_bias(q)).softmax(-1)
    return p @ v, p[:, 0, -1]


def row_of_the_mean_over_heads(q: Tensor, k: Tensor, v: Tensor) -> Two:
    p = weights_of(q, k)
    return p @ v, p.float().mean(1)[:, 0, 1:]


def detached_row(q: Tensor, k: Tensor, v: Tensor) -> Two:
    p = weights_of(q, k)
    return p @ v, p.detach()[:, :, 0] * 2


def row_without_gradient(q: Tensor, k: Tensor, v: Tensor) -> Two:
    p = weights_of(q, k)
    with torch.no_grad():
        row = p[:, :, 0].mean(1)
    return p @ v, row


def column_sums(q: Tensor, k: Tensor, v: Tensor) -> Two:
    p = causal_weights(q, k)
    return p @ v, p.sum(-2)


def column_means(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    p = weights_of(q, k)
    return p @ v, p.mean((1, 2)), p.mean(2, keepdim=True)


def diagonal(q: Tensor, k: Tensor, v: Tensor) -> Two:
    p = weights_of(q, k)
    return p @ v, p.diagonal(dim1=-2, dim2=-1)


def row_and_whole(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    p = weights_of(q, k)
    return p @ v, p[:, :, 0], p


def cast_and_returned(q: Tensor, k: Tensor, v: Tensor) -> Two:
    wide = torch.softmax(scores(q, k), -1, dtype=torch.float32)
    return wide.to(q.dtype) @ v, wide


def flat_and_returned(q: Tensor, k: Tensor, v: Tensor) -> Two:
    """The way of BART: batch and heads merged around the products, apart in what is returned."""
    q3, k3, v3 = (t.reshape(-1, *t.shape[-2:]) for t in (q, k, v))
    p = torch.bmm(q3, key_t(k3)).mul(scale_of(q)).softmax(-1)
    apart = p.view(*q.shape[:2], *p.shape[-2:])
    return torch.bmm(apart.view(p.shape), v3).view_as(q), apart


def grouped_and_returned(q: Tensor, k: Tensor, v: Tensor) -> Two:
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    p = causal_weights(q, k)
    return p @ v, p


def rank_2(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    p = weights_of(q, k)
    return p @ v, p[0], p.sum(0)


def mean_over_heads_as_weights(q: Tensor, k: Tensor, v: Tensor) -> Two:
    p = weights_of(q, k)
    return p @ v, p.mean(1) @ v[:, 0]


class BeforeDropout(nn.Module):
    """The weights are read before dropout, which is active while training."""

    def __init__(self, dims: Dims) -> None:
        super().__init__()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Two:
        p = weights_of(q, k)
        return nn.functional.dropout(p, DROPOUT, self.training) @ v, p[:, :, 0]


class AfterDropout(BeforeDropout):
    """The weights are read after it."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Two:
        p = nn.functional.dropout(weights_of(q, k), DROPOUT, self.training)
        return p @ v, p


def edited_for_the_product(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Two:
    p = weights_of(q, k)
    return (p * m) @ v, p


def over_queries(q: Tensor, k: Tensor, v: Tensor) -> Two:
    p = scores(q, k).softmax(-2)
    return p @ v, p


def scores_and_weights(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    s = scores(q, k)
    p = s.softmax(-1)
    return p @ v, p[:, :, 0], s


def _factor(dims: Dims, dtype: torch.dtype) -> Tensor:
    return (torch.arange(dims.S) % 3 > 0).to(dtype).expand(dims.B, 1, dims.S, -1)


def _row(letter: str, name: str, program: Any, inputs: Inputs = QKV, **more: Any) -> Case:
    return Case(f"P15{letter}", name, program, inputs, **more)


def _kept(letter: str, name: str, program: Any, why: str, inputs: Inputs = QKV, **more: Any) -> Case:
    return Case(f"N39{letter}", name, program, inputs, expected="kept", why=why, **more)


WEIGHT_READERS: Final[tuple[Case, ...]] = (
    _row("a", "class-token row over patches", class_row_of_patches),
    _row("b", "last row, causal", last_row),
    _row("c", "several rows, causal", several_rows),
    _row("d", "row of one head, biased", row_of_a_biased_head),
    _row("e", "row of the mean over heads", row_of_the_mean_over_heads),
    _row("f", "detached row", detached_row),
    _row("g", "row read without gradient", row_without_gradient),
    _row("h", "column sums, causal", column_sums),
    _row("i", "column means", column_means),
    _row("j", "diagonal", diagonal),
    _row("k", "row and whole", row_and_whole),
    _row("l", "weights returned wide", cast_and_returned),
    _row("m", "weights of flat batches returned", flat_and_returned),
    _row("n", "weights of grouped heads returned", grouped_and_returned, GROUPED),
    _row("o", "rank 2", rank_2, plan("SD", "SD", "SD")),
    _row("p", "row read before dropout", BeforeDropout),
    _row("q", "mean over heads as weights", mean_over_heads_as_weights),
)
WEIGHT_NEAR_MISSES: Final[tuple[Case, ...]] = (
    _kept("a", "weights returned after dropout", AfterDropout, "escape: .* after dropout", modes=("training",)),
    _kept("b", "weights edited for the product", edited_for_the_product, "mul", then(QKV, _factor), constant=(3,)),
    _kept("c", "weights over queries returned", over_queries, "normalises over keys"),
    _kept("d", "scores and weights returned", scores_and_weights, "the scores escape"),
)
