"""Decisions after the base compiler's work: the graph names them by a key, and is the same whatever is decided."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fxopt import backend, cache, driver
from fxopt.backend import collecting
from fxopt.codegen.attention import decided
from fxopt.driver import Outcome
from fxopt.errors import FxoptWarning
from fxopt.frontend.export import from_export
from fxopt.ir.operators import overload
from fxopt.lowering import attention, decisions, postponed
from fxopt.lowering.base import times_kernels
from fxopt.lowering.kernels import kernel_sources
from fxopt.lowering.options import Options
from tests.codegen.offline import Compiled, compiler
from tests.lowering.sites import sites_at

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

HALF = torch.bfloat16
DECIDED = torch.ops.fxopt.attention_decided.default


@pytest.fixture
def seconds() -> dict[str, float]:
    """What measuring a candidate gives, by the beginning of its name; a second without it."""
    return {}


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float]) -> Iterator[list[Compiled]]:
    """A GPU to compile for, which CPU tensors pass for lying on; nothing is run on it."""

    def measured(site: Any, training: bool, found: list[Any], refused: dict[str, str]) -> dict[str, float]:
        return {c.name: next((s for name, s in seconds.items() if c.name.startswith(name)), 1.0) for c in found}

    monkeypatch.setattr(attention, "triton_objection", lambda *_: None)
    monkeypatch.setattr(attention, "_measure", measured)
    monkeypatch.setattr(attention, "_first_run", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(decided, "_DECIDED", {})
    monkeypatch.setattr(decisions, "_OF_THIS_PROCESS", {})
    cache.clear()
    with compiler(tmp_path) as found:
        yield found


#: At a scale that no other test has: kernels once compiled stay in their module.
layers = sites_at(0.12512)


def operands(width: int = 32, gradients: bool = False) -> tuple[Tensor, ...]:
    return tuple(torch.randn(2, 2, 320, width).to(HALF).requires_grad_(gradients) for _ in range(3))


def begun(options: Options | None = None, training: bool = False, width: int = 32, **capture: Any) -> Outcome:
    program = from_export(layers, operands(width, training), **capture)
    return driver.run(program, options or Options(strict=True), training=training, wait=True)


def calls(outcome: Outcome, operator: Any = DECIDED) -> list[Any]:
    return list(outcome.lowered.graph.find_nodes(op="call_function", target=operator))


def text(outcome: Outcome) -> str:
    return str(outcome.lowered.graph)


def test_sites_stand_for_what_is_decided_when_all_else_is_done(
    compiled: list[Compiled], seconds: dict[str, float]
) -> None:
    outcome = begun()
    first, second, third = calls(outcome)
    assert first.args[-1] == second.args[-1] != third.args[-1]
    assert {decision.chosen for decision in outcome.decisions} == {postponed.STAND_IN}
    seconds["triton-hopper:128x"] = 0.5
    settled = driver.settle(outcome, Options(strict=True))
    assert settled.lowered is outcome.lowered
    assert [decision.nodes for decision in settled.decisions] == [decision.nodes for decision in outcome.decisions]
    for call, decision in zip((first, second, third), settled.decisions, strict=True):
        assert decision.chosen.startswith("triton-hopper:128x") and decision.chosen in decision.seconds
        assert decided.config_of(call.args[-1]) == decision.chosen.removeprefix("triton-")
    assert len(kernel_sources(settled.lowered)) == 2, "kernels alike are shown once"


def test_candidates_are_built_meanwhile_in_other_threads(compiled: list[Compiled]) -> None:
    outcome = begun(width=16)
    driver.settle(outcome, Options())
    assert len(compiled) > 2 and threading.get_ident() not in {found.thread for found in compiled}
    before = len(compiled)
    driver.settle(begun(width=16), Options())
    assert len(compiled) == before, "the cache knows what was decided"


def test_fake_tensors_that_seem_to_lie_elsewhere_meanwhile_are_not_read(
    compiled: list[Compiled], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one thread computes with a fake tensor all threads see its mode's tensors on the device ``meta``."""
    devices: set[torch.device] = set()
    computing = threading.Event()

    def build(asked: Any, training: bool, beside: bool) -> None:
        computing.wait(60)
        for site, found in asked:
            nodes = attention.tensor_nodes([site.args, *(candidate.arguments for candidate in found)])
            devices.update(node.meta["val"].device for node in nodes)

    monkeypatch.setattr(postponed, "build_undecided", build)
    outcome = begun()
    mode = outcome.result.program.fake_mode
    assert outcome.postponed is not None and mode is not None
    monkeypatch.setattr(mode, "in_kernel_invocation", True)
    assert next(iter(outcome.postponed._sites.values())).meta["val"].device.type == "meta"
    computing.set()
    assert outcome.postponed._building is not None
    outcome.postponed._building.result()
    assert devices == {torch.device("cpu")}


