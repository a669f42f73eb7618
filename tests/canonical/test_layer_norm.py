"""The pass `layer-norm`: every way to write it, with and without casts, and what only looks like it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fxopt.passes.canonical.layer_norm import LayerNorm
from fxopt.passes.canonical.no_ops import NoOps
from fxopt.testing import assert_operators
from tests.canonical.support import DTYPES, assert_fires, random, rewrite

PASSES = (NoOps(), LayerNorm())
EPS = 1e-3
Spelling = Callable[[Tensor, Tensor, Tensor], Tensor]


def bert(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    u = x.mean(-1, keepdim=True)
    s = (x - u).pow(2).mean(-1, keepdim=True)
    return w * ((x - u) / torch.sqrt(s + EPS)) + b


def product(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    d = x - x.mean(-1, keepdim=True)
    return d * torch.rsqrt(EPS + (d * d).mean(-1, keepdim=True)) * w + b


def variance(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    d = x - x.mean(-1, keepdim=True)
    return b + d * (x.var(-1, unbiased=False, keepdim=True) + EPS).rsqrt() * w


def correction(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    d = x - x.mean(2, keepdim=True)
    return d / (x.var(2, correction=0, keepdim=True) + EPS) ** 0.5 * w + b


def variance_and_mean(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    v, u = torch.var_mean(x, -1, correction=0, keepdim=True)
    return (x - u) * torch.rsqrt(v + EPS) * w + b


def restored(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    d = x - x.mean(-1).unsqueeze(-1)
    return d / torch.sqrt(d.square().mean(-1).unsqueeze(-1) + EPS) * w + b


def reciprocal(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    d = x - x.mean(-1, keepdim=True)
    return d * (1 / torch.sqrt((d**2).mean(-1, keepdim=True) + EPS)) * w + b


def _normal(x: Tensor) -> Tensor:
    d = x - x.mean(-1, keepdim=True)
    return d * torch.rsqrt(d.pow(2).mean(-1, keepdim=True) + EPS)


SPELLINGS = (
    bert, product, variance, correction, variance_and_mean, restored, reciprocal,
    lambda x, w, b: _normal(x) * w, lambda x, w, b: _normal(x) + b, lambda x, w, b: _normal(x),
)  # fmt: skip
ABSENT = dict.fromkeys(
    ("aten.mean", "aten.var", "aten.var_mean", "aten.rsqrt", "aten.sqrt", "aten.mul", "aten.add", "aten.sub"), 0
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_layer_norm_fires(spelling: Spelling, dtype: torch.dtype) -> None:
    args = (random(2, 5, 8, dtype=dtype), random(8, dtype=dtype, seed=1), random(8, dtype=dtype, seed=2))
    assert_fires(spelling, args, PASSES, {"aten.layer_norm": 1} | ABSENT)


def _rounded_last(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return (_normal(x.float()) * w.float() + b.float()).to(x.dtype)


def _rounded_first(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return _normal(x.float()).to(x.dtype) * w + b


def _rounded_unscaled(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return _normal(x.float()).type_as(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spelling", [_rounded_last, _rounded_first, _rounded_unscaled])
def test_layer_norm_fires_with_casts(spelling: Spelling, dtype: torch.dtype) -> None:
    args = (random(2, 5, 8, dtype=dtype), random(8, dtype=dtype, seed=1), random(8, dtype=dtype, seed=2))
    assert_fires(spelling, args, PASSES, {"fxopt.layer_norm": 1, "aten.layer_norm": 0} | ABSENT)
    (node,) = rewrite(spelling, args, PASSES).program.graph.find_nodes(
        op="call_function", target=torch.ops.fxopt.layer_norm.default
    )
    assert node.args[4:] == (EPS, torch.float32, spelling is _rounded_first)


def test_layer_norm_of_a_widened_input_is_plain() -> None:
    def wide(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return _normal(x.float()) * w + b

    args = (random(2, 5, 8, dtype=torch.bfloat16), random(8, seed=1), random(8, seed=2))
    assert_fires(wide, args, PASSES, {"aten.layer_norm": 1, "fxopt.layer_norm": 0} | ABSENT)


def test_layer_norm_fires_over_two_axes() -> None:
    def two(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        d = x - x.mean((-2, -1), keepdim=True)
        return d * torch.rsqrt(d.pow(2).mean((-2, -1), keepdim=True) + EPS) * w + b

    assert_fires(two, (random(2, 5, 8), random(5, 8), random(5, 8)), PASSES, {"aten.layer_norm": 1} | ABSENT)


def test_layer_norm_leaves_other_scales_outside() -> None:
    def modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return _normal(x) * (1 + scale) + shift

    args = (random(2, 5, 8), random(2, 1, 8, seed=1), random(2, 1, 8, seed=2))
    assert_fires(modulated, args, PASSES, {"aten.layer_norm": 1, "aten.mul": 1, "aten.rsqrt": 0})


@pytest.mark.parametrize("spelling", [bert, variance])
def test_layer_norm_fires_on_dynamic_shapes(spelling: Spelling) -> None:
    dynamic = ({0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("length", min=2)}, None, None)
    w, b = random(8, seed=1), random(8, seed=2)
    result = rewrite(spelling, (random(2, 5, 8), w, b), PASSES, dynamic)
    assert_operators(result.program.module, {"aten.layer_norm": 1} | ABSENT)
    x = random(3, 7, 8)
    torch.testing.assert_close(result.program.module(x, w, b)[0], spelling(x, w, b))


def test_layer_norm_fires_on_a_dynamic_width() -> None:
    dynamic = ({2: torch.export.Dim("width", min=2)},)
    result = rewrite(_normal, (random(2, 5, 8),), PASSES, dynamic)
    assert_operators(result.program.module, {"aten.layer_norm": 1, "aten.rsqrt": 0})
    x = random(2, 5, 11)
    torch.testing.assert_close(result.program.module(x)[0], _normal(x))


def _transposed(x: Tensor) -> Tensor:
    d = x - x.mean(1, keepdim=True)
    return d * torch.rsqrt(d.pow(2).mean(1, keepdim=True) + EPS)


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def _over(x: Tensor, deviation: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / deviation


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: _over(x, (x.var(-1, keepdim=True) + EPS).sqrt()), "Bessel"),
        (lambda x: _over(x, (torch.var(x, -1, correction=2, keepdim=True) + EPS).sqrt()), "Bessel"),
        (lambda x: _over(x, x.std(-1, unbiased=False, keepdim=True) + EPS), "0.001 is added to the root"),
        (lambda x: _over(x, x.var(-1, unbiased=False, keepdim=True).sqrt() + EPS), "0.001 is added to the root"),
        (lambda x: _over(x, (x.var(1, unbiased=False, keepdim=True) + EPS).sqrt()), "axes is both [-1] and [1]"),
        (_transposed, "over axes [1], which are not the last ones"),
        (lambda x: _over(x, (x.var(-1, unbiased=False) + EPS).sqrt()), "keepdim is both True and False"),
        (lambda x: _over(x, (x.flip(0).var(-1, unbiased=False, keepdim=True) + EPS).sqrt()), "x is both"),
        (lambda x: _over(x, (x.var(-1, unbiased=False, keepdim=True) - EPS).sqrt()), "eps = -0.001"),
        (lambda x: _over(x, ((2 * _centred(x) ** 2).mean(-1, keepdim=True) + EPS).sqrt()), "multiplied by 2.0"),
    ],
)
def test_layer_norm_rejects(function: Callable[[Tensor], Tensor], reason: str) -> None:
    result = rewrite(function, (random(5, 5, 5),), PASSES)
    assert_operators(result.program.module, {"aten.layer_norm": 0, "fxopt.layer_norm": 0})
    told = [miss.reason for miss in result.near_misses]
    assert any(reason in text for text in told), told


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS),
        lambda x: (x + x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, unbiased=False, keepdim=True) + EPS),
        lambda x: (x - x.mean(-1, keepdim=True)) * torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + EPS),
        lambda x: (x - x.mean(-1, keepdim=True).detach()) * torch.rsqrt(x.var(-1, unbiased=False, keepdim=True) + EPS),
        lambda x: x.mean(-1, keepdim=True) - x * torch.rsqrt(x.var(-1, unbiased=False, keepdim=True) + EPS),
    ],
    ids=["mean of squares of x", "plus the mean", "times the root", "detached mean", "difference reversed"],
)
def test_layer_norm_does_not_match(function: Callable[[Tensor], Tensor]) -> None:
    assert_operators(rewrite(function, (random(2, 5, 8),), PASSES).program.module, {"aten.layer_norm": 0})
