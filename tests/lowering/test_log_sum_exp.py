"""Lowering of attentions whose log-sum-exp is read: candidates, the graph, numbers and gradients."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import Tensor

from fxopt import driver
from fxopt.errors import LoweringError
from fxopt.frontend.export import from_export
from fxopt.ir.operators import overload
from fxopt.ir.program import Program
from fxopt.lowering import attention as lowering
from fxopt.lowering import building
from fxopt.lowering.attention import candidates, choose
from fxopt.lowering.lower import lower
from fxopt.lowering.options import Options
from fxopt.testing import assert_within_budget, draw, evaluate, oracle_gradients

FORWARD = torch.ops.fxopt.attention_forward.default
WITH_LSE = overload("attention_with_lse")


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    x = q @ k.mT * 0.25 + bias
    loss = x.logsumexp(-1).square().mean(-1)
    return x.softmax(-1) @ v, loss


def operands(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    sizes = ((2, 3, 16, 16), (2, 3, 24, 16), (2, 3, 24, 16), (3, 1, 24))
    return tuple(draw(size, dtype=dtype, seed=seed).requires_grad_() for seed, size in enumerate(sizes))


def program(*inputs: Tensor) -> Program:
    return driver.rewrite(from_export(attention, inputs), Options(strict=True)).program


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Generated kernels are candidates on the CPU as well."""
    monkeypatch.setattr(lowering, "triton_objection", lambda operands, widths: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


def site_of(rewritten: Program) -> torch.fx.Node:
    sites: list[torch.fx.Node] = rewritten.graph.find_nodes(op="call_function", target=WITH_LSE)
    (site,) = sites
    return site


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("training", [False, True])
def test_candidates_give_both(training: bool) -> None:
    found, refused = candidates(site_of(program(*operands())), training)
    *generated, plain = found
    assert generated and plain.target is WITH_LSE
    assert all(c.target is FORWARD and c.extra[1] is True and not c.first for c in generated)
    assert all(("/" in c.extra[0]) == training for c in generated)
    assert "no log-sum-exp" in refused["sdpa"]


def test_without_a_gpu_the_meaning_serves() -> None:
    chosen, decision = choose(site_of(program(*operands())), training=False, lower="auto")
    assert chosen.name == "aten" and "sdpa: scaled_dot_product_attention returns no log-sum-exp" in decision.reason
    with pytest.raises(LoweringError, match="returns no log-sum-exp"):
        choose(site_of(program(*operands())), training=False, lower="sdpa", strict=True)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("training", [False, True])
def test_lowered_programs_compute_the_same(training: bool) -> None:
    inputs = operands()
    lowered, (decision,) = lower(program(*inputs), training=training, option="triton")
    (call,) = (node for node in lowered.graph.nodes if node.target is FORWARD)
    read = {user.args[1] for user in call.users if user.target is operator.getitem}
    assert read == {0, 1} and decision.chosen.startswith("triton-")
    actual = evaluate(lowered.module, *inputs)
    assert_within_budget(actual, evaluate(attention, *inputs), oracle_gradients(attention, *inputs))


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("training", [False, True])
def test_both_gradients_are_timed(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    site, given = site_of(program(*operands())), []
    backward: Any = torch.ops.fxopt.attention_backward

    def noted(*args: Any) -> Any:
        given.append(args[7])
        return backward(*args)

    monkeypatch.setattr("fxopt.codegen.attention.operator.attention_backward", noted)
    found, _ = candidates(site, training)
    real = lowering.real_operands(site, found)
    with torch.set_grad_enabled(training):
        for candidate in (found[0], found[-1]):
            lowering._timed_call(candidate, site, real, training)()
    assert [x is not None for x in given] == [True] * training


@pytest.mark.usefixtures("everywhere")
def test_the_backward_is_built_for_both_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[Any, ...]] = []
    backward = torch.ops.fxopt.attention_backward

    def noted(*args: Any) -> Any:
        given.append(args)
        return backward(*args)

    monkeypatch.setattr(torch.ops.fxopt, "attention_backward", noted)
    monkeypatch.setattr(building, "compile_together", lambda calls, beside: [call() for call in calls])
    site = site_of(program(*operands(torch.bfloat16)))
    found = [c for c in candidates(site, training=True)[0] if c.family == "triton" and "recompute" not in c.name]
    building.build([(site, found)], training=True)
    assert found and len(given) == len(found)
    assert all(args[7].shape == (2, 3, 16) and args[7].dtype is torch.float32 for args in given)
