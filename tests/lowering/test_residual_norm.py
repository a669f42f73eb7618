"""Lowering of residual norms: candidates, what stands around them, decisions by measurement, budget and cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
from fxopt.ir.operators import overload
from fxopt.ir.program import Program
from fxopt.lowering import residual_norm as lowering
from fxopt.lowering.contest import Terms, best
from fxopt.lowering.kernels import kernel_sources
from fxopt.lowering.lower import lower
from fxopt.lowering.options import Options
from fxopt.lowering.probe import Base, Probe
from fxopt.lowering.surroundings import Surroundings, fusion_objection, surroundings
from fxopt.testing import assert_within_budget, evaluate, oracle_gradients, together

C = 16
EXACT = (*(chosen.name for chosen in fxopt.passes.exact_pipeline()), "fuse-residual-norm")
Function = Callable[..., Any]


class Block(nn.Module):
    """A pre-norm block; ``branch`` is what is added to the stream, ``read`` what reads the norm."""

    def __init__(self, branch: Function | None = None, read: Function | None = None, bias: bool = True) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(C, C, bias=bias), nn.Linear(C, C)
        self.norm = nn.LayerNorm(C)
        self.branch, self.read = branch or (lambda x: x), read or self.after

    def forward(self, x: Tensor) -> Tensor:
        stream = x + self.branch(self.before(x.exp()))
        out: Tensor = stream + self.after(self.read(self.norm(stream)))
        return out


def rewritten(model: nn.Module | Function, *inputs: Tensor) -> Program:
    return driver.rewrite(from_export(model, inputs), Options(strict=True, passes=EXACT)).program


def norms(program: Program) -> list[Node]:
    return [n for name in lowering.NAMES for n in program.graph.find_nodes(op="call_function", target=overload(name))]


def site(model: nn.Module | Function, *inputs: Tensor) -> Node:
    (found,) = norms(rewritten(model, *(inputs or (torch.randn(2, 5, C),))))
    return found


@pytest.fixture
def any_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The operators, which compute in plain PyTorch on the CPU, count as kernels; nothing was measured yet.

    Rows of any length are measured.
    """
    objection = lowering._objection

    def elsewhere(found: Any) -> str | None:
        reason = objection(found)
        return None if reason is not None and "CUDA" in reason else reason

    monkeypatch.setattr(lowering, "_objection", elsewhere)
    monkeypatch.setattr(lowering, "_NOTHING_GAINED", 0)
    monkeypatch.setitem(lowering._spent, "seconds", 0.0)
    cache.clear()
    yield
    cache.clear()


def timed(monkeypatch: pytest.MonkeyPatch, **seconds: float) -> list[str]:
    """Candidates take ``plain`` or ``triton`` seconds each; the names of those that were measured."""
    asked: list[str] = []

    def measure(found: Any, listed: Any, base: Base, failed: dict[str, str]) -> dict[str, float]:
        asked.extend(candidate.name for candidate in listed)
        return {c.name: seconds["plain" if c.name == "aten" else "triton"] for c in listed}

    monkeypatch.setattr(lowering, "_measure", measure)
    return asked


def test_without_a_gpu_it_stays_what_it_was() -> None:
    model, x = Block(), torch.randn(2, 5, C)
    lowered, (decision,) = lower(rewritten(model, x), training=False)
    assert decision.chosen == "aten" and "CUDA devices, not on cpu" in decision.reason
    assert len(norms(lowered)) == 1


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_nothing_is_gained_the_base_compiler_sees_what_it_saw(norm: type[nn.Module], dtype: torch.dtype) -> None:
    model, x = Block(), torch.randn(2, 5, C, dtype=dtype)
    model.norm = norm(C)  # type: ignore[assignment]
    model.to(dtype).eval()
    passes = [name for name in EXACT if name != "fuse-residual-norm"]
    seen = []
    for options in (Options(strict=True, passes=EXACT), Options(strict=True, passes=tuple(passes))):
        program = driver.rewrite(from_export(model, (x,)), options).program
        lowered, _ = lower(program, training=False)
        operands = [model.get_parameter(n) if n else x for n in _bound(lowered)]
        seen.append([str(n.target) for n in make_fx(lowered.module)(*operands).graph.nodes if n.op == "call_function"])
    assert seen[0] == seen[1] and len(seen[0]) > 5


def _bound(program: Program) -> list[str | None]:
    assert program.signature is not None
    return [program.signature.bound.get(node.name) for node in program.graph.find_nodes(op="placeholder")]


def test_forced_lowerings() -> None:
    program = rewritten(Block(), torch.randn(2, 5, C))
    for option, reason in (("aten", "forced"), ("sdpa", "about attention")):
        _, (decision,) = lower(program, training=False, option=option, strict=True)
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
    program = rewritten(Block(), torch.randn(2, 5, C))
    lowered, (decision,) = lower(program, training=False)
    assert decision.chosen.startswith(chosen) and remark in decision.reason
    assert len(norms(lowered)) == (chosen == "aten")
    assert asked == ["triton-16w4", "triton-8w4", "aten"]
    _, (again,) = lower(program, training=False)
    assert "from the cache" in again.reason and again.chosen == decision.chosen and len(asked) == 3


