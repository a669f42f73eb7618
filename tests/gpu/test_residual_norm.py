"""Generated kernels of residual norms on the GPU: numbers, launches remembered, sites end to end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxopt
from fxopt import backend, cache, driver
from fxopt.codegen import launching
from fxopt.codegen.norm.residual_norm.config import backward_candidates, candidates
from fxopt.codegen.norm.residual_norm.operator import residual_norm_forward
from fxopt.frontend.export import from_export
from fxopt.lowering import residual_norm as lowering
from fxopt.lowering.options import Options
from fxopt.testing import assert_within_budget, evaluate, oracle_gradients
from tests.codegen.residual_norm.cases import CASES, Case, gradients, wide

pytestmark = pytest.mark.gpu

EXACT = (*(chosen.name for chosen in fxopt.passes.exact_pipeline()), "fuse-residual-norm")
WIDTHS = (64, 96, 384, 700, 768, 1000, 1024, 1536, 4096, 8192)
FORWARD_WIDTHS = (*WIDTHS, 16384, 20000)


def run(case: Case, operands: list[Tensor | None], config: str) -> tuple[Tensor, ...]:
    settings = (case.kind, case.eps, case.scale_after_cast, config, True, True)
    found: tuple[Tensor, ...] = residual_norm_forward(*operands, *settings)
    return found


def in_turn(configs: Sequence[str], name: str, width: int) -> str:
    """One of the configurations, the next one for the next case and for the next width."""
    return configs[(list(CASES).index(name) + FORWARD_WIDTHS.index(width)) % len(configs)]


@pytest.mark.parametrize("width", FORWARD_WIDTHS)
@pytest.mark.parametrize("name", CASES)
def test_forward_is_within_the_budget_of_eager(name: str, width: int) -> None:
    case = CASES[name]
    operands = case.operands(3, 43, width, device="cuda")
    eager, exact = case.meaning(operands), case.meaning(wide(operands))
    normal, total, *_ = run(case, operands, in_turn(candidates(width), name, width))
    torch.testing.assert_close(total, eager[1], rtol=0, atol=0)
    assert_within_budget(normal, eager[0], exact[0], floor=1.0)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_within_the_budget_of_eager(name: str, width: int) -> None:
    case, rows = CASES[name], 2000
    operands = case.operands(2, rows // 2, width, device="cuda")
    eager = case.meaning(operands)
    torch.manual_seed(1)
    cotangents = [torch.randn_like(result) for result in eager]
    before = gradients(case, operands, cotangents)
    exact = gradients(case, wide(operands), [c.double() for c in cotangents])
    weight = operands[2]
    # Terms of these sizes are subtracted from one another, or added up.
    slope = float(cotangents[0].abs().max() * (1 if weight is None else weight.abs().max()))
    config = in_turn(backward_candidates(width), name, width)
    leaves = [None if x is None else x.detach().requires_grad_() for x in operands]
    present = [x for x in leaves if x is not None]
    normal, total, *_ = run(case, leaves, f"{candidates(width)[0]}/{config}")
    found = torch.autograd.grad([normal, total], present, cotangents)
    for n, (a, b, c) in enumerate(zip(found, before, exact, strict=True)):
        assert a.dtype == b.dtype
        assert_within_budget(a, b, c, floor=slope if n < 2 else float(rows))


@pytest.mark.parametrize("name", ["layer bf16", "rms llama"])
def test_two_runs_agree_to_the_last_bit(name: str) -> None:
    case = CASES[name]
    leaves = [None if x is None else x.requires_grad_() for x in case.operands(4096, 768, device="cuda")]
    present = [x for x in leaves if x is not None]

    def once() -> list[Tensor]:
        normal, total, *_ = run(case, leaves, "4w4/4w4p4")
        ones = [torch.ones_like(normal), torch.ones_like(total)]
        return [normal, total, *torch.autograd.grad([normal, total], present, ones)]

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


def test_launches_are_remembered_by_layout() -> None:
    case = CASES["layer bf16"]
    launching._REPLAYS.clear()
    for rows in (64, 64, 80):
        operands = case.operands(rows, 768, device="cuda", seed=rows)
        eager = case.meaning(operands)
        for _ in range(2):
            normal, total, *_ = run(case, operands, "4w4")
            torch.testing.assert_close(total, eager[1], rtol=0, atol=0)
            assert_within_budget(normal, eager[0], case.meaning(wide(operands))[0], floor=1.0)
    assert len(launching._REPLAYS) == 2


def test_rows_apart_and_misaligned() -> None:
    case = CASES["layer bf16"]
    x, residual, weight, bias = case.operands(50, 768, device="cuda")
    assert x is not None and residual is not None
    apart = torch.zeros(50, 1000, dtype=x.dtype, device="cuda")[:, 3:771].copy_(x)
    expected = run(case, [x, residual, weight, bias], "4w4")
    for rows in (apart, x.t().contiguous().t(), x):
        found = run(case, [rows, residual, weight, bias], "4w4")
        assert torch.equal(found[1], expected[1])
        # Elements that can't be read sixteen bytes at a time are added up in another order.
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


class PreNorm(nn.Module):
    """Two pre-norm blocks of products only, whose sums stand alone."""

    def __init__(self, width: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.norms = nn.ModuleList(norm(width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        branch = self.layers[0](x)
        for norm, layer in zip(self.norms[1:], self.layers[1:], strict=True):
            x = x + branch
            branch = layer(norm(x))
        out: Tensor = x + branch
        return out


class PostNorm(PreNorm):
    """The same with the norm after the sum."""

    def forward(self, x: Tensor) -> Tensor:
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = norm(x + layer(x))
        return x


@pytest.mark.parametrize("lower", ["auto", "triton"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("model", [PreNorm, PostNorm])
def test_sites_run_end_to_end(
    model: type[PreNorm], norm: Callable[[int], nn.Module], training: bool, lower: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    monkeypatch.setattr(lowering, "_BUDGET", float("inf"))
    monkeypatch.setattr(lowering, "_NOTHING_GAINED", 0)
    module = model(512, norm).cuda().to(torch.bfloat16).train(training)
    x = torch.randn(16, 256, 512, device="cuda", dtype=torch.bfloat16, requires_grad=training)
    with torch.set_grad_enabled(training), backend.collecting() as (outcomes, failures):
        options: dict[str, Any] = {"lower": lower, "strict": True, "passes": EXACT}
        compiled = torch.compile(module, backend="fxopt", options=options)
        found, eager = evaluate(compiled, x), evaluate(module, x)
        assert_within_budget(found, eager, oracle_gradients(module, x), floor=4096.0**0.5 if training else 1.0)
    assert not failures
    decisions = [decision for outcome in outcomes for decision in outcome.decisions]
    assert len(decisions) == (4 if model is PostNorm else 3)
    if lower == "triton":
        assert all(decision.chosen.startswith("triton") for decision in decisions)
    else:
        assert all(decision.reason.startswith("measured") for decision in decisions), decisions


def test_row_counts_that_change_compile_nothing_anew() -> None:
    torch._dynamo.reset()
    module = PostNorm(512, nn.LayerNorm).cuda().to(torch.bfloat16).eval()
    options: dict[str, Any] = {"lower": "triton", "strict": True, "passes": EXACT}
    compiled = torch.compile(module, backend="fxopt", options=options, dynamic=True)
    with torch.no_grad(), backend.collecting() as (outcomes, _):
        compiled(torch.randn(4, 100, 512, device="cuda", dtype=torch.bfloat16))
        count = len(outcomes)
        for batch, length in ((3, 77), (8, 128), (2, 1001)):
            x = torch.randn(batch, length, 512, device="cuda", dtype=torch.bfloat16)
            torch.testing.assert_close(compiled(x), module(x), rtol=3e-2, atol=3e-2)
    assert len(outcomes) == count


def test_what_was_measured_is_kept_and_a_tie_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    cache.clear()
    monkeypatch.setitem(lowering._spent, "seconds", 0.0)
    monkeypatch.setattr(lowering, "_NOTHING_GAINED", 0)
    x = torch.randn(32768, 1024, device="cuda", dtype=torch.bfloat16)

    def model(x: Tensor, y: Tensor) -> Tensor:
        return F.layer_norm(x + y, (1024,))

    for reason in ("measured", "measured, from the cache"):
        torch._dynamo.reset()
        with torch.no_grad():
            program = from_export(model, (x, x))
            (decision,) = driver.run(program, Options(strict=True, passes=EXACT), training=False).decisions
        assert decision.reason.startswith(reason) and "failed" not in decision.reason, decision
        faster = [name for name, s in decision.seconds.items() if s <= lowering._TIE * decision.seconds["aten"]]
        assert decision.chosen in (faster or ["aten"])