def test_the_graph_is_the_same_in_a_process_that_knows(compiled: list[Compiled], seconds: dict[str, float]) -> None:
    seconds["triton-64x"] = 0.5
    cold = begun()
    settled = driver.settle(cold, Options(strict=True))
    decided._DECIDED.clear()
    warm = begun()
    assert text(warm) == text(cold)
    assert {decision.chosen for decision in warm.decisions} == {decision.chosen for decision in settled.decisions}
    assert all(decided.config_of(call.args[-1]) for call in calls(warm))
    assert driver.settle(warm, Options()).decisions == warm.decisions


def test_where_nothing_of_its_own_is_fastest_the_program_is_lowered_again(
    compiled: list[Compiled], seconds: dict[str, float]
) -> None:
    cold = begun()
    seconds["aten"] = 0.5
    settled = driver.settle(cold, Options(strict=True))
    assert settled.lowered is not cold.lowered and not calls(settled)
    assert len(calls(settled, overload("attention"))) == 3
    assert {decision.chosen for decision in settled.decisions} == {"aten"}
    assert text(begun()) == text(settled)


def test_sites_alike_of_which_a_candidate_failed_are_measured_once(
    compiled: list[Compiled], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is kept on disk then, and the process remembers."""
    measured: list[str] = []

    def fails(site: Any, training: bool, found: list[Any], failed: dict[str, str]) -> dict[str, float]:
        measured.append(site.name)
        failed["aten"] = "MemoryError: no room"
        return {c.name: 1.0 for c in found if c.name != "aten"}

    monkeypatch.setattr(attention, "_measure", fails)
    for turn in ("cold", "warm"):
        settled = driver.settle(begun(), Options(strict=True))
        assert all("; aten failed when it was measured: MemoryError: no room" in d.reason for d in settled.decisions)
        assert len(calls(settled)) == 3 and len(measured) == 2, turn
    decisions._OF_THIS_PROCESS.clear()
    driver.settle(begun(), Options(strict=True))
    assert len(measured) == 4


def test_an_operator_of_pytorch_s_can_be_decided_on(compiled: list[Compiled], seconds: dict[str, float]) -> None:
    seconds["sdpa"] = 0.5
    cold = begun()
    settled = driver.settle(cold, Options(strict=True))
    assert settled.lowered is cold.lowered
    chosen = [decision.chosen for decision in settled.decisions]
    assert chosen[:2] == ["sdpa-cpu"] * 2 and chosen[2].startswith("triton-")
    q, k, v = operands()
    first = calls(cold)[0]
    given = decided.attention_decided(q, k, v, [], *first.args[4:])
    torch.testing.assert_close(given, torch.ops.fxopt.attention_sdpa(q, k, v, [], first.args[4], "cpu"), atol=0, rtol=0)


def test_in_training_and_with_unknown_sizes_it_is_decided_at_once(compiled: list[Compiled]) -> None:
    length = torch.export.Dim("length", min=2, max=4096)
    dynamic = begun(dynamic_shapes=(({2: length},) * 3,))
    training = begun(training=True)
    forced = begun(Options(lower="aten"))
    for outcome in (dynamic, training, forced):
        assert not calls(outcome)
        assert driver.settle(outcome, Options()).decisions == outcome.decisions
    assert dynamic.decisions[0].seconds and training.postponed is forced.postponed is None


def test_a_measurement_that_fails_leaves_the_graph_alone(
    compiled: list[Compiled], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> dict[str, float]:
        raise MemoryError("no room")

    monkeypatch.setattr(attention, "_measure", fails)
    monkeypatch.setattr(backend, "compile_base", lambda module, *_: module.forward)
    q, k, v = operands()
    with pytest.warns(FxoptWarning, match="no room"), torch.no_grad():
        given = torch.compile(layers, backend="fxopt")(q, k, v)
    torch.testing.assert_close(given, layers(q, k, v), atol=2e-2, rtol=2e-2)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="no room"), torch.no_grad():
        torch.compile(layers, backend="fxopt", options={"strict": True})(q, k, v)


@pytest.mark.parametrize("winner", ["triton", "aten"])
def test_the_backend_reports_what_was_decided(
    compiled: list[Compiled], seconds: dict[str, float], winner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bases: list[str] = []

    def base(module: torch.fx.GraphModule, *_: Any) -> Callable[..., Any]:
        bases.append(str(module.graph))
        return module.forward

    monkeypatch.setattr(backend, "compile_base", base)
    seconds[winner] = 0.5
    torch._dynamo.reset()
    q, k, v = operands()
    with collecting() as (outcomes, failures), torch.no_grad():
        given = torch.compile(layers, backend="fxopt", options={"strict": True})(q, k, v)
    torch.testing.assert_close(given, layers(q, k, v), atol=2e-2, rtol=2e-2)
    (outcome,) = outcomes
    assert not failures and all(decision.chosen.startswith(winner) for decision in outcome.decisions)
    assert str(outcome.lowered.graph) == bases[-1] and len(bases) == 1 + (winner == "aten")


def test_a_process_that_was_not_told_takes_the_best_guess_and_says_so(
    compiled: list[Compiled], monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = begun()
    call = calls(outcome)[0]
    ran: list[str] = []

    def run(q: Tensor, k: Tensor, v: Tensor, captures: Any, spec: str, config: str, with_lse: bool) -> Any:
        ran.append(config)
        return torch.ops.fxopt.attention(q, k, v, captures, spec), q.new_empty(0)

    monkeypatch.setattr(decided, "on_cuda", run)
    q, k, v = operands()
    with pytest.warns(FxoptWarning, match="best guess"):
        given = decided.attention_decided(q, k, v, [], *call.args[4:])
    decided.attention_decided(q, k, v, [], *call.args[4:])
    (guess, *_), _ = attention.candidates(outcome.postponed._sites[outcome.decisions[0].nodes[0]], False)  # type: ignore[union-attr]
    assert ran == [guess.extra[0]] * 2
    assert given.shape == q.shape


def test_the_operator_means_attention(compiled: list[Compiled]) -> None:
    call = calls(begun())[0]
    q, k, v = operands()
    given = torch.ops.fxopt.attention_decided(q, k, v, [], *call.args[4:])
    torch.testing.assert_close(given, torch.ops.fxopt.attention(q, k, v, [], call.args[4]), atol=0, rtol=0)
    torch.library.opcheck(DECIDED, (q, k, v, [], *call.args[4:]), test_utils=("test_schema", "test_faketensor"))


def test_bases_that_time_kernels_are_left_alone() -> None:
    assert not times_kernels(Options(), None) and not times_kernels(Options(), "reduce-overhead")
    assert times_kernels(Options(), "max-autotune")
    assert times_kernels(Options(inductor=(("max_autotune_gemm", True),)), None)
    assert not times_kernels(Options(base="eager", inductor=(("max_autotune", True),)), None)
