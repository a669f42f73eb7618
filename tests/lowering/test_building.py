"""Kernels of all sites are compiled before the first is measured: sites alike once, none for what the cache decides."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.codecache import CacheBase
from torch.fx import Node

import fxopt.codegen.meanings  # noqa: F401 - canonical operators get their meaning
from fxopt import cache, driver
from fxopt.backend import COMPILE_SECONDS
from fxopt.codegen.attention.backward.config import RECOMPUTE
from fxopt.codegen.attention.kernels import ranking
from fxopt.codegen.attention.problem import Problem
from fxopt.frontend.export import from_export
from fxopt.ir.attention import read_spec
from fxopt.ir.nodes import REQUIRES_GRAD
from fxopt.ir.operators import overload
from fxopt.ir.program import Program
from fxopt.lowering import attention, decisions
from fxopt.lowering.attention import candidates, choose, prepare
from fxopt.lowering.base import get_ready
from fxopt.lowering.building import build
from fxopt.lowering.options import Options
from tests.codegen.offline import Compiled, compiler
from tests.lowering.sites import sites_at

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

HALF = torch.bfloat16


@pytest.fixture
def launching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Compiled]]:
    """The same, where launches do nothing."""
    monkeypatch.setattr(attention, "triton_objection", lambda *_: None)
    monkeypatch.setattr(decisions, "_OF_THIS_PROCESS", {})
    cache.clear()
    with compiler(tmp_path, launches=True) as found:
        yield found


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Compiled]]:
    """A GPU to compile for, which CPU tensors pass for lying on."""
    monkeypatch.setattr(attention, "triton_objection", lambda *_: None)
    monkeypatch.setattr(decisions, "_OF_THIS_PROCESS", {})
    cache.clear()
    with compiler(tmp_path) as found:
        yield found


#: At a scale that no other test has: kernels once compiled stay in their module.
layers = sites_at(0.12501)


def padded(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return (q @ k.mT * 0.08839).masked_fill(~keep, float("-inf")).softmax(-1) @ v


def windowed(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    near = torch.ones(320, 320, dtype=torch.bool).tril().triu(-64)
    return (q @ k.mT * 0.08839).masked_fill(~near, float("-inf")).softmax(-1) @ v


def grouped(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    k, v = (x[:, :2].repeat_interleave(2, 1) for x in (k, v))
    return (q @ k.mT * 0.08839).softmax(-1) @ v


def operands(width: int = 32, gradients: bool = False) -> tuple[Tensor, ...]:
    return tuple(torch.randn(2, 2, 320, width).to(HALF).requires_grad_(gradients) for _ in range(3))


def rewritten(function: Any, inputs: tuple[Tensor, ...]) -> tuple[Program, list[Node]]:
    program = driver.rewrite(from_export(function, inputs), Options(strict=True)).program
    return program, list(program.graph.find_nodes(op="call_function", target=overload("attention")))


def problem_of(site: Node) -> Problem:
    q, k, v = (node.meta["val"] for node in site.args[:3] if isinstance(node, Node))
    return attention.problem_of(read_spec(str(site.args[4])), q, k, v, training=False)


def generated(site: Node, training: bool = False) -> list[str]:
    return [c.name for c in candidates(site, training)[0] if c.family == "triton"]


def test_sites_alike_are_compiled_once_and_all_before_any_is_measured(compiled: list[Compiled]) -> None:
    _, sites = rewritten(layers, operands())
    assert len(sites) == 3
    before = attention.MEASUREMENT_SECONDS["total"]
    prepare(sites, training=False)
    assert len(compiled) == len(generated(sites[0])) + len(generated(sites[2]))
    assert len({found.module for found in compiled}) == len(compiled)
    assert threading.get_ident() not in {found.thread for found in compiled}
    assert attention.MEASUREMENT_SECONDS["total"] > before, "building counts as measuring"
    assert set(COMPILE_SECONDS) == {"total", "inductor", "measurement", "capture", "passes"}


def test_what_is_decided_is_not_compiled(compiled: list[Compiled]) -> None:
    _, sites = rewritten(layers, operands(width=16))
    key = attention.key_of(sites[0], False, candidates(sites[0], False)[0])
    cache.write_json("decisions", key, {"seconds": {"aten": 1.0}})
    prepare(sites, training=False)
    assert len(compiled) == len(generated(sites[2]))


def made(compiled: list[Compiled]) -> int:
    """How many were compiled: kernels that two modules have alike are read again from Triton's cache."""
    return sum(not found.cached for found in compiled)


def biased(scale: float, width: int) -> Node:
    """A site in training whose bias needs a gradient."""

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return (q @ k.mT * scale + bias).softmax(-1) @ v

    q, k, v = operands(width, gradients=True)
    bias = torch.randn(1, 2, 320, 320).to(HALF).requires_grad_()
    program, (site,) = rewritten(function, (q, k, v, bias))
    for placeholder in program.graph.find_nodes(op="placeholder"):
        placeholder.meta[REQUIRES_GRAD] = True
    return site


