"""The pass `rms-norm`: how Llama, T5, Gemma and others write it, and what is another norm."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fxopt.errors import OptionError
from fxopt.passes.canonical.layer_norm import LayerNorm
from fxopt.passes.canonical.no_ops import NoOps
from fxopt.passes.canonical.rms_norm import RmsNorm
from fxopt.testing import assert_operators
from tests.canonical.support import DTYPES, assert_fires, random, rewrite

PASSES = (NoOps(), LayerNorm(), RmsNorm())
EPS = 1e-3


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def llama(x: Tensor, w: Tensor) -> Tensor:
    wide = _wide(x)
    normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return w * normal.to(x.dtype)


def t5(x: Tensor, w: Tensor) -> Tensor:
    variance = _wide(x).pow(2).mean(-1, keepdim=True)
    return w * (x * torch.rsqrt(variance + EPS)).to(w.dtype)


def gemma(x: Tensor, w: Tensor) -> Tensor:
    wide = _wide(x)
    normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return (normal * (1.0 + _wide(w))).type_as(x)


def gemma3n(x: Tensor, w: Tensor) -> Tensor:
    wide = _wide(x)
    normal = wide * torch.pow(wide.pow(2).mean(-1, keepdim=True) + EPS, -0.5)
    return (normal * _wide(w)).type_as(x)


def plain(x: Tensor, w: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS) * w


def reciprocal(x: Tensor, w: Tensor) -> Tensor:
    return x * (1 / (EPS + x.square().mean(2, keepdim=True)).sqrt()) * w


def restored(x: Tensor, w: Tensor) -> Tensor:
    return w * (x * torch.rsqrt((x**2).mean(-1).unsqueeze(-1) + EPS))


def unscaled(x: Tensor, w: Tensor) -> Tensor:
    wide = _wide(x)
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def left_wide(x: Tensor, w: Tensor) -> Tensor:
    wide = _wide(x)
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS) * _wide(w)


def call(x: Tensor, w: Tensor) -> Tensor:
    return functional.rms_norm(x, (8,), w, EPS)


def call_unscaled(x: Tensor, w: Tensor) -> Tensor:
    return functional.rms_norm(x, (8,))


SPELLINGS = (
    llama, t5, gemma, gemma3n, plain, reciprocal, restored, unscaled, left_wide, call, call_unscaled,
)  # fmt: skip


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_rms_norm_fires(spelling: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> None:
    args = (random(2, 5, 8, dtype=dtype), random(8, dtype=dtype, seed=1))
    absent = {"aten.rsqrt": 0, "aten.pow": 0, "aten.sqrt": 0, "aten.mean": 0, "aten.mul": 0, "aten.rms_norm": 0}
    assert_fires(spelling, args, PASSES, {"fxopt.rms_norm": 1} | absent)


@pytest.mark.parametrize("spelling", [llama, left_wide, gemma])
def test_rms_norm_fires_with_a_wider_weight(spelling: Callable[[Tensor, Tensor], Tensor]) -> None:
    args = (random(2, 5, 8, dtype=torch.bfloat16), random(8, seed=1))
    assert_fires(spelling, args, PASSES, {"fxopt.rms_norm": 1, "aten.mul": 0})


def test_rms_norm_scales_where_the_original_does() -> None:
    args = (random(2, 5, 8, dtype=torch.bfloat16), random(8, dtype=torch.bfloat16, seed=1))
    for spelling, after in ((llama, True), (gemma, False), (t5, True)):
        result = rewrite(spelling, args, PASSES)
        (node,) = result.program.graph.find_nodes(op="call_function", target=torch.ops.fxopt.rms_norm.default)
        assert node.args[3:] == (EPS, torch.float32, after)


def test_rms_norm_fires_over_two_axes() -> None:
    def two(x: Tensor, w: Tensor) -> Tensor:
        return w * (x * torch.rsqrt(x.pow(2).mean((-2, -1), keepdim=True) + EPS))

    assert_fires(two, (random(2, 5, 8), random(5, 8, seed=1)), PASSES, {"fxopt.rms_norm": 1, "aten.mul": 0})


def test_rms_norm_leaves_other_scales_outside() -> None:
    def gated(x: Tensor, gate: Tensor) -> Tensor:
        return gate * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS))

    for sizes in ((2, 5, 8), (2, 1, 8), (1,)):
        assert_fires(gated, (random(2, 5, 8), random(*sizes, seed=1)), PASSES, {"fxopt.rms_norm": 1, "aten.mul": 1})


def test_rms_norm_fires_on_dynamic_shapes() -> None:
    dynamic = ({0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("length", min=2)}, None)
    result = rewrite(llama, (random(2, 5, 8), random(8, seed=1)), PASSES, dynamic)
    assert_operators(result.program.module, {"fxopt.rms_norm": 1, "aten.rsqrt": 0})
    x, w = random(3, 7, 8), random(8, seed=1)
    torch.testing.assert_close(result.program.module(x, w)[0], llama(x, w))


def test_rms_norm_sites_are_norms() -> None:
    found = assert_fires(llama, (random(2, 5, 8), random(8)), PASSES, {"fxopt.rms_norm": 1})
    assert (found.site.kind, found.site.status) == ("norm", "rewritten")


def test_rms_norm_needs_layer_norm_first() -> None:
    with pytest.raises(OptionError, match="layer-norm"):
        rewrite(llama, (random(2, 5, 8), random(8)), RmsNorm())


def _root_of(x: Tensor, variance: Tensor) -> Tensor:
    return x * torch.rsqrt(variance)


def _halved(x: Tensor) -> Tensor:
    half = x.half()
    return _root_of(half, half.float().pow(2).mean(-1, keepdim=True) + EPS)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: _root_of(x, x.pow(2).mean(1, keepdim=True) + EPS), "over axes [1], which are not the last"),
        (lambda x: _root_of(x, x.pow(2).mean((0, 2), keepdim=True) + EPS), "over axes [0, 2]"),
        (lambda x: _root_of(x, x.pow(2).mean(-1) + EPS), "not put back"),
        (lambda x: _root_of(x, (2 * x * x).mean(-1, keepdim=True) + EPS), "that of 2.0 * x²"),
        (lambda x: _root_of(x, x.pow(2).mean(-1, keepdim=True) - EPS), "eps = -0.001"),
        (lambda x: _halved(x).double(), "neither"),
        (lambda x: x / (x.pow(2).mean(-1, keepdim=True).sqrt() + EPS), "0.001 is added to the root"),
        (lambda x: _root_of(x.flip(0), x.pow(2).mean(-1, keepdim=True) + EPS), "x is both"),
        (lambda x: _root_of(x, x.pow(3).mean(-1, keepdim=True) + EPS), "product"),
    ],
)
def test_rms_norm_rejects(function: Callable[[Tensor], Tensor], reason: str) -> None:
    result = rewrite(function, (random(5, 5, 5),), PASSES)
    (output,) = result.program.graph.output_node().all_input_nodes
    assert output.target is not torch.ops.fxopt.rms_norm.default
    told = [miss.reason for miss in result.near_misses]
    assert any(reason in text for text in told), told


@pytest.mark.parametrize(
    "function",
    [
        lambda x: functional.normalize(x, dim=-1),
        lambda x: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + EPS),
        lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True).clamp(min=EPS)),
        lambda x: x * torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPS),
        lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True).detach() + EPS),
    ],
    ids=["normalize", "sum", "clamp", "sqrt", "detached"],
)
def test_rms_norm_does_not_match(function: Callable[[Tensor], Tensor]) -> None:
    result = rewrite(function, (random(2, 5, 8),), PASSES)
    assert_operators(result.program.module, {"fxopt.rms_norm": 0})
