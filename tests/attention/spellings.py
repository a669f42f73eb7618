"""The 36 ordinary spellings of attention, each of which must reach the same canonical operator."""

from __future__ import annotations

import math
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxopt.testing import draw, row_mask
from tests.attention.case import CROSS, GROUPED, QKV, Args, Case, Dims, Inputs, key_t, plan, scale_of, scores, then

WINDOW: Final = 5
SOFT_CAP: Final = 50.0
DROPOUT: Final = 0.1


def division(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ key_t(k) / math.sqrt(q.shape[-1])).softmax(-1) @ v


def multiplication(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ key_t(k)) * scale_of(q)).softmax(-1) @ v


def scale_on_the_left(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (scale_of(q) * (q @ key_t(k))).softmax(-1) @ v


def q_pre_scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q * scale_of(q)) @ key_t(k)).softmax(-1) @ v


def q_and_k_pre_scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    root: float = q.shape[-1] ** -0.25
    return ((q * root) @ (k * root).transpose(-2, -1)).softmax(-1) @ v


def no_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ key_t(k)).softmax(-1) @ v


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a = torch.einsum("bhqd,bhkd->bhqk", q, k) * scale_of(q)
    return torch.einsum("bhqk,bhkd->bhqd", a.softmax(-1), v)


def softmax_in_f32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(scores(q, k), dim=-1, dtype=torch.float32).to(q.dtype) @ v


def written_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    e = (s - s.amax(-1, keepdim=True)).exp()
    return (e / e.sum(-1, keepdim=True)) @ v


