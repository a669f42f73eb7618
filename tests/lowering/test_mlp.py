"""Lowering of feed-forward blocks: candidates, what stands around them, decisions by measurement, budget and cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import fxopt
from fxopt import backend, cache, driver
from fxopt.errors import FxoptWarning, LoweringError
from fxopt.frontend.export import from_export
from fxopt.ir.decision import Decision
from fxopt.ir.operators import overload
from fxopt.ir.program import Program
from fxopt.lowering import mlp as lowering
from fxopt.lowering.contest import Terms
from fxopt.lowering.kernels import kernel_sources
from fxopt.lowering.lower import lower
from fxopt.lowering.options import Options
from fxopt.lowering.probe import Base
from fxopt.lowering.surroundings import Followers, followers, residual_objection
from fxopt.testing import assert_within_budget, evaluate, oracle_gradients

C, H = 32, 64
B16 = torch.bfloat16
EXACT = (*(chosen.name for chosen in fxopt.passes.exact_pipeline()), "fuse-mlp")
Function = Callable[..., Any]


class Block(nn.Module):
    """A pre-norm block; ``read`` is what is made of its result."""

    def __init__(self, read: Function = lambda x: x, width: int = C) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, H), nn.Linear(H, width)
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.read(x + self.down(F.gelu(self.up(self.norm(x)))))
        return out


def rewritten(model: nn.Module | Function, *inputs: Tensor) -> Program:
    return driver.rewrite(from_export(model, inputs), Options(strict=True, passes=EXACT)).program


def blocks(program: Program) -> list[Node]:
    return list(program.graph.find_nodes(op="call_function", target=overload("mlp")))


def half(*sizes: int) -> Tensor:
    return torch.randn(*(sizes or (2, 5, C)), dtype=B16)


def site(model: nn.Module | Function, *inputs: Tensor) -> Node:
    (found,) = blocks(rewritten(model, *(inputs or (half(),))))
    return found


def block(**options: Any) -> Block:
    return Block(**options).to(B16).eval()


def decided(program: Program, training: bool = False, option: str = "auto", strict: bool = False) -> Decision:
    _, (decision,) = lower(program, training=training, option=option, strict=strict)
    return decision


@pytest.fixture
def any_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The operator, which computes in plain PyTorch on the CPU, counts as a kernel; nothing was measured yet.

    Any number of rows is measured.
    """
    objections = lowering._objections

    def elsewhere(found: Any, training: bool) -> list[str]:
        return [reason for reason in objections(found, training) if "CUDA" not in reason]

    monkeypatch.setattr(lowering, "_objections", elsewhere)
    monkeypatch.setattr(lowering, "_FEWEST", 0)
    monkeypatch.setitem(lowering._spent, "seconds", 0.0)
    cache.clear()
    yield
    cache.clear()


def timed(monkeypatch: pytest.MonkeyPatch, **seconds: float) -> list[str]:
    """Candidates take ``plain`` or ``triton`` seconds, later ones a little more; the names of those measured."""
    asked: list[str] = []

    def measure(found: Any, listed: Any, base: Base, failed: dict[str, str]) -> dict[str, float]:
        asked.extend(candidate.name for candidate in listed)
        times = {c.name: seconds["triton"] * (1 + 0.001 * n) for n, c in enumerate(listed)}
        return times | {"aten": seconds["plain"]}

    monkeypatch.setattr(lowering, "_measure", measure)
    return asked


def test_without_a_gpu_it_stays_what_it_was() -> None:
    lowered, (decision,) = lower(rewritten(block(), half()), training=False)
    assert decision.chosen == "aten" and "CUDA devices, not on cpu" in decision.reason
    assert len(blocks(lowered)) == 1


@pytest.mark.parametrize("read", [F.relu, lambda x: x], ids=["read", "result"])
@pytest.mark.parametrize("dtype", [torch.float32, B16])
def test_where_nothing_is_gained_the_base_compiler_sees_what_it_saw(read: Function, dtype: torch.dtype) -> None:
    model, x = nn.Sequential(Block(read), Block()).to(dtype).eval(), torch.randn(2, 5, C, dtype=dtype)
    seen = []
    for passes in (EXACT, EXACT[:-1]):
        program = driver.rewrite(from_export(model, (x,)), Options(strict=True, passes=passes)).program
        lowered, _ = lower(program, training=False)
        assert lowered.signature is not None
        bound = [lowered.signature.bound.get(node.name) for node in lowered.graph.find_nodes(op="placeholder")]
        operands = [model.get_parameter(name) if name else x for name in bound]
        nodes = make_fx(lowered.module)(*operands).graph.nodes
        seen.append([(str(n.target), str(n.args)) for n in nodes if n.op == "call_function"])
    assert seen[0] == seen[1] and len(seen[0]) > 5