@pytest.mark.usefixtures("any_device")
def test_one_measurement_serves_all_sites_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = timed(monkeypatch, plain=2e-4, triton=1e-4)
    lowered, decisions = lower(rewritten(nn.Sequential(Block(), Block()), torch.randn(2, 5, C)), training=False)
    assert [d.chosen for d in decisions] == ["triton-16w4"] * 2 and len(asked) == 3
    assert not norms(lowered)
    lower(rewritten(Block(), torch.randn(8, 2, C)), training=False)
    assert len(asked) == 3, "16 rows, as 10 are rounded up"
    lower(rewritten(Block(), torch.randn(9, 2, C)), training=False)
    assert len(asked) == 6


@pytest.mark.usefixtures("any_device")
@pytest.mark.parametrize(("longest", "reason"), [(C, "not measured: rows of 16 elements"), (C - 1, "measured")])
def test_rows_on_which_nothing_was_gained_are_not_measured(
    longest: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = timed(monkeypatch, plain=2e-4, triton=1e-4)
    monkeypatch.setattr(lowering, "_NOTHING_GAINED", longest)
    _, (decision,) = lower(rewritten(Block(), torch.randn(2, 5, C)), training=False)
    assert decision.reason.startswith(reason) and bool(asked) == (longest < C)


@pytest.mark.usefixtures("any_device")
def test_no_measurement_is_begun_when_the_budget_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = timed(monkeypatch, plain=2e-4, triton=1e-4)
    monkeypatch.setitem(lowering._spent, "seconds", 2.5)
    _, (decision,) = lower(rewritten(Block(), torch.randn(2, 5, C)), training=False)
    assert decision.chosen == "aten" and "2 s were spent on norms already" in decision.reason and not asked


@pytest.mark.usefixtures("any_device")
def test_what_fails_is_said_and_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: Probe, name: str, base: Base) -> Any:
        raise RuntimeError(f"{name} is broken")

    monkeypatch.setattr(Probe, "calls", failing)
    for _ in range(2):
        _, (decision,) = lower(rewritten(Block(), torch.randn(2, 5, C)), training=False)
        assert decision.chosen == "aten" and "aten is broken" in decision.reason and "cache" not in decision.reason


def _around(model: Function | nn.Module) -> str:
    return str(fusion_objection(site(model)))


@pytest.mark.parametrize(("branch", "read", "reason"), [
    (F.gelu, None, "gelu) in the same kernel as the sum"),
    (lambda x: F.dropout(x, 0.5, True), None, "dropout) in the same kernel as the sum"),
    (lambda x: x * 0.1, None, "mul) in the same kernel as the sum"),
    (lambda x: x.roll(1, 1), None, "roll) in the same kernel as the sum"),
    (None, F.gelu, "gelu) in the same kernel as the norm"),
    (None, lambda x: x.flip(1), "flip) in the same kernel as the norm"),
])  # fmt: skip
def test_what_the_base_compiler_may_fuse_keeps_the_kernel_away(
    branch: Function | None, read: Function | None, reason: str
) -> None:
    assert reason in _around(Block(branch, read))


def test_what_stands_alone_is_measured() -> None:
    assert fusion_objection(site(Block())) is None
    assert fusion_objection(site(Block(lambda x: x.view(2, 5, C), lambda x: x))) is None
    assert fusion_objection(site(lambda x: F.layer_norm(x + x, (C,)))) is None
    for program in (rewritten(nn.Sequential(Block(), Block(), Block()), torch.randn(2, 5, C)),):
        assert [fusion_objection(node) for node in norms(program)] == [None] * 3


