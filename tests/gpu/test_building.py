"""On the GPU kernels are compiled together and nothing is compiled while they are measured; results are right."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch._dynamo
from torch import Tensor

from fxopt import backend, cache
from fxopt.driver import Outcome
from fxopt.testing import assert_within_budget, evaluate, oracle, oracle_gradients

pytestmark = pytest.mark.gpu


class Loaded(NamedTuple):
    """A kernel of fxopt's that this process comes to have: compiled here, by a thread, or found in Triton's cache."""

    module: str
    thread: int
    cached: bool


@pytest.fixture
def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Loaded]]:
    """Every kernel that a compilation with empty caches loads."""
    from triton import knobs

    found: list[Loaded] = []

    def note(src: Any, cache_hit: bool, **_: object) -> None:
        module = getattr(getattr(src, "fn", None), "__module__", "")
        if module.startswith("fxopt_generated"):
            found.append(Loaded(module, threading.get_ident(), cache_hit))

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(knobs.compilation, "listener", note)
    cache.clear()
    torch._dynamo.reset()
    yield found
    torch._dynamo.reset()


def two_layers(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    """A site with gradients of slopes, and a causal one."""
    distance = torch.arange(k.shape[2], device=q.device) - torch.arange(q.shape[2], device=q.device)[:, None]
    q = (q @ k.mT * 0.0884173 + slopes * distance).softmax(-1) @ v
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    return (q @ k.mT * 0.0884173).masked_fill(~mask, float("-inf")).softmax(-1) @ v


def inputs(training: bool) -> list[Tensor]:
    torch.manual_seed(training)
    operands = [torch.randn(2, 4, 512, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    operands.append(-0.01 * torch.rand(4, 1, 1, device="cuda", dtype=torch.bfloat16))
    return [x.requires_grad_(training) for x in operands]


def check(outcomes: list[Outcome], failures: list[str]) -> None:
    assert not failures
    for decision in outcomes[0].decisions:
        assert decision.reason.startswith("measured")
        assert any(name.startswith("triton") for name in decision.seconds), decision


@torch.no_grad()
def test_kernels_are_compiled_elsewhere_before_they_are_measured(loaded: list[Loaded]) -> None:
    operands = inputs(training=False)
    function = torch.compile(two_layers, backend="fxopt", options={"strict": True})
    with backend.collecting() as (outcomes, failures):
        actual = function(*operands)
    check(outcomes, failures)
    # In another process, or in threads where there is one processor only.
    assert loaded and all(kernel.cached or kernel.thread != threading.get_ident() for kernel in loaded)
    assert_within_budget(actual, two_layers(*operands), oracle(two_layers, *operands))


def test_those_of_the_backward_are_compiled_in_threads(loaded: list[Loaded]) -> None:
    operands = inputs(training=True)
    function = torch.compile(two_layers, backend="fxopt", options={"strict": True})
    with backend.collecting() as (outcomes, failures):
        actual = evaluate(function, *operands)
    check(outcomes, failures)
    assert {"attention_triton", "attention_backward"} <= {
        kernel.module.removeprefix("fxopt_generated_").rpartition("_")[0]
        for kernel in loaded
        if not kernel.cached and kernel.thread != threading.get_ident()
    }
    results = actual, evaluate(two_layers, *operands), oracle_gradients(two_layers, *operands)
    assert_within_budget(*results, floor=1.0)