def test_forced_lowerings() -> None:
    program = rewritten(block(), half())
    for option, reason in (("aten", "forced"), ("sdpa", "about attention")):
        decision = decided(program, option=option, strict=True)
        assert decision.chosen == "aten" and reason in decision.reason
    with pytest.warns(FxoptWarning, match=r"CUDA.*runs as aten"):
        lower(program, training=False, option="triton")
    with pytest.raises(LoweringError, match="use lower='auto'"):
        lower(program, training=False, option="triton", strict=True)


@pytest.mark.usefixtures("any_device")
@pytest.mark.parametrize(("plain", "triton", "chosen", "remark"), [
    (2e-4, 1.0e-4, "triton", "measured"), (2e-4, 1.95e-4, "aten", "a tie"), (2e-4, 3e-4, "aten", "measured"),
    (1e-5, 1e-6, "aten", "so short"),
])  # fmt: skip
def test_only_what_is_faster_is_chosen(
    plain: float, triton: float, chosen: str, remark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = timed(monkeypatch, plain=plain, triton=triton)
    program = rewritten(block(), half())
    lowered, (decision,) = lower(program, training=False)
    assert decision.chosen.startswith(chosen) and remark in decision.reason
    assert len(blocks(lowered)) == (chosen == "aten")
    assert asked == ["triton-128x64w8s3", "triton-64x64w4s3", "triton-128x32w8s3", "aten"]
    again = decided(program)
    assert "from the cache" in again.reason and again.chosen == decision.chosen and len(asked) == 4


@pytest.mark.usefixtures("any_device")
def test_one_measurement_serves_all_sites_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = timed(monkeypatch, plain=2e-4, triton=1e-4)
    stack = nn.Sequential(block(), block(), block())
    _, decisions = lower(rewritten(stack, half()), training=False)
    assert [d.chosen for d in decisions] == ["triton-128x64w8s3"] * 3
    assert len(asked) == 8, "two are read by norms, the last one leaves the graph"
    lower(rewritten(block(), half(8, 2, C)), training=False)
    assert len(asked) == 8, "16 rows, as 10 are rounded up"
    lower(rewritten(block(), half(9, 2, C)), training=False)
    assert len(asked) == 12


@pytest.mark.usefixtures("any_device")
def test_training_keeps_the_layers_and_their_gradients() -> None:
    torch._dynamo.reset()
    model, x = Block().train(), torch.randn(2, 5, C, requires_grad=True)
    options: dict[str, Any] = {"base": "aot_eager", "strict": True, "passes": EXACT}
    with backend.collecting() as (outcomes, failures):
        compiled = torch.compile(model, backend="fxopt", options=options)
        found, eager = evaluate(compiled, x), evaluate(model, x)
        assert_within_budget(found, eager, oracle_gradients(model, x), floor=10.0)
    assert not failures
    (decision,) = outcomes[0].decisions
    assert decision.chosen == "aten" and "there will be a backward" in decision.reason


@pytest.mark.usefixtures("any_device")
@pytest.mark.parametrize(("width", "dtype", "reason"), [
    (256, B16, "rows of 256 elements"), (24, B16, "the input width 24 is no multiple of 16"),
    (C, torch.float64, "float64 operands"), (C, torch.float32, "float32 operands"),
])  # fmt: skip
def test_what_no_kernel_serves_stays(width: int, dtype: torch.dtype, reason: str) -> None:
    def model(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, up)), down)

    operands = [torch.randn(*sizes, dtype=dtype) for sizes in ((2, 5, width), (H, width), (width, H))]
    decision = decided(rewritten(model, *operands))
    assert decision.chosen == "aten" and reason in decision.reason


@pytest.mark.usefixtures("any_device")
def test_widths_that_are_dynamic_add_no_guard() -> None:
    def model(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, up)), down)

    length, hidden = torch.export.Dim("length", min=2, max=64), torch.export.Dim("hidden", min=16, max=512)
    shapes = (({1: length}, {0: hidden}, {1: hidden}),)
    program = from_export(model, (half(), half(H, C), half(C, H)), dynamic_shapes=shapes)
    rewritten = driver.rewrite(program, Options(strict=True, passes=EXACT)).program
    decision = decided(rewritten)
    assert decision.chosen == "aten" and "the hidden width is dynamic" in decision.reason
    x, *weights = rewritten.graph.find_nodes(op="placeholder")
    assert isinstance(x.meta["val"].shape[1], torch.SymInt) and isinstance(
        weights[0].meta["val"].shape[0], torch.SymInt
    )


