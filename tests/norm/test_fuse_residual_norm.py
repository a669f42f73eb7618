"""The pass `fuse-residual-norm`: which sums and norms become one operator, and which must not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fxopt
from fxopt import driver
from fxopt.frontend.export import from_export
from fxopt.lowering.options import Options
from fxopt.passes.canonical.inactive_dropout import InactiveDropout
from fxopt.passes.canonical.layer_norm import LayerNorm
from fxopt.passes.canonical.no_ops import NoOps
from fxopt.passes.canonical.rms_norm import RmsNorm
from fxopt.passes.norm.fuse_residual_norm import FuseResidualNorm
from fxopt.rewriter.pipeline import PipelineResult, run_pipeline
from fxopt.testing import assert_operators
from tests.canonical.support import DTYPES, assert_fires, assert_same, capture, random, rewrite

EXACT = (*fxopt.passes.exact_pipeline(), FuseResidualNorm())
PASSES = (NoOps(), InactiveDropout(), LayerNorm(), RmsNorm(), FuseResidualNorm())
C = 8
LAYER = {"fxopt.residual_layer_norm": 1, "aten.layer_norm": 0, "fxopt.layer_norm": 0}
RMS = {"fxopt.residual_rms_norm": 1, "fxopt.rms_norm": 0}
GAP = "dropout is active between"
Function = Callable[..., Any]


def arguments(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return (*(random(2, 5, C, dtype=dtype, seed=n) for n in (0, 1)), *(random(C, dtype=dtype, seed=n) for n in (2, 3)))


def post_norm(x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x + residual, (C,), w, b, 1e-3)


def pre_norm(x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    stream = residual + x
    return stream + F.gelu(F.layer_norm(stream, (C,), w, b)), b


def without_weights(x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return F.layer_norm(x.add(residual), (C,)), w, b


def in_place(x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> Tensor:
    stream = residual * 2
    stream += x
    return F.layer_norm(stream, (C,), w, b) + stream


def by_hand(x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> Tensor:
    stream = x + residual
    wide = stream.to(torch.promote_types(x.dtype, torch.float32))
    d = wide - wide.mean(-1, keepdim=True)
    return (d * torch.rsqrt(d.pow(2).mean(-1, keepdim=True) + 1e-3)).to(x.dtype) * w + b


def inactive(x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(F.dropout(x + residual, 0.5, training=False), (C,), w, b)


def twice_the_same(x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return F.layer_norm(x + x, (C,), w, b), residual


def llama(x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    stream = x + residual
    wide = stream.to(torch.promote_types(x.dtype, torch.float32))
    normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-3)
    return w * normal.to(x.dtype), stream, b


def gemma(x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    wide = (x + residual).to(torch.promote_types(x.dtype, torch.float32))
    normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-3)
    return (normal * (1.0 + w.to(wide.dtype))).to(x.dtype), b


def rms_call(x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    stream = x + residual
    return F.rms_norm(stream, (C,), w, 1e-3) * stream, b


LAYERS = (post_norm, pre_norm, without_weights, in_place, by_hand, inactive, twice_the_same)
ALL = (*((f, LAYER) for f in LAYERS), *((f, RMS) for f in (llama, gemma, rms_call)))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize(("function", "expected"), ALL)
def test_it_fires(function: Function, expected: dict[str, int], dtype: torch.dtype) -> None:
    assert_fires(function, arguments(dtype), PASSES, expected)


@pytest.mark.parametrize(("function", "read"), [(post_norm, 0), (by_hand, 0), (gemma, 0), (pre_norm, 1), (llama, 1)])
def test_the_sum_is_a_result_where_it_is_read(function: Function, read: int) -> None:
    result = rewrite(function, arguments(), PASSES)
    assert_operators(result.program.module, {"_operator.getitem": 1 + read})
    assert ("(out, sum)" in result.replacements[-1].site.reason) == bool(read)


def test_dtypes_of_sum_and_weights_may_differ() -> None:
    x, residual, w, b = arguments(torch.bfloat16)
    wide = residual.detach().float().requires_grad_()
    assert_fires(post_norm, (x, wide, w.detach().float(), b.detach().float()), PASSES, LAYER)
    assert_fires(llama, (x, residual, w.detach().float(), b), PASSES, RMS)


def test_it_fires_on_dynamic_shapes() -> None:
    length = torch.export.Dim("length", min=2, max=64)
    result = rewrite(pre_norm, arguments(), PASSES, ({1: length}, {1: length}, None, None))
    assert_operators(result.program.module, LAYER)
    x, residual = random(2, 9, C), random(2, 9, C, seed=1)
    given = (x, residual, *arguments()[2:])
    assert_same(result.program.module, pre_norm, given)


def test_of_two_norms_of_a_sum_one_is_fused() -> None:
    def two(x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> Tensor:
        stream = x + residual
        return F.layer_norm(stream, (C,), w) * F.layer_norm(stream, (C,), b)

    assert_fires(two, arguments(), PASSES, {"fxopt.residual_layer_norm": 1, "aten.layer_norm": 1})


def test_a_chain_of_blocks_is_fused_at_every_sum() -> None:
    def chain(x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> Tensor:
        for _ in range(3):
            residual = residual + x
            x = F.linear(F.layer_norm(residual, (C,), w, b), torch.outer(w, b))
        return residual + x

    assert_fires(chain, arguments(), PASSES, {"fxopt.residual_layer_norm": 3, "aten.add": 1})


def test_a_sum_that_is_read_before_its_norm_is_made_before_its_reader() -> None:
    def early(x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        stream = x + residual
        other = stream.exp()
        return other, F.layer_norm(stream, (C,), w, b)

    assert_fires(early, arguments(), PASSES, LAYER)


def test_sites_are_norms_at_the_line_of_the_norm() -> None:
    found = assert_fires(pre_norm, arguments(), PASSES, LAYER)
    assert (found.site.kind, found.site.status) == ("norm", "rewritten")
    assert "layer_norm(stream" in found.site.source.code


def _mutated(x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return F.layer_norm(x + residual, (C,), w, b), x


def _early_reader(x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> Tensor:
    stream = x + residual
    return F.layer_norm(stream, (C,), w + stream.mean((0, 1)), b)


def _without_gradient(x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> Tensor:
    stream = x + residual
    with torch.no_grad():
        return F.layer_norm(stream, (C,), w, b)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x, r, w, b: F.layer_norm(x + r[:1], (C,), w, b), "the sum broadcasts [2, 5, 8] against [1, 5, 8]"),
        (lambda x, r, w, b: F.layer_norm(x + w, (C,), w, b), "the sum broadcasts [2, 5, 8] against [8]"),
        (lambda x, r, w, b: F.layer_norm(torch.add(x, r, alpha=2), (C,), w, b), "multiplied by 2"),
        (lambda x, r, w, b: F.layer_norm(F.dropout(x + r, 0.5, True), (C,), w, b), GAP),
        (lambda x, r, w, b: F.rms_norm(F.dropout(x + r, 0.5, True), (C,), w), GAP),
        (lambda x, r, w, b: F.layer_norm((x + r).double(), (C,)), "cast from torch.float32 to torch.float64"),
        (lambda x, r, w, b: F.layer_norm(x + r, (5, C)), "over 2 axes together"),
        (_early_reader, "a weight of its norm, is there"),
        (_without_gradient, "stands between the sum and its norm"),
    ],
)  # fmt: skip
def test_it_says_why_not(function: Function, reason: str) -> None:
    result = rewrite(function, arguments(), PASSES)
    assert_operators(result.program.module, {"fxopt.residual_layer_norm": 0, "fxopt.residual_rms_norm": 0})
    told = [miss.reason for miss in result.near_misses]
    assert any(reason in text for text in told), told


@pytest.mark.parametrize(
    "function",
    [
        lambda x, r, w, b: F.layer_norm(x - r, (C,), w, b),
        lambda x, r, w, b: F.layer_norm(x * r, (C,), w, b),
        lambda x, r, w, b: F.layer_norm(x + 1.0, (C,), w, b),
        lambda x, r, w, b: F.layer_norm((x + r).relu(), (C,), w, b),
        lambda x, r, w, b: F.layer_norm((x + r).transpose(0, 1), (C,), w, b),
        lambda x, r, w, b: F.layer_norm((x + r)[:, :3], (C,), w, b),
        lambda x, r, w, b: F.layer_norm((x + r).detach(), (C,), w, b),
        lambda x, r, w, b: F.layer_norm(x, (C,), w, b) + r,
        lambda x, r, w, b: F.group_norm(x + r, 1),
    ],
    ids=["sub", "mul", "scalar", "relu", "transpose", "slice", "detach", "norm first", "group norm"],
)
def test_it_does_not_match(function: Function) -> None:
    result = rewrite(function, arguments(), PASSES)
    assert_operators(result.program.module, {"fxopt.residual_layer_norm": 0, "fxopt.residual_rms_norm": 0})


def test_a_write_between_sum_and_norm_keeps_them_apart() -> None:
    program = capture(_mutated, arguments())
    (norm,) = program.graph.find_nodes(op="call_function", target=torch.ops.aten.layer_norm.default)
    x, residual, *_ = program.graph.find_nodes(op="placeholder")
    with program.graph.inserting_before(norm):
        written = program.graph.call_function(torch.ops.aten.copy_.default, (x, residual))
        written.meta["val"] = x.meta["val"]
    result = run_pipeline(program, PASSES, strict=True)
    assert_operators(result.program.module, {"fxopt.residual_layer_norm": 0})
    assert any("may change what they read" in miss.reason for miss in result.near_misses)


def default(function: Function, frozen: bool) -> PipelineResult:
    captured = replace(from_export(function, arguments()), frozen=frozen)
    return driver.rewrite(captured, Options(strict=True, passes=EXACT))


def test_it_runs_where_it_is_named_and_leaves_frozen_programs_to_the_folds() -> None:
    assert "fuse-residual-norm" not in [one.name for one in fxopt.passes.exact_pipeline()]
    assert_operators(default(post_norm, frozen=False).program.module, LAYER)
    assert_operators(default(post_norm, frozen=True).program.module, {"fxopt.residual_layer_norm": 0})


@pytest.mark.parametrize("function", [post_norm, pre_norm, llama])
def test_the_report_lists_it_and_what_it_runs_as(function: Function) -> None:
    report = driver.run(from_export(function, arguments()), Options(strict=True, passes=EXACT), training=False).report
    (site,) = [site for site in report.sites if site.kind == "norm"]
    (decision,) = report.decisions
    assert site.status == "rewritten" and "(x + residual) -> fxopt.residual_" in site.reason
    assert set(decision.nodes) <= set(site.nodes)
    assert decision.chosen == "aten" and "CUDA" in decision.reason


@pytest.mark.parametrize(("function", "expected"), ALL)
def test_numeric_verification_passes(function: Function, expected: dict[str, int]) -> None:
    options = Options(strict=True, verify="numeric", passes=PASSES)
    result = driver.rewrite(from_export(function, arguments(torch.bfloat16)), options)
    assert_operators(result.program.module, expected)


def test_rows_of_a_transposed_sum_lie_one_after_the_other() -> None:
    def function(x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> Tensor:
        total = x.transpose(1, 2).contiguous().transpose(1, 2) + residual.transpose(1, 2).contiguous().transpose(1, 2)
        return F.layer_norm(total, (C,), w, b).view(-1, C)

    result = driver.rewrite(from_export(function, arguments()), Options(strict=True, passes=PASSES))
    assert_operators(result.program.module, LAYER)
    torch.testing.assert_close(result.program.module(*arguments())[0], function(*arguments()))
