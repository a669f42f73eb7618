"""The kernel of narrow feed-forward blocks on a GPU: numerics, replayed launches, sites end to end, measurements."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxopt
from fxopt import backend, cache, driver
from fxopt.codegen import launching
from fxopt.codegen.mlp.narrow_mlp.config import candidates
from fxopt.codegen.mlp.narrow_mlp.operator import mlp_forward
from fxopt.frontend.export import from_export
from fxopt.lowering import contest
from fxopt.lowering import mlp as lowering
from fxopt.lowering.options import Options
from fxopt.testing import assert_within_budget, evaluate, oracle_gradients
from tests.codegen.narrow_mlp.cases import CASES, Case, Operands, wide

pytestmark = pytest.mark.gpu

EXACT = (*(chosen.name for chosen in fxopt.passes.exact_pipeline()), "fuse-mlp")
B16 = torch.bfloat16


def configs(case: Case, width: int) -> tuple[str, ...]:
    major, minor = torch.cuda.get_device_capability()
    return candidates(case.problem(width, 4 * width), 10 * major + minor)


def check(case: Case, operands: Operands, config: str) -> None:
    found = mlp_forward(*operands, case.activation, config)
    eager, exact = case.meaning(operands), case.meaning(wide(operands))
    assert found.is_contiguous() and found.shape == eager.shape
    assert_within_budget(found, eager, exact, floor=1.0)


@pytest.mark.parametrize("rows", [1000, 4097])
@pytest.mark.parametrize("width", [32, 96, 128, 192])
@pytest.mark.parametrize("name", CASES)
def test_it_is_within_the_budget_of_eager(name: str, width: int, rows: int) -> None:
    case = CASES[name]
    listed = configs(case, width)
    # One of the configurations, the next one for the next case.
    config = listed[(list(CASES).index(name) + rows) % len(listed)]
    check(case, case.operands(rows, width=width, hidden=4 * width, device="cuda"), config)


@pytest.mark.parametrize("width", [32, 64, 96, 128, 192])
@pytest.mark.parametrize("name", ["gelu bf16", "gelu f16"])
def test_every_configuration(name: str, width: int) -> None:
    case = CASES[name]
    for config in configs(case, width):
        check(case, case.operands(3, 333, width=width, hidden=4 * width, device="cuda"), config)


@pytest.mark.parametrize(("width", "hidden", "out"), [(96, 64, 32), (32, 128, 80), (16, 48, 192), (176, 80, 16)])
@pytest.mark.parametrize("name", ["gelu bf16", "silu f16"])
def test_results_may_be_wider_or_narrower(name: str, width: int, hidden: int, out: int) -> None:
    case = CASES[name]
    operands = case.operands(777, width=width, hidden=hidden, out=out, device="cuda")
    check(case, operands, candidates(case.problem(width, hidden, out))[0])


def test_nan_and_infinity_stay_in_their_rows() -> None:
    case = CASES["gelu bf16"]
    operands = case.operands(300, width=96, hidden=384, device="cuda")
    operands[0][2, 31], operands[0][4, 0] = torch.nan, torch.inf
    found = mlp_forward(*operands, "gelu", configs(case, 96)[0])
    assert torch.equal(found.isnan(), case.meaning(operands).isnan())


def test_two_runs_agree_to_the_last_bit() -> None:
    case = CASES["gelu bf16"]
    operands = case.operands(20000, width=96, hidden=384, device="cuda")
    for config in configs(case, 96):
        first, second = (mlp_forward(*operands, "gelu", config) for _ in range(2))
        assert torch.equal(first, second)


def test_rows_apart_and_misaligned_and_weights_of_any_strides() -> None:
    case = CASES["gelu bf16"]
    x, up, up_bias, down, down_bias, residual = case.operands(1000, width=96, hidden=384, device="cuda")
    apart = torch.zeros(1000, 200, dtype=x.dtype, device="cuda")[:, 3:99].copy_(x)
    for rows in (apart, x.t().contiguous().t(), x):
        check(case, (rows, up, up_bias, down, down_bias, residual), configs(case, 96)[0])
    check(case, (x, up.t().contiguous().t(), up_bias, up.t(), down_bias, x), configs(case, 96)[0])


def test_addresses_beyond_32_bits() -> None:
    case, rows = CASES["gelu bf16"], 48
    x, *rest = case.operands(rows, width=32, hidden=128, device="cuda")
    far = torch.empty(rows * 2**26, dtype=B16, device="cuda").as_strided((rows, 32), (2**26, 1)).copy_(x)
    check(case, (far, *rest), configs(case, 32)[0])  # type: ignore[arg-type]


def test_launches_are_remembered_by_layout() -> None:
    case = CASES["gelu bf16"]
    launching._REPLAYS.clear()
    for rows in (64, 64, 80):
        for _ in range(2):
            check(case, case.operands(rows, width=96, hidden=384, device="cuda", seed=rows), configs(case, 96)[0])
    assert len(launching._REPLAYS) == 2


class Encoder(nn.Module):
    """Pre-norm feed-forward blocks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x))
        return x