@pytest.mark.usefixtures("any_device")
@pytest.mark.parametrize(("fewest", "reason"), [(11, "not measured: 10 rows"), (10, "measured")])
def test_few_rows_are_not_measured(fewest: int, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = timed(monkeypatch, plain=2e-4, triton=1e-4)
    monkeypatch.setattr(lowering, "_FEWEST", fewest)
    assert decided(rewritten(block(), half())).reason.startswith(reason)
    assert bool(asked) == (fewest == 10)


@pytest.mark.usefixtures("any_device")
def test_no_measurement_is_begun_when_the_budget_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = timed(monkeypatch, plain=2e-4, triton=1e-4)
    monkeypatch.setitem(lowering._spent, "seconds", 6.5)
    decision = decided(rewritten(block(), half()))
    assert decision.chosen == "aten" and not asked
    assert "6 s were spent on feed-forward blocks already" in decision.reason


@pytest.mark.usefixtures("any_device")
def test_what_fails_is_said_and_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: Any, name: str, base: Base) -> Any:
        raise RuntimeError(f"{name} is broken")

    monkeypatch.setattr(lowering._Probe, "calls", failing)
    for _ in range(2):
        decision = decided(rewritten(block(), half()))
        assert decision.chosen == "aten" and "aten is broken" in decision.reason and "cache" not in decision.reason


def test_followers_are_told_apart() -> None:
    w = nn.Parameter(torch.randn(C, C, dtype=B16))
    assert followers(site(block())) == Followers(fused=False, kept=True)
    assert followers(site(block(read=F.relu))) == Followers(fused=True, kept=False)
    assert followers(site(block(read=lambda x: x.view(10, C) @ w))) == Followers(fused=False, kept=True)
    assert followers(site(block(read=lambda x: (x.relu(), x @ w)))) == Followers(fused=True, kept=True)


def test_a_block_that_reads_a_block_has_kernels_of_its_own() -> None:
    def model(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        for _ in range(2):
            x = x + F.linear(F.gelu(F.linear(x, up)), down)
        return x

    first, second = blocks(rewritten(model, half(), half(H, C), half(C, H)))
    assert followers(first) == followers(second) == Followers(fused=False, kept=True)


def test_a_residual_that_the_base_compiler_adds_as_it_is_made() -> None:
    def model(x: Tensor, y: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, up)), down) + y.exp()

    found = site(model, half(), half(), half(H, C), half(C, H))
    assert "exp) in the same kernel as the sum" in str(residual_objection(found))
    assert residual_objection(site(block())) is None


@pytest.mark.parametrize("views", [False, True])
def test_a_residual_that_is_the_input_is_written_anyway(views: bool) -> None:
    def model(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        stream = x.exp()
        rows = stream.view(10, C) if views else stream
        return stream + F.linear(F.gelu(F.linear(rows, up)), down).view(2, 5, C)

    found = site(model, half(), half(H, C), half(C, H))
    assert (found.args[5] is found.args[0]) != views and residual_objection(found) is None


@pytest.mark.usefixtures("any_device")
def test_kernels_are_listed() -> None:
    program = rewritten(nn.Sequential(block(), block()), half())
    lowered, _ = lower(program, training=False, option="triton")
    (text,) = kernel_sources(lowered).values()
    assert "feed-forward block" in text and "Configuration: 128x64w8s3" in text


@pytest.mark.parametrize("around", [Followers(True, True), Followers(True, False), Followers(False, True)])
@pytest.mark.parametrize("residual", ["none", "other", "x"])
def test_both_ways_of_a_probe_compute_the_same(around: Followers, residual: str) -> None:
    x, bias = half(40, C), half(H)
    added = {"none": None, "other": half(40, C), "x": x}[residual]
    probe = lowering._Probe((x, half(H, C) / 6, bias, half(C, H) / 8, None, added), "gelu", around)
    results = []
    for name in ("aten", "triton-32x32w4s1"):
        (call,) = probe.calls(name, Base())
        found = call()
        results.append([found] if isinstance(found, Tensor) else list(found))
    fused = around.fused and residual != "none"
    assert len(results[0]) == 1 + (fused and around.kept)
    torch.testing.assert_close(results[0], results[1], rtol=2e-2, atol=2e-2)


@pytest.mark.usefixtures("any_device")
def test_measuring_inside_of_a_compilation_leaves_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(lowering, "Terms", lambda *given: replace(Terms(*given), smallest=0.0))
    model, x, other = block(), half(4, 5, C), half(3, 7, C)
    options: dict[str, Any] = {"base": "aot_eager", "strict": True, "passes": EXACT}
    compiled = torch.compile(model, backend="fxopt", options=options)
    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.mark_dynamic(x, 1)
    with torch.no_grad(), backend.collecting() as (outcomes, failures):
        for given in (x, other):
            torch.testing.assert_close(compiled(given), model(given), rtol=2e-2, atol=2e-2)
    assert not failures
    (outcome,) = outcomes
    (decision,) = outcome.decisions
    assert decision.reason.startswith("measured") and len(decision.seconds) == 2, decision