def test_a_reader_of_the_sum_alone_is_fused_with_it() -> None:
    def model(x: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        stream = x + y
        return stream.relu(), F.layer_norm(stream, (C,)) @ w

    operands = (torch.randn(2, 5, C), torch.randn(2, 5, C), torch.randn(C, C))
    assert "relu) in the same kernel as the sum" in str(fusion_objection(site(model, *operands)))


def test_a_product_that_could_add_the_residual_itself() -> None:
    flat = torch.randn(5, C)
    assert "add the other operand" in str(fusion_objection(site(Block(bias=False), flat)))
    assert fusion_objection(site(Block(), flat)) is None


def test_surroundings_are_counted() -> None:
    assert surroundings(site(Block()), training=False) == Surroundings(True)
    assert surroundings(site(lambda x: F.layer_norm(x + x, (C,))), training=False) == Surroundings(False)
    compiled = fxopt.capture(Block(read=lambda x: x).train(), (torch.randn(2, 5, C),))
    (node,) = norms(driver.rewrite(compiled, Options(strict=True, passes=EXACT)).program)
    around = surroundings(node, training=True)
    assert (around.sum_read, around.gradients, around.sum_gradients) == (True, 1, 1)


class Attention(nn.Module):
    """A norm that three layers read, after a layer with a bias that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.norm = nn.Linear(C, C), nn.RMSNorm(C)
        self.layers = nn.ModuleList(nn.Linear(C, C, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        stream = self.before(x.exp()) + x
        normal = self.norm(stream)
        return stream + sum(layer(normal) for layer in self.layers)  # type: ignore[no-any-return]


@pytest.mark.usefixtures("any_device")
@pytest.mark.parametrize("model", [Block(), Attention()], ids=["block", "attention"])
@pytest.mark.parametrize("option", ["auto", "triton"])
def test_training_through_the_backend(model: nn.Module, option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    asked: list[Surroundings] = []
    seconds = timed(monkeypatch, plain=2e-4, triton=1e-4)
    key = lowering._key

    def noted(found: Any, *rest: Any) -> str:
        asked.append(surroundings(found.node, found.training))
        return key(found, *rest)

    monkeypatch.setattr(lowering, "_key", noted)
    options: dict[str, Any] = {"base": "aot_eager", "lower": option, "strict": True, "passes": EXACT}
    compiled = torch.compile(model, backend="fxopt", options=options)
    draws = [torch.randn(2, 5, C, requires_grad=True) for _ in range(8)]
    found, eager, exact = (together([run(f, x) for x in draws]) for run, f in (
        (evaluate, compiled), (evaluate, model), (oracle_gradients, model),
    ))  # fmt: skip
    assert_within_budget(found, eager, exact, floor=1.0)
    if option == "auto":
        assert asked == [Surroundings(True, 3 if isinstance(model, Attention) else 1, 1, 1)]
        assert seconds == ["triton-16w4/16w4p4", "triton-8w4/8w4p8", "aten"]


@pytest.mark.usefixtures("any_device")
def test_kernels_are_listed() -> None:
    captured = fxopt.capture(Attention().train(), (torch.randn(2, 5, C),))
    program = driver.rewrite(captured, Options(strict=True, passes=EXACT)).program
    inference, _ = lower(program, training=False, option="triton")
    training, _ = lower(program, training=True, option="triton")
    assert len(kernel_sources(inference)) == 1 and len(kernel_sources(training)) == 2
    assert all("RMSNorm, generated by fxopt" in text for text in kernel_sources(training).values())


PROBES = [
    ("layer_norm", Surroundings(True), False, torch.float32, False),
    ("layer_norm", Surroundings(True, 3, 2, 1), True, torch.float32, False),
    ("rms_norm", Surroundings(False, 1, 0, 0), True, torch.bfloat16, True),
]


@pytest.mark.parametrize(("kind", "around", "training", "dtype", "scale_after_cast"), PROBES)
def test_both_ways_of_a_probe_compute_the_same(
    kind: str, around: Surroundings, training: bool, dtype: torch.dtype, scale_after_cast: bool
) -> None:
    torch.manual_seed(0)
    x, residual = (torch.randn(3, 5, C, dtype=dtype) for _ in range(2))
    weight, bias = torch.randn(C, dtype=dtype), torch.randn(C, dtype=dtype) if kind == "layer_norm" else None
    settings = (1e-5, torch.float32, scale_after_cast)
    probe = Probe(kind, settings, (x, residual, weight, bias), around, (True, bias is not None), training)
    results = []
    for name in ("aten", "triton-4w4/4w4p4"):
        torch.manual_seed(1)
        calls = probe.calls(name, Base())
        assert len(calls) == 1 + training
        results.append([call() for call in calls])
    (plain, *gradients), (generated, *others) = results
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    index = 0 if not training or kind == "rms_norm" else 1
    torch.testing.assert_close(plain[index], generated[0], rtol=tolerance, atol=tolerance)
    for expected, found in zip(gradients, others, strict=True):
        torch.testing.assert_close(list(found), list(expected), rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("any_device")
def test_measuring_inside_of_a_compilation_leaves_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(lowering, "_SMALLEST", 0.0)
    model, x, other = Block().eval(), torch.randn(4, 5, C), torch.randn(3, 7, C)
    options: dict[str, Any] = {"base": "aot_eager", "strict": True, "passes": EXACT}
    compiled = torch.compile(model, backend="fxopt", options=options)
    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.mark_dynamic(x, 1)
    with torch.no_grad(), backend.collecting() as (outcomes, failures):
        torch.testing.assert_close(compiled(x), model(x))
        torch.testing.assert_close(compiled(other), model(other))
    assert not failures
    (outcome,) = outcomes
    (decision,) = outcome.decisions
    assert decision.reason.startswith("measured") and len(decision.seconds) == 2, decision


def test_without_a_time_of_the_base_compiler_nothing_is_chosen() -> None:
    assert best({"triton-1w4": 1e-3}, Terms("norms", {})) == (
        "aten",
        "; the base compiler's kernel could not be measured",
    )
