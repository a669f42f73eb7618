"""The pass `fuse-mlp`: which feed-forward blocks become one operator, and which must not."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxopt
from fxopt import driver
from fxopt.frontend.export import from_export
from fxopt.ir.operators import overload
from fxopt.lowering.options import Options
from fxopt.passes.canonical.gelu import Gelu
from fxopt.passes.canonical.inactive_dropout import InactiveDropout
from fxopt.passes.canonical.no_ops import NoOps
from fxopt.passes.canonical.silu import Silu
from fxopt.passes.mlp.fuse_mlp import FuseMlp
from fxopt.rewriter.pipeline import PipelineResult, run_pipeline
from fxopt.testing import assert_operators
from tests.canonical.support import DTYPES, assert_fires, capture, random, rewrite

PASSES = (NoOps(), InactiveDropout(), Gelu(), Silu(), FuseMlp())
EXACT = (*fxopt.passes.exact_pipeline(), FuseMlp())
C, H = 8, 24
FUSED = {"fxopt.mlp": 1, "aten.linear": 0}
KEPT = {"fxopt.mlp": 0}
Function = Callable[..., Any]


def arguments(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    sizes = ((2, 5, C), (H, C), (H,), (C, H), (C,))
    return tuple(random(*size, dtype=dtype, seed=n, scale=0.5) for n, size in enumerate(sizes))


def plain(x: Tensor, u: Tensor, a: Tensor, d: Tensor, b: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, u, a)), d, b)


def with_residual(x: Tensor, u: Tensor, a: Tensor, d: Tensor, b: Tensor) -> Tensor:
    return x + plain(x.tanh(), u, a, d, b)


def residual_last(x: Tensor, u: Tensor, a: Tensor, d: Tensor, b: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, u, a), approximate="tanh"), d, b) + x


def in_place(x: Tensor, u: Tensor, a: Tensor, d: Tensor, b: Tensor) -> Tensor:
    stream = x * 2
    stream += F.linear(F.silu(F.linear(x, u, a)), d, b)
    return stream


def without_biases(x: Tensor, u: Tensor, a: Tensor, d: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return F.linear(F.linear(x, u).relu(), d) + x, a, b


def by_hand(x: Tensor, u: Tensor, a: Tensor, d: Tensor, b: Tensor) -> Tensor:
    h = F.linear(x, u, a)
    return F.linear(0.5 * h * (1 + torch.erf(h / math.sqrt(2))), d, b)


def silu_by_hand(x: Tensor, u: Tensor, a: Tensor, d: Tensor, b: Tensor) -> Tensor:
    h = F.linear(x, u, a)
    return F.linear(h * torch.sigmoid(h), d, b) + x


def inactive(x: Tensor, u: Tensor, a: Tensor, d: Tensor, b: Tensor) -> Tensor:
    h = F.dropout(F.gelu(F.linear(x, u, a)), 0.5, training=False)
    return x + F.dropout(F.linear(h, d, b), 0.1, training=False)


def transposed(x: Tensor, u: Tensor, a: Tensor, d: Tensor, b: Tensor) -> Tensor:
    return F.linear(F.sigmoid(F.linear(x, d.t(), a)), u.t(), b)


def shared(x: Tensor, u: Tensor, a: Tensor, d: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return F.linear(F.gelu(F.linear(x, u, a)), u.t(), b), d


def computed(x: Tensor, u: Tensor, a: Tensor, d: Tensor, b: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, u * 2, a.exp())), d.tanh(), b)


SPELLINGS = (
    plain, with_residual, residual_last, in_place, without_biases, by_hand, silu_by_hand, inactive, transposed,
    shared, computed,
)  # fmt: skip
WITH_RESIDUAL = {with_residual, residual_last, in_place, without_biases, silu_by_hand, inactive}


def blocks(result: PipelineResult) -> list[torch.fx.Node]:
    return list(result.program.graph.find_nodes(op="call_function", target=overload("mlp")))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("function", SPELLINGS)
def test_it_fires(function: Function, dtype: torch.dtype) -> None:
    assert_fires(function, arguments(dtype), PASSES, FUSED, terms=10 * H)


@pytest.mark.parametrize("function", SPELLINGS)
def test_the_residual_goes_with_it(function: Function) -> None:
    (block,) = blocks(rewrite(function, arguments(), PASSES))
    assert (block.args[5] is not None) == (function in WITH_RESIDUAL)


def test_the_activation_is_named() -> None:
    names = [blocks(rewrite(f, arguments(), PASSES))[0].args[6] for f in SPELLINGS[:6]]
    assert names == ["gelu", "gelu", "gelu_tanh", "silu", "relu", "gelu"]
    assert blocks(rewrite(transposed, arguments(), PASSES))[0].args[6] == "sigmoid"


def test_of_three_layers_the_last_two_are_a_block() -> None:
    def three(x: Tensor, u: Tensor, a: Tensor, d: Tensor, b: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(F.gelu(F.linear(x, u, a)), d, b)), u, a)

    assert_fires(three, arguments(), PASSES, {"fxopt.mlp": 1, "aten.linear": 1, "aten.gelu": 1}, terms=10 * H)


def test_it_fires_on_dynamic_shapes() -> None:
    length = torch.export.Dim("length", min=2, max=64)
    result = rewrite(with_residual, arguments(), PASSES, ({1: length}, None, None, None, None))
    assert_operators(result.program.module, FUSED)
    given = (random(2, 9, C), *arguments()[1:])
    torch.testing.assert_close(result.program.module(*given)[0], with_residual(*given))


def _broadcast(x: Tensor, u: Tensor, a: Tensor, d: Tensor, b: Tensor) -> Tensor:
    return plain(x, u, a, d, b) + x[:1]


def _scaled(x: Tensor, u: Tensor, a: Tensor, d: Tensor, b: Tensor) -> Tensor:
    return torch.add(x, plain(x, u, a, d, b), alpha=2)


def _read_besides(x: Tensor, u: Tensor, a: Tensor, d: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    y = plain(x, u, a, d, b)
    return x + y, y.exp()


def _twice(x: Tensor, u: Tensor, a: Tensor, d: Tensor, b: Tensor) -> Tensor:
    y = plain(x, u, a, d, b)
    return y + y


def _dropped_result(x: Tensor, u: Tensor, a: Tensor, d: Tensor, b: Tensor) -> Tensor:
    return x + F.dropout(plain(x, u, a, d, b), 0.5, True)


def _widened(x: Tensor, u: Tensor, a: Tensor, d: Tensor, b: Tensor) -> Tensor:
    return plain(x, u, a, d, b) + x.double()


def _number(x: Tensor, u: Tensor, a: Tensor, d: Tensor, b: Tensor) -> Tensor:
    return plain(x, u, a, d, b) + 1.0


@pytest.mark.parametrize(
    "function", [_broadcast, _scaled, _read_besides, _twice, _dropped_result, _widened, _number, lambda *x: -plain(*x)]
)
def test_a_sum_that_is_no_residual_stays_behind_it(function: Function) -> None:
    result = rewrite(function, arguments(), PASSES)
    (block,) = blocks(result)
    assert block.args[5] is None
    if function is not _dropped_result:
        found = result.program.module(*arguments())
        torch.testing.assert_close(found[0], torch.utils._pytree.tree_leaves(function(*arguments()))[0])


def _hidden_read(x: Tensor, u: Tensor, a: Tensor, d: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    h = F.gelu(F.linear(x, u, a))
    return F.linear(h, d, b), h


def _before_activation(x: Tensor, u: Tensor, a: Tensor, d: Tensor, b: Tensor) -> Tensor:
    h = F.linear(x, u, a)
    return F.linear(F.gelu(h), d, b) + h.mean()


def _dropped(x: Tensor, u: Tensor, a: Tensor, d: Tensor, b: Tensor) -> Tensor:
    return x + F.linear(F.dropout(F.gelu(F.linear(x, u, a)), 0.5, True), d, b)


def _switched(x: Tensor, u: Tensor, a: Tensor, d: Tensor, b: Tensor) -> Tensor:
    h = F.gelu(F.linear(x, u, a))
    with torch.no_grad():
        x = x.exp()
    return F.linear(h, d, b) + x


def _partly_without_gradient(x: Tensor, u: Tensor, a: Tensor, d: Tensor, b: Tensor) -> Tensor:
    with torch.no_grad():
        h = F.gelu(F.linear(x, u, a))
    return F.linear(h, d, b)


def _detached(x: Tensor, u: Tensor, a: Tensor, d: Tensor, b: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, u, a)).detach(), d, b)


def _short_bias(x: Tensor, u: Tensor, a: Tensor, d: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return F.linear(F.gelu(F.linear(x, u, a)), d, b[:1]), b


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (_hidden_read, "are read by linear_1, output"),
        (_before_activation, "are read by"),
        (_dropped, "dropout is active on the hidden elements"),
        (_switched, "stands inside the block"),
        (_partly_without_gradient, "inside no_grad"),
        (_detached, "no gradient may flow into the hidden elements"),
        (_short_bias, "has the shape [1] for 8 elements"),
    ],
)
def test_it_says_why_not(function: Function, reason: str) -> None:
    result = rewrite(function, arguments(), PASSES)
    assert_operators(result.program.module, KEPT)
    told = [miss.reason for miss in result.near_misses]
    assert any(reason in text for text in told), told


@pytest.mark.parametrize(
    "function",
    [
        lambda x, u, a, d, b: F.linear(F.linear(x, u, a), d, b),
        lambda x, u, a, d, b: F.linear(F.linear(x, u, a).exp(), d, b),
        lambda x, u, a, d, b: F.linear(F.hardswish(F.linear(x, u, a)), d, b),
        lambda x, u, a, d, b: F.linear(F.linear(x, u, a) * torch.sigmoid(1.702 * F.linear(x, u, a)), d, b),
        lambda x, u, a, d, b: F.linear(F.silu(F.linear(x, u, a)) * F.linear(x, u), d, b),
        lambda x, u, a, d, b: F.linear(F.gelu(x @ u.t()), d, b) * a.sum(),
        lambda x, u, a, d, b: F.gelu(F.linear(x, u, a)) @ d.t() + b,
        lambda x, u, a, d, b: F.linear(F.gelu(F.linear(x, u, a)).flip(-1), d, b),
        lambda x, u, a, d, b: F.linear(F.gelu(F.linear(x, u, a).double()), d.double(), b.double()),
        lambda x, u, a, d, b: F.linear(F.gelu(F.layer_norm(F.linear(x, u, a), (H,))), d, b),
    ],
    ids=["none", "exp", "hardswish", "quick gelu", "gated", "matmul", "matmul after", "flip", "cast", "norm"],
)
def test_it_does_not_match(function: Function) -> None:
    assert_operators(rewrite(function, arguments(), PASSES).program.module, KEPT)


def test_a_write_inside_keeps_the_layers() -> None:
    program = capture(plain, arguments())
    _, second = program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    x, *_ = program.graph.find_nodes(op="placeholder")
    with program.graph.inserting_before(second):
        written = program.graph.call_function(torch.ops.aten.copy_.default, (x, x))
        written.meta["val"] = x.meta["val"]
    result = run_pipeline(program, PASSES, strict=True)
    assert_operators(result.program.module, KEPT)
    assert any("may change what it reads" in miss.reason for miss in result.near_misses)


def test_autocast_keeps_the_layers() -> None:
    def function(*given: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return plain(*given)

    assert_operators(rewrite(function, arguments(), PASSES).program.module, KEPT)


def named(function: Function, frozen: bool) -> PipelineResult:
    captured = replace(from_export(function, arguments()), frozen=frozen)
    return driver.rewrite(captured, Options(strict=True, passes=EXACT))


def test_it_runs_where_it_is_named_and_leaves_frozen_programs() -> None:
    assert "fuse-mlp" not in [one.name for one in fxopt.passes.exact_pipeline()]
    assert len(blocks(named(plain, frozen=False))) == 1 and not blocks(named(plain, frozen=True))


@pytest.mark.parametrize("function", [plain, with_residual, by_hand])
def test_the_report_lists_it_and_what_it_runs_as(function: Function) -> None:
    report = driver.run(from_export(function, arguments()), Options(strict=True, passes=EXACT), training=False).report
    (site,) = [site for site in report.sites if site.kind == "mlp"]
    (decision,) = report.decisions
    assert site.status == "rewritten" and "-> fxopt.mlp; gelu" in site.reason
    assert set(decision.nodes) <= set(site.nodes)
    assert decision.chosen == "aten" and "CUDA" in decision.reason


@pytest.mark.parametrize(("function", "reason"), [(_hidden_read, "are read by"), (_dropped, "dropout is active")])
def test_the_report_says_why_not(function: Function, reason: str) -> None:
    (site,) = [site for site in named(function, frozen=False).near_misses if site.kind == "mlp" and site.site]
    assert reason in site.reason
    report = driver.run(from_export(function, arguments()), Options(strict=True, passes=EXACT), training=False).report
    (kept,) = [site for site in report.sites if site.kind == "mlp"]
    assert kept.status == "kept" and reason in kept.reason


@pytest.mark.parametrize("function", SPELLINGS)
def test_numeric_verification_passes(function: Function) -> None:
    options = Options(strict=True, verify="numeric", passes=PASSES)
    result = driver.rewrite(from_export(function, arguments(torch.bfloat16)), options)
    assert_operators(result.program.module, FUSED)


class Encoder(nn.Module):
    """Pre-norm blocks as in vision transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(C) for _ in range(3))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(C, H), nn.GELU(), nn.Dropout(0.1), nn.Linear(H, C), nn.Dropout(0.1))
            for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x))
        return x


@pytest.mark.parametrize("training", [False, True])
def test_every_block_of_an_encoder(training: bool) -> None:
    torch._dynamo.reset()
    model, x = Encoder().train(training), torch.randn(2, 5, C)
    options: dict[str, Any] = {"base": "aot_eager", "strict": True, "passes": EXACT}
    compiled = torch.compile(model, backend="fxopt", options=options)
    with torch.no_grad(), fxopt.backend.collecting() as (outcomes, failures):
        found = compiled(x)
        if not training:
            torch.testing.assert_close(found, model(x))
    assert not failures
    (outcome,) = outcomes
    assert len(blocks(outcome.result)) == (0 if training else 3)