@pytest.mark.parametrize("lower", ["auto", "triton"])
@pytest.mark.parametrize("width", [96, 192])
def test_sites_run_end_to_end(width: int, lower: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    monkeypatch.setattr(lowering, "_BUDGET", float("inf"))
    module = Encoder(width).cuda().to(B16).eval()
    x = torch.randn(16, 512, width, device="cuda", dtype=B16)
    options: dict[str, Any] = {"lower": lower, "strict": True, "passes": EXACT}
    compiled = torch.compile(module, backend="fxopt", options=options)
    with torch.no_grad(), backend.collecting() as (outcomes, failures):
        found = compiled(x)
        assert_within_budget(found, module(x), module.double()(x.double()), floor=1.0)
    assert not failures
    decisions = [decision for outcome in outcomes for decision in outcome.decisions]
    assert len(decisions) == 3
    if lower == "triton":
        assert all(decision.chosen.startswith("triton") for decision in decisions)
    else:
        assert all(decision.reason.startswith("measured") for decision in decisions), decisions


def test_training_is_left_alone() -> None:
    torch._dynamo.reset()
    module = Encoder(96).cuda().to(B16)
    x = torch.randn(16, 512, 96, device="cuda", dtype=B16, requires_grad=True)
    with backend.collecting() as (outcomes, failures):
        options: dict[str, Any] = {"strict": True, "passes": EXACT}
        compiled = torch.compile(module, backend="fxopt", options=options)
        found, eager = evaluate(compiled, x), evaluate(module, x)
        assert_within_budget(found, eager, oracle_gradients(module, x), floor=8192.0**0.5)
    assert not failures
    assert all("there will be a backward" in d.reason for outcome in outcomes for d in outcome.decisions)


def test_row_counts_that_change_compile_nothing_anew() -> None:
    torch._dynamo.reset()
    module = Encoder(96).cuda().to(B16).eval()
    options: dict[str, Any] = {"lower": "triton", "strict": True, "passes": EXACT}
    compiled = torch.compile(module, backend="fxopt", options=options, dynamic=True)
    with torch.no_grad(), backend.collecting() as (outcomes, _):
        compiled(torch.randn(4, 100, 96, device="cuda", dtype=B16))
        count = len(outcomes)
        for batch, length in ((3, 77), (8, 128), (2, 1001)):
            x = torch.randn(batch, length, 96, device="cuda", dtype=B16)
            torch.testing.assert_close(compiled(x), module(x), rtol=3e-2, atol=3e-2)
    assert len(outcomes) == count


def test_cuda_graphs_of_compiled_blocks() -> None:
    torch._dynamo.reset()
    module = Encoder(96).cuda().to(B16).eval()
    options: dict[str, Any] = {"lower": "triton", "passes": EXACT, "inductor": {"triton.cudagraphs": True}}
    compiled = torch.compile(module, backend="fxopt", options=options)
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(16, 512, 96, device="cuda", dtype=B16)
            torch.testing.assert_close(compiled(x).clone(), module(x), rtol=3e-2, atol=3e-2)


def test_what_was_measured_is_kept_and_a_tie_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    cache.clear()
    monkeypatch.setitem(lowering._spent, "seconds", 0.0)
    operands = CASES["gelu bf16"].operands(65536, width=96, hidden=384, device="cuda")

    def model(x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor, residual: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, up, up_bias)), down, down_bias) + residual

    for reason in ("measured", "measured, from the cache"):
        torch._dynamo.reset()
        with torch.no_grad():
            program = from_export(model, operands)
            (decision,) = driver.run(program, Options(strict=True, passes=EXACT), training=False).decisions
        assert decision.reason.startswith(reason) and "failed" not in decision.reason, decision
        faster = [name for name, s in decision.seconds.items() if s <= contest.TIE * decision.seconds["aten"]]
        assert decision.chosen in (faster or ["aten"])