def test_in_training_the_kernels_of_the_backward_are_compiled(compiled: list[Compiled]) -> None:
    site = biased(0.1251, 32)
    prepare([site], training=True)
    counted = Counter(found.name for found in compiled)
    forwards = {name.partition("/")[0] for name in generated(site, True)}
    backwards = {name.partition("/")[2] for name in generated(site, True)}
    assert counted["attention_kernel"] == len(forwards)
    assert counted["dkdv_kernel"] == counted["dq_kernel"] == len(backwards) == 2
    assert counted["c0_kernel"] == 1, "both configurations have the same kernel for the bias"


def test_without_a_generated_backward_only_the_forward_is_compiled(compiled: list[Compiled]) -> None:
    site = biased(0.12505, 16)
    (triton, *_), _ = candidates(site, True)
    for config in (RECOMPUTE, ""):
        forward = str(triton.extra[0]).partition("/")[0]
        alone = dataclasses.replace(triton, extra=(f"{forward}/{config}".removesuffix("/"), True))
        build([(site, [alone])], training=True)
    assert {found.name for found in compiled} == {"attention_kernel"}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("width", [64, 128])
def test_measuring_compiles_nothing_more(launching: list[Compiled], training: bool, width: int) -> None:
    """What was compiled is what is launched, in the backward too: the same strides, alignment and constants."""
    site = biased(0.1252 + training / 100, width)
    prepare([site], training)
    before = made(launching)
    found, refused = candidates(site, training)
    seconds = attention._measure(site, training, found, refused)
    assert set(generated(site, training)) <= set(seconds), refused
    assert made(launching) == before > len(generated(site, training)) - 1


@pytest.mark.parametrize("function", [padded, windowed, grouped])
def test_nor_where_masks_read_vectors_and_operands_are_views(launching: list[Compiled], function: Any) -> None:
    packed = torch.randn(2, 320, 3, 4, 128).to(HALF)
    q, k, v = (packed[:, :, n].transpose(1, 2) for n in range(3))
    keep = torch.arange(320) < torch.tensor([320, 100])[:, None, None, None]
    _, (site,) = rewritten(function, (q, k, v, keep))
    prepare([site], training=False)
    before = made(launching)
    found, refused = candidates(site, False)
    seconds = attention._measure(site, False, found, refused)
    assert set(generated(site)) <= set(seconds), refused
    assert made(launching) == before > 0


def test_dynamic_lengths_are_built_as_they_were_seen(launching: list[Compiled]) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * 0.12504).softmax(-1) @ v

    length = torch.export.Dim("length", min=2, max=4096)
    inputs = operands()
    traced = from_export(function, inputs, dynamic_shapes=(({2: length},) * 3,))
    program = driver.rewrite(traced, Options(strict=True)).program
    (site,) = program.graph.find_nodes(op="call_function", target=overload("attention"))
    prepare([site], training=False)
    before = made(launching)
    decided, decision = choose(site, False, "auto")
    assert made(launching) == before == len(generated(site))
    assert set(generated(site)) < set(decision.seconds) and decided.name in decision.seconds


def test_other_candidates_run_once_meanwhile(compiled: list[Compiled], monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[Node, str]] = []
    monkeypatch.setattr(attention, "_first_run", lambda site, candidate, _: ran.append((site, candidate.name)))
    _, sites = rewritten(layers, operands(width=16))
    prepare(sites, training=False)
    others = {site: [c.name for c in candidates(site, False)[0] if c.family != "triton"] for site in sites}
    assert ran == [(site, name) for site in (sites[0], sites[2]) for name in others[site]]
    assert any("aten" in name for _, name in ran)


def test_the_base_gets_ready_while_others_compile(compiled: list[Compiled]) -> None:
    calls: list[int] = []
    _, sites = rewritten(layers, operands(width=16))
    for site in (sites[0], sites[2]):
        prepare(sites, training=False, meanwhile=[lambda: calls.append(len(compiled))])
        key = attention.key_of(site, False, candidates(site, False)[0])
        cache.write_json("decisions", key, {"seconds": {"aten": 1}})
    prepare(sites, training=False, meanwhile=[lambda: pytest.fail("there is nothing to compile")])
    assert len(calls) == 2
    get_ready(Options())
    assert CacheBase.get_system.cache_info().currsize == 1


@pytest.mark.parametrize("training", [False, True])
def test_a_first_run_is_that_of_the_measurement(training: bool) -> None:
    site = biased(0.125, 16)
    plain = candidates(site, training)[0][-1]
    calls: list[bool] = []

    def target(*arguments: Any) -> Tensor:
        calls.append(arguments[0].requires_grad)
        result: Tensor = overload("attention")(*arguments)
        return result

    attention._first_run(site, dataclasses.replace(plain, target=target), training)
    assert calls == ([False, True] if training else [False])


def test_candidates_that_fail_are_named_with_their_errors(compiled: list[Compiled]) -> None:
    """Here all of them do: there is no GPU to launch on."""
    _, sites = rewritten(layers, operands())
    prepare(sites[:1], training=False)
    decided, decision = choose(sites[0], False, "auto")
    assert decided.family != "triton" and "aten" in decision.seconds
    assert not any(name.startswith("triton") for name in decision.seconds)
    for name in generated(sites[0]):
        assert f"; {name} failed when it was measured: " in decision.reason
    left_out = len(ranking(problem_of(sites[0])).left_out)
    assert left_out and decision.reason.endswith(f"; {left_out} more configurations left out by the cost model")
