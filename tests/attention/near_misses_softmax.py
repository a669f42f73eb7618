"""Near misses whose difference lies in the softmax, in what reads its weights, in dtypes, or around the attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxopt.testing import draw, row_mask
from tests.attention.case import QKV, Args, Case, Dims, Inputs, key_t, plan, scale_of, scores, then
from tests.attention.spellings import division, returns_class_row, returns_weights


def weights_by(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Attention whose weights are ``change(softmax(scores))``."""
    return lambda q, k, v: change(scores(q, k).softmax(-1)) @ v


def entropy_of_weights(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    p = scores(q, k).softmax(-1)
    return p @ v, -(p * (p + 1e-4).log()).sum(-1)


def multiplied(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return (scores(q, k).softmax(-1) * m) @ v


def renormalised(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    p = scores(q, k).softmax(-1) * m
    return (p / p.sum(-1, keepdim=True)) @ v


class DropoutOnScores(nn.Module):
    """Dropout before the softmax: another distribution than dropout on the weights."""

    def __init__(self, dims: Dims) -> None:
        super().__init__()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.dropout(scores(q, k), 0.1, training=self.training).softmax(-1) @ v


def log_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).log_softmax(-1) @ v


def top_weights(p: Tensor) -> Tensor:
    values, index = p.topk(max(p.shape[-1] // 2, 1), -1)
    return torch.zeros_like(p).scatter(-1, index, values)


def softmax_plus_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    top = s.amax(-1, keepdim=True).clamp(min=0)
    e = (s - top).exp()
    return (e / ((-top).exp() + e.sum(-1, keepdim=True))) @ v


def dropped_sink(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    s = scores(q, k)
    logits = torch.cat([s, sink[None, :, None, None].expand(s.shape[0], -1, s.shape[2], 1)], -1)
    return logits.softmax(-1)[..., :-1] @ v


def unsafe_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = scores(q, k).exp()
    return (e / e.sum(-1, keepdim=True)) @ v


def lowest_half_added(q: Tensor, k: Tensor, v: Tensor, bm: Tensor) -> Tensor:
    return (scores(q, k) + (~bm).to(q.dtype) * torch.finfo(torch.float16).min).softmax(-1) @ v


def tiled_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    times = q.shape[1] // k.shape[1]
    return division(q, k.repeat(1, times, 1, 1), v.repeat(1, times, 1, 1))


def wide_weights_narrow_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).softmax(-1) @ v.float()


def softmax_stays_wide(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(scores(q, k), -1, dtype=torch.float32) @ v.float()


def view_into_linear(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    return F.linear(division(q, k, v).view(-1, q.shape[-1]), w)


def heads_merged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return division(q, k, v).reshape(-1, q.shape[2], q.shape[3])


def view_of_output(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return division(q, k, v).view(q.shape[0], q.shape[1] * q.shape[2], q.shape[3]) + 1


def concatenated_logits(q: Tensor, k1: Tensor, v1: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    logits = torch.cat([q @ key_t(k1), q @ key_t(k2)], -1) * scale_of(q)
    return logits.softmax(-1) @ torch.cat([v1, v2], -2)


def separate_softmaxes(q: Tensor, k1: Tensor, v1: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    return division(q, k1, v1) + division(q, k2, v2)


def cascaded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    outs: list[Tensor] = []
    for h in range(2):
        query = q[:, h] + outs[-1] if outs else q[:, h]
        outs.append(division(query, k[:, h], v[:, h]))
    return torch.stack(outs, 1)


def relu_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = scores(q, k).softmax(-1)
    p.sub_(0.05).relu_()
    return p @ v


def weights_returned_as_view(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    p = scores(q, k).softmax(-1)
    return p @ v, p[..., 0]


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    phi_q, phi_k = F.elu(q) + 1, F.elu(k) + 1
    return (phi_q @ (key_t(phi_k) @ v)) / (phi_q @ phi_k.sum(-2)[..., None])


def feature_softmaxes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.softmax(-1) @ (key_t(k.softmax(-2)) @ v)


def gated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(scores(q, k)) @ v


def written_dropout(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = scores(q, k).softmax(-1)
    keep = torch.empty_like(p).bernoulli_(0.9)
    return (p * keep / 0.9) @ v


def integer_operands(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ key_t(k)).float().softmax(-1) @ v.float()


def complex_operands(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ key_t(k)).real * scale_of(q)).softmax(-1) @ v.real


def _keep_factor(dims: Dims, dtype: torch.dtype) -> Tensor:
    return row_mask((dims.B, 1, dims.S, dims.S)).to(dtype)


def _empty_rows(dims: Dims, dtype: torch.dtype) -> Tensor:
    return row_mask((dims.B, 1, dims.S, dims.S), empty_rows=2)


def _mixed(dims: Dims, dtype: torch.dtype) -> Args:
    q, k, v = QKV(dims, torch.float32)
    return q, k, v.to(dtype)


def _integers(dims: Dims, dtype: torch.dtype) -> Args:
    return tuple(t.round().long() for t in QKV(dims, dtype))


def _complexes(dims: Dims, dtype: torch.dtype) -> Args:
    return tuple(torch.complex(t, t.flip(-1)) for t in QKV(dims, dtype))


def _two_heads(dims: Dims, dtype: torch.dtype) -> Args:
    return tuple(draw((dims.B, 2, dims.S, dims.D), dtype=dtype, seed=seed) for seed in range(3))


_FACTOR: Final = then(QKV, _keep_factor)
_SINK: Final = then(QKV, lambda dims, dtype: draw((dims.H,), dtype=dtype, seed=6))
_TWO: Final = plan("BHSD", "BHSD", "BHSD", "BHTD", "BHTD")
_INTO_LINEAR: Final = then(QKV, lambda dims, dtype: draw((5, dims.D), dtype=dtype, seed=6))
_WEIGHTS: Final = r"(?i)weight|probabilit|escape|returned|softmax|between|other use"
_KIND: Final = r"(?i)dtype|integer|complex|int64|floating|no contraction reaches"
_F32: Final = (torch.float32,)
_REDUCED: Final = (torch.bfloat16, torch.float16)


def _row(number: str, name: str, program: Any, inputs: Inputs = QKV, **more: Any) -> Case:
    return Case(f"N{number}", name, program, inputs, **{"expected": "either", **more})


def _kept(number: str, name: str, program: Any, inputs: Inputs = QKV, why: str = _WEIGHTS, **more: Any) -> Case:
    return _row(number, name, program, inputs, expected="kept", why=why, **more)


def _exact(number: str, name: str, program: Any, inputs: Inputs = QKV, **more: Any) -> Case:
    return _row(number, name, program, inputs, expected="rewritten", **more)


SOFTMAX_NEAR_MISSES: Final[tuple[Case, ...]] = (
    _exact("8a", "weights returned", returns_weights),
    _exact("8b", "a reduction of the weights returned", returns_class_row),
    _exact("8c", "entropy of the weights returned", entropy_of_weights),
    _kept("16a", "weights multiplied", multiplied, _FACTOR),
    _row("16b", "weights multiplied and renormalised", renormalised, _FACTOR, constant=(3,)),
    _kept("18", "dropout on scores", DropoutOnScores, why=r"(?i)dropout|random", modes=("training",)),
    _kept("19a", "log-softmax", log_softmax, sites=0),
    _kept("19b", "squared weights", weights_by(torch.square)),
    _kept("19c", "largest weights only", weights_by(top_weights)),
    _kept("19d", "rectified weights", weights_by(lambda p: torch.relu(p - 0.05))),
    _kept("19e", "thresholded weights", weights_by(lambda p: torch.where(p > 0.05, p, 0.0))),
    _row("20a", "softmax plus one", softmax_plus_one),
    _row("20b", "sink column dropped", dropped_sink, _SINK),
    _row("21", "unsafe softmax", unsafe_softmax),
    _row("24", "lowest half added", lowest_half_added, then(QKV, _empty_rows), dtypes=(torch.float16,)),
    _exact("28", "GQA by tiling", tiled_heads, plan("BHSD", "BGSD", "BGSD")),
    _row("29a", "f32 weights, narrow values", wide_weights_narrow_values, _mixed, dtypes=_REDUCED),
    _row("29b", "softmax stays f32", softmax_stays_wide, dtypes=_REDUCED),
    _exact("30a", "view into a linear", view_into_linear, _INTO_LINEAR),
    _exact("30b", "batch and heads merged after", heads_merged),
    _exact("31", "view of the output", view_of_output),
    _row("32a", "concatenated logits", concatenated_logits, _TWO),
    _exact("32b", "two separate softmaxes", separate_softmaxes, _TWO, sites=2),
    _row("33", "cascaded heads", cascaded, _two_heads, sites=2),
    _kept("34a", "weights edited in place", relu_in_place, modes=("inference",)),
    _exact("34b", "a view of the weights returned", weights_returned_as_view),
    _kept("35a", "linear attention", linear_attention, sites=0),
    _kept("35b", "softmax over features", feature_softmaxes, sites=0),
    _kept("35c", "gated", gated, sites=0),
    _kept(
        "36", "hand-written dropout", written_dropout, why=r"(?i)random|bernoulli|dropout|between", modes=("training",)
    ),
    _kept("37a", "integer operands", integer_operands, _integers, _KIND, modes=("inference",), dtypes=_F32),
    _kept("37b", "complex operands", complex_operands, _complexes, _KIND, modes=("inference",), dtypes=_F32),
    _row("37c", "float64", division, dtypes=(torch.float64,)),
)
