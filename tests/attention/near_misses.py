"""Programs that look like attention and are not, or not plainly: axes, operands, scales and masks.

``kept`` must stay as it is, with a reason. ``either`` may be rewritten, but only into a form that gives the same
numbers; a transposed axis that enumerating matchers overlook changes them by as much as their own size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from fxopt.testing import draw, row_mask
from tests.attention.case import CROSS, QKV, Args, Case, Dims, Inputs, key_t, plan, scale_of, scores, then
from tests.attention.near_misses_softmax import SOFTMAX_NEAR_MISSES


def over(axis: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Attention whose softmax runs over ``axis``."""
    return lambda q, k, v: scores(q, k).softmax(axis) @ v


def masked_over_queries(q: Tensor, k: Tensor, v: Tensor, bm: Tensor) -> Tensor:
    return scores(q, k).masked_fill(~bm, -100.0).softmax(-2) @ v


def sum_over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    e = (s - s.amax(-1, keepdim=True)).exp()
    return (e / e.sum(-2, keepdim=True)) @ v


def shift_by_key_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    e = (s - s.amax(-2, keepdim=True)).exp()
    return (e / e.sum(-1, keepdim=True)) @ v


def untransposed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k) * scale_of(q)).softmax(-1) @ v


def key_as(*axes: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Attention whose key is brought into place by ``permute(axes)``."""
    return lambda q, k, v: (torch.matmul(q, k.permute(axes)) * scale_of(q)).softmax(-1) @ v


def transposed_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).softmax(-1).transpose(-2, -1) @ v


def scores_escape(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    s = scores(q, k)
    return s.softmax(-1) @ v, s


def key_zeroed_later(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    k.zero_()
    return s.softmax(-1) @ v


def value_halved_between(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = scores(q, k).softmax(-1)
    v.mul_(0.5)
    return p @ v


def score_overwritten(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    s[..., 0] = 1.0
    return s.softmax(-1) @ v


def mask_added_in_place(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    s = scores(q, k)
    s.add_(m)
    return s.softmax(-1) @ v


def tensor_scale(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
    return ((q @ key_t(k)) * t).softmax(-1) @ v


def mask_before_scale(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return ((q @ key_t(k) + m) * scale_of(q)).softmax(-1) @ v


def mask_inside_cap(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return (4.0 * torch.tanh((scores(q, k) + m) / 4.0)).softmax(-1) @ v


def filled_with_infinity(q: Tensor, k: Tensor, v: Tensor, bm: Tensor) -> Tensor:
    return scores(q, k).masked_fill(~bm, float("-inf")).softmax(-1) @ v


def filled_with_lowest(q: Tensor, k: Tensor, v: Tensor, bm: Tensor) -> Tensor:
    return scores(q, k).masked_fill(~bm, torch.finfo(q.dtype).min).softmax(-1) @ v


def lowest_added(q: Tensor, k: Tensor, v: Tensor, bm: Tensor) -> Tensor:
    m = torch.where(bm, 0.0, torch.finfo(q.dtype).min).to(q.dtype)
    return (scores(q, k) + m).softmax(-1) @ v


def causal_from(offset: Callable[[int, int], int]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Causal attention over ``tril(diagonal=offset(S, T))``."""

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = scores(q, k)
        keep = torch.ones(s.shape[-2:], dtype=torch.bool, device=q.device).tril(offset(*s.shape[-2:]))
        return s.masked_fill(~keep, float("-inf")).softmax(-1) @ v

    return program


def _empty_rows(dims: Dims, dtype: torch.dtype) -> Tensor:
    return row_mask((dims.B, 1, dims.S, dims.S), empty_rows=2)


def _triangle(dims: Dims, dtype: torch.dtype) -> Tensor:
    return torch.ones(dims.S, dims.S, dtype=torch.bool).tril()


def _another_mask(dims: Dims, dtype: torch.dtype) -> Tensor:
    return row_mask((dims.S, dims.S), seed=3)


def _zero_dimensional(dims: Dims, dtype: torch.dtype) -> Tensor:
    return torch.tensor(0.3, dtype=dtype)


def _infinite_mask(dims: Dims, dtype: torch.dtype) -> Tensor:
    keep = row_mask((dims.B, 1, dims.S, dims.S))
    return torch.zeros(keep.shape, dtype=dtype).masked_fill(~keep, float("-inf"))


def _flat(dims: Dims, dtype: torch.dtype) -> Args:
    return tuple(t.reshape(-1, dims.S, dims.D).contiguous() for t in QKV(dims, dtype))


def _square(dims: Dims) -> Dims:
    return replace(dims, S=dims.D)


def _cube(dims: Dims) -> Dims:
    return replace(dims, B=dims.D, H=dims.D, G=dims.D, S=dims.D)


def _one_cube(dims: Dims) -> Dims:
    return replace(_cube(dims), B=1)


def _cube_3d(dims: Dims, dtype: torch.dtype) -> Args:
    return tuple(draw((dims.D,) * 3, dtype=dtype, seed=seed) for seed in range(3))


_AXIS: Final = r"(?i)axis|axes|dim|last|keys"
_MASKED: Final = plan("BHSD", "BHSD", "BHSD", "B1SS")
_HEAD_SCALE: Final = then(QKV, lambda dims, dtype: draw((dims.H, 1, 1), dtype=dtype, seed=6))
_KEY_SCALE: Final = plan("BHSD", "BHSD", "BHSD", "B11S")
_BATCH_FIRST: Final = ((1, 2, 0, 3), (1, 2, 3, 0), (2, 3, 0, 1), (2, 3, 1, 0))
_KEEPS_BATCH: Final = ((0, 2, 1, 3), (0, 3, 1, 2), (0, 3, 2, 1))
_INFERENCE: Final[dict[str, Any]] = {"modes": ("inference",)}


def _row(number: str, name: str, program: Any, inputs: Inputs = QKV, **more: Any) -> Case:
    return Case(f"N{number}", name, program, inputs, **{"expected": "either", **more})


def _kept(number: str, name: str, program: Any, why: str, inputs: Inputs = QKV, **more: Any) -> Case:
    return _row(number, name, program, inputs, expected="kept", why=why, **more)


STRUCTURE_NEAR_MISSES: Final[tuple[Case, ...]] = (
    _kept("1a", "softmax over queries", over(-2), _AXIS),
    _kept("1b", "softmax over queries, masked", masked_over_queries, _AXIS, then(QKV, _empty_rows)),
    _kept("2a", "softmax over heads", over(1), _AXIS),
    _kept("2b", "softmax over the batch", over(0), _AXIS),
    _kept("3a", "hand softmax, sum over queries", sum_over_queries, _AXIS),
    _kept("3b", "hand softmax, shifted by each key's maximum", shift_by_key_maximum, _AXIS),
    _row("4a", "untransposed key", untransposed, fit=_square),
    _row("4b", "identity permutation of the key", key_as(0, 1, 2, 3), fit=_square),
    *(
        _row(f"5{letter}", f"key permuted by {axes}", key_as(*axes), fit=_cube)
        for letter, axes in zip("abcd", _BATCH_FIRST, strict=True)
    ),
    *(
        _row(f"5{letter}", f"key permuted by {axes}, one sample", key_as(*axes), fit=_one_cube)
        for letter, axes in zip("efg", _KEEPS_BATCH, strict=True)
    ),
    *(
        _row(f"6{letter}", f"3-D key permuted by {axes}", key_as(*axes), _cube_3d)
        for letter, axes in zip("abc", ((0, 1, 2), (1, 2, 0), (2, 1, 0)), strict=True)
    ),
    _kept("7", "weights transposed", transposed_weights, r"(?i)transpos|axis|axes|queries|contract"),
    _row("9", "scores escape", scores_escape),
    _row("10", "key zeroed after the product", key_zeroed_later, QKV, **_INFERENCE),
    _row("11", "value halved between the products", value_halved_between, QKV, **_INFERENCE),
    _row("12a", "a column of scores overwritten", score_overwritten),
    _row("12b", "mask added in place", mask_added_in_place, _MASKED),
    _row("13a", "tensor scale, 0-d", tensor_scale, then(QKV, _zero_dimensional), expected="rewritten"),
    _row("13b", "tensor scale for each head", tensor_scale, _HEAD_SCALE, expected="rewritten"),
    _row("14", "tensor scale for each key", tensor_scale, _KEY_SCALE),
    _row("15", "mask before scale", mask_before_scale, _MASKED, expected="rewritten"),
    _row("17", "mask inside the soft-cap", mask_inside_cap, then(QKV, _infinite_mask), constant=(3,)),
    _row("22", "empty rows, −inf", filled_with_infinity, then(QKV, _empty_rows), expected="rewritten"),
    _row("23a", "empty rows, lowest filled", filled_with_lowest, then(QKV, _empty_rows), expected="rewritten"),
    _row("23b", "empty rows, lowest added", lowest_added, then(QKV, _empty_rows), expected="rewritten"),
    _row(
        "25", "mask that happens to be triangular", filled_with_infinity, then(QKV, _triangle),
        expected="rewritten", again=then(QKV, _another_mask),
    ),
    _row("26", "strictly causal, first row empty", causal_from(lambda s, t: -1)),
    _row("27a", "rectangular causal, top-left", causal_from(lambda s, t: 0), CROSS, expected="rewritten"),
    _row("27b", "rectangular causal, bottom-right", causal_from(lambda s, t: t - s), CROSS),
)  # fmt: skip

NEAR_MISSES: Final[tuple[Case, ...]] = (*STRUCTURE_NEAR_MISSES, *SOFTMAX_NEAR_MISSES)