def causal_masked_fill(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    size = q.shape[-2]
    m = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    return scores(q, k).masked_fill(~m, float("-inf")).softmax(-1) @ v


class CausalBuffer(nn.Module):
    """A causal mask kept as a buffer, applied by ``where`` with the lowest finite number."""

    buf: Tensor

    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.register_buffer("buf", torch.ones(dims.S, dims.S, dtype=torch.bool).tril())

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = scores(q, k)
        return torch.where(self.buf[None, None], s, torch.finfo(s.dtype).min).softmax(-1) @ v


def causal_additive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    size = q.shape[-2]
    m = torch.full((size, size), float("-inf"), dtype=q.dtype, device=q.device).triu(1)
    return (scores(q, k) + m).softmax(-1) @ v


def mask_after_division(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return (q @ key_t(k) / math.sqrt(q.shape[-1]) + m).softmax(-1) @ v


def mask_after_multiplication(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return ((q @ key_t(k)) * scale_of(q) + m).softmax(-1) @ v


def boolean_mask(q: Tensor, k: Tensor, v: Tensor, bm: Tensor) -> Tensor:
    return scores(q, k).masked_fill(~bm, float("-inf")).softmax(-1) @ v


def relative_table(q: Tensor, k: Tensor, v: Tensor, tab: Tensor) -> Tensor:
    i = torch.arange(q.shape[-2], device=q.device)
    b = tab[i[:, None] - i[None] + q.shape[-2] - 1].permute(2, 0, 1)[None]
    return (scores(q, k) + b).softmax(-1) @ v


class SwinBias(nn.Module):
    """A learned bias for each head and pair of positions."""

    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.bias = nn.Parameter(draw((dims.H, dims.S, dims.S), seed=7))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q * scale_of(q)) @ key_t(k) + self.bias[None]).softmax(-1) @ v


def alibi_bias(q: Tensor) -> Tensor:
    heads, size = q.shape[1:3]
    sl = torch.tensor([2 ** (-8 * (h + 1) / heads) for h in range(heads)], dtype=q.dtype, device=q.device)
    i = torch.arange(size, device=q.device)
    return (sl[:, None, None] * (i[None] - i[:, None]))[None]


def alibi(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (scores(q, k) + alibi_bias(q)).softmax(-1) @ v


def rotary(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    def rotated(x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, -1)
        return x * cos + torch.cat((-x2, x1), -1) * sin

    return division(rotated(q), rotated(k), v)


def repeated_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    return division(q, k, v)


def expanded_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def repeat(t: Tensor) -> Tensor:
        b, g, t_len, d = t.shape
        times = q.shape[1] // g
        return t[:, :, None].expand(b, g, times, t_len, d).reshape(b, g * times, t_len, d)

    return division(q, repeat(k), repeat(v))


def five_axes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h, s, d = q.shape
    g = k.shape[1]
    q5 = q.view(b, g, h // g, s, d)
    a = (q5 @ k[:, :, None].transpose(-2, -1) / math.sqrt(d)).softmax(-1)
    return (a @ v[:, :, None]).reshape(b, h, s, d)


def sliding_window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(q.shape[-2], device=q.device)
    w = i[:, None] - i[None]
    return scores(q, k).masked_fill(~((w >= 0) & (w < WINDOW)), float("-inf")).softmax(-1) @ v


def soft_cap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    s = SOFT_CAP * torch.tanh(s / SOFT_CAP)
    return s.softmax(-1) @ v


class Dropout(nn.Module):
    """Dropout on the weights while training."""

    def __init__(self, dims: Dims) -> None:
        super().__init__()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.dropout(scores(q, k).softmax(-1), DROPOUT, training=self.training) @ v


def qk_norm(q: Tensor, k: Tensor, v: Tensor, wq: Tensor, wk: Tensor) -> Tensor:
    def norm(t: Tensor, w: Tensor) -> Tensor:
        return (t.float() * torch.rsqrt(t.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(t.dtype) * w

    return division(norm(q, wq), norm(k, wk), v)


class PackedProjection(nn.Module):
    """Queries, keys and values from one linear layer, the result in the layout of the tokens."""

    pre_scaled = False

    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.heads, self.size = dims.H, dims.D

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        b, s, _ = x.shape
        qkv = F.linear(x, w).reshape(b, s, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        attend = q_pre_scaled if self.pre_scaled else multiplication
        return attend(q, k, v).transpose(1, 2).reshape(b, s, self.heads * self.size)


class TimmProjection(PackedProjection):
    """The same with the queries scaled before the product."""

    pre_scaled = True


def permuted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.permute(0, 2, 1, 3) for t in (q, k, v))
    return division(q, k, v)


def decode(q1: Tensor, k1: Tensor, v1: Tensor, kc: Tensor, vc: Tensor) -> Tensor:
    return division(q1, torch.cat([kc, k1], 2), torch.cat([vc, v1], 2))


def batched_3d(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    s, d = q.shape[-2:]
    flat_k = k.reshape(-1, s, d).transpose(1, 2)
    a = torch.baddbmm(m.reshape(-1, s, s), q.reshape(-1, s, d), flat_k, alpha=scale_of(q))
    return torch.bmm(a.softmax(-1), v.reshape(-1, s, d)).view_as(q)


def returns_weights(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    a = (q @ key_t(k) / math.sqrt(q.shape[-1])).softmax(-1)
    return a @ v, a


def returns_class_row(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    a = scores(q, k).softmax(-1)
    return a @ v, a[:, :, 0].mean(1)


def proportional(q: Tensor, k: Tensor, v: Tensor, size: Tensor) -> Tensor:
    return (scores(q, k) + size.log()[:, None, None, :, 0]).softmax(-1) @ v


def _boolean(dims: Dims, dtype: torch.dtype) -> Tensor:
    return row_mask((dims.B, 1, dims.S, dims.S))


def _table(dims: Dims, dtype: torch.dtype) -> Tensor:
    return draw((2 * dims.S - 1, dims.H), dtype=dtype, seed=5)


def _rotation(dims: Dims, dtype: torch.dtype) -> Args:
    frequencies = 100.0 ** -(torch.arange(0, dims.D, 2) / dims.D)
    angles = torch.arange(dims.S)[:, None] * torch.cat((frequencies, frequencies))
    return (*QKV(dims, dtype), angles.cos().to(dtype), angles.sin().to(dtype))


def _packed(dims: Dims, dtype: torch.dtype) -> Args:
    width = dims.H * dims.D
    x, w = draw((dims.B, dims.S, width)), draw((3 * width, width), seed=1) * width**-0.5
    return x.to(dtype), w.to(dtype)


def _sizes(dims: Dims, dtype: torch.dtype) -> Tensor:
    return (1 + torch.arange(dims.S) % 3).to(dtype).expand(dims.B, -1)[..., None].contiguous()


_MASKED: Final = plan("BHSD", "BHSD", "BHSD", "B1SS")
_DECODE: Final = plan("BH1D", "BH1D", "BH1D", "BHSD", "BHSD")


def _row(number: int, name: str, program: Any, inputs: Inputs = QKV, **more: Any) -> Case:
    return Case(str(number), name, program, inputs, **more)


SPELLINGS: Final[tuple[Case, ...]] = (
    _row(1, "plain, division", division),
    _row(2, "plain, multiplication", multiplication),
    _row(3, "scale on the left", scale_on_the_left),
    _row(4, "q pre-scaled", q_pre_scaled),
    _row(5, "q and k pre-scaled", q_and_k_pre_scaled),
    _row(6, "no scale", no_scale),
    _row(7, "einsum", einsum),
    _row(8, "f32 softmax, cast back", softmax_in_f32),
    _row(9, "hand-written softmax", written_softmax),
    _row(10, "causal, masked_fill", causal_masked_fill),
    _row(11, "causal, where on a buffer", CausalBuffer),
    _row(12, "causal, additive triu", causal_additive),
    _row(13, "additive mask after division", mask_after_division, _MASKED, constant=(3,)),
    _row(14, "additive mask after multiplication", mask_after_multiplication, _MASKED),
    _row(15, "boolean mask", boolean_mask, then(QKV, _boolean)),
    _row(16, "relative-bias table", relative_table, then(QKV, _table)),
    _row(17, "Swin bias", SwinBias),
    _row(18, "ALiBi", alibi),
    _row(19, "RoPE then attention", rotary, _rotation, constant=(3, 4)),
    _row(20, "GQA, repeat_interleave", repeated_heads, GROUPED),
    _row(21, "GQA, expand and reshape", expanded_heads, GROUPED),
    _row(22, "GQA, 5-D broadcast", five_axes, GROUPED),
    _row(23, "MQA broadcast", division, plan("BHSD", "B1SD", "B1SD")),
    _row(24, "sliding window", sliding_window),
    _row(25, "soft-cap", soft_cap),
    _row(26, "dropout on weights", Dropout),
    _row(27, "cross-attention", division, CROSS),
    _row(28, "QK RMS-norm", qk_norm, plan("BHSD", "BHSD", "BHSD", "D", "D")),
    _row(29, "packed QKV, scale after", PackedProjection, _packed),
    _row(30, "packed QKV, q pre-scaled", TimmProjection, _packed),
    _row(31, "BSHD permuted", permuted, plan("BSHD", "BSHD", "BSHD")),
    _row(32, "decode with cat cache", decode, _DECODE),
    _row(33, "baddbmm and bmm, 3-D", batched_3d, plan("BHSD", "BHSD", "BHSD", "BHSS")),
    _row(34, "returns the weights", returns_weights),
    _row(35, "returns the mean class-token row", returns_class_row),
    _row(36, "proportional attention", proportional, then(QKV, _sizes)),
)
