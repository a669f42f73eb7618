"""Further positives: legal attention that enumerating matchers miss or break."""

from __future__ import annotations

import math
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.testing import draw, padding_mask, row_mask
from tests.attention.case import QKV, Args, Case, Dims, Inputs, key_t, plan, scale_of, scores, then
from tests.attention.spellings import WINDOW, division


def mask_on_the_left(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return (m + q @ key_t(k) / math.sqrt(q.shape[-1])).softmax(-1) @ v


def positive_axis(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).softmax(3) @ v


def positive_axis_3d(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.bmm((torch.bmm(q, k.transpose(1, 2)) * scale_of(q)).softmax(2), v)


def permuted_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (torch.matmul(q, k.permute(0, 2, 3, 1)) * scale_of(q)).softmax(-1) @ v


def twice_transposed_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (torch.matmul(q, k.transpose(1, 2).transpose(-2, -1)) * scale_of(q)).softmax(-1) @ v


def two_values(q: Tensor, k: Tensor, v1: Tensor, v2: Tensor) -> tuple[Tensor, Tensor]:
    a = scores(q, k).softmax(-1)
    return a @ v1, a @ v2


def f32_mask(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return (scores(q, k) + m).softmax(-1).to(v.dtype) @ v


def inactive_dropout_on_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout(scores(q, k), 0.1, training=False).softmax(-1) @ v


def t5(q: Tensor, k: Tensor, v: Tensor, position_bias: Tensor) -> Tensor:
    s = q @ key_t(k)
    s += position_bias
    return torch.softmax(s.float(), -1).type_as(s) @ v


def t5_two_layers(q: Tensor, k: Tensor, v: Tensor, position_bias: Tensor) -> Tensor:
    return t5(t5(q, k, v, position_bias), k, v, position_bias)


def mask_of_lowest(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    lowest = torch.finfo(q.dtype).min
    m = torch.zeros(keep.shape, dtype=q.dtype, device=q.device).masked_fill(~keep, lowest)
    return (scores(q, k) + m).softmax(-1) @ v


def padding_of_lowest(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    m = (1.0 - padding[:, None, None, :].to(q.dtype)) * torch.finfo(q.dtype).min
    return (scores(q, k) + m).softmax(-1) @ v


def causal_window_padding(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    i = torch.arange(q.shape[-2], device=q.device)
    causal = i[None] <= i[:, None]
    window = i[None] > i[:, None] - WINDOW
    keep = causal & window & padding[:, None, None, :].bool()
    m = torch.where(keep, 0.0, torch.finfo(q.dtype).min).to(q.dtype)
    return (scores(q, k) + m).softmax(-1) @ v


def scale_in_the_projection(x: Tensor, k: Tensor, v: Tensor, w: Tensor, b: Tensor) -> Tensor:
    c = w.shape[0] ** -0.5
    return (F.linear(x, w * c, b * c) @ key_t(k)).softmax(-1) @ v


def scale_through_a_norm(x: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    q = F.layer_norm(x, x.shape[-1:], w * w.shape[0] ** -0.5)
    return (q @ key_t(k)).softmax(-1) @ v


def shifted_by_global_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    e = (s - s.max()).exp()
    return (e / e.sum(-1, keepdim=True)) @ v


def shifted_by_detached_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    e = torch.exp(s - s.max(-1, keepdim=True).values.detach())
    return (e / e.sum(-1, keepdim=True)) @ v


def late_normalisation(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    e = (s - s.amax(-1, keepdim=True)).exp()
    return (e @ v) / e.sum(-1, keepdim=True)


def by_logsumexp(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    return (s - s.logsumexp(-1, keepdim=True)).exp() @ v


def _keep(dims: Dims, dtype: torch.dtype) -> Tensor:
    return row_mask((dims.B, 1, dims.S, dims.S))


def _padding(dims: Dims, dtype: torch.dtype) -> Tensor:
    return padding_mask(dims.B, dims.S).long()


def _f32_mask(dims: Dims, dtype: torch.dtype) -> Tensor:
    return draw((dims.B, 1, dims.S, dims.S), seed=9)


def _weights(dims: Dims, dtype: torch.dtype) -> Args:
    q, k, v = QKV(dims, dtype)
    return q, k, v, draw((dims.D, dims.D), dtype=dtype, seed=4), draw((dims.D,), dtype=dtype, seed=5)


def _flat(dims: Dims, dtype: torch.dtype) -> Args:
    return tuple(t.reshape(-1, dims.S, dims.D).contiguous() for t in QKV(dims, dtype))


def _rank_5(dims: Dims, dtype: torch.dtype) -> Args:
    return tuple(t.reshape(dims.B, dims.G, -1, dims.S, dims.D).contiguous() for t in QKV(dims, dtype))


_BIASED: Final = plan("BHSD", "BHSD", "BHSD", "1HSS")
_MASKED: Final = plan("BHSD", "BHSD", "BHSD", "B1SS")
_STORED: Final = plan("BHSD", "BSHD", "BHSD")


def _row(number: str, name: str, program: Any, inputs: Inputs = QKV, **more: Any) -> Case:
    return Case(f"P{number}", name, program, inputs, **more)


FURTHER: Final[tuple[Case, ...]] = (
    _row("1", "mask on the left", mask_on_the_left, _MASKED, constant=(3,)),
    _row("2a", "positive axis", positive_axis),
    _row("2b", "positive axis, 3-D bmm", positive_axis_3d, _flat),
    _row("3a", "key stored BSHD, permuted", permuted_key, _STORED),
    _row("3b", "key stored BSHD, transposed twice", twice_transposed_key, _STORED),
    _row("4a", "rank 2", division, plan("SD", "SD", "SD")),
    _row("4b", "rank 3", division, _flat),
    _row("4c", "rank 5", division, _rank_5),
    _row("5", "keys shared by the batch", division, plan("BHSD", "1HSD", "1HSD")),
    _row("6", "values of another size", division, plan("BHSD", "BHSD", "BHSE")),
    _row("7", "two values, one softmax", two_values, plan("BHSD", "BHSD", "BHSD", "BHSE"), expected="either"),
    _row("8", "f32 mask promotes the softmax", f32_mask, then(QKV, _f32_mask), constant=(3,)),
    _row("9", "inactive dropout on scores", inactive_dropout_on_scores),
    _row("10a", "T5, bias added in place", t5, _BIASED),
    _row("10b", "T5, one bias in two layers", t5_two_layers, _BIASED, sites=2),
    _row("11a", "4-D additive mask of lowest", mask_of_lowest, then(QKV, _keep)),
    _row("11b", "2-D padding to 4-D lowest", padding_of_lowest, then(QKV, _padding)),
    _row("11c", "causal and window and padding", causal_window_padding, then(QKV, _padding)),
    _row("12a", "scale folded into a linear", scale_in_the_projection, _weights),
    _row("12b", "scale folded into a norm", scale_through_a_norm, plan("BHSD", "BHSD", "BHSD", "D")),
    _row("13a", "softmax shifted by the global maximum", shifted_by_global_maximum),
    _row("13b", "softmax shifted by a detached maximum", shifted_by_detached_maximum),
    _row("14a", "normalised after the second product", late_normalisation),
    _row("14b", "softmax by logsumexp", by_logsumexp),
)
