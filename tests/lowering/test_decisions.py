"""What decisions say of candidates that failed, which a process remembers, and of kernels that a machine can't have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Node

import fxopt.codegen.meanings  # noqa: F401 - canonical operators get their meaning
from fxopt import cache, driver
from fxopt.codegen.attention import kernels, machine
from fxopt.codegen.attention.machine import hopper_objection
from fxopt.frontend.export import from_export
from fxopt.ir.operators import overload
from fxopt.lowering import attention, decisions
from fxopt.lowering.attention import candidates, choose
from fxopt.lowering.candidate import Candidate
from fxopt.lowering.decisions import error_line, shortfalls
from fxopt.lowering.lower import lower
from fxopt.lowering.options import Options

AMPERE = "it needs compute capability 9.0, not 8.0"
#: Another scale than other tests have, whose decisions may be kept.
SCALE = 0.12511


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * SCALE).softmax(-1) @ v


def operands(rows: int, dtype: torch.dtype = torch.bfloat16, width: int = 64) -> tuple[Tensor, ...]:
    return tuple(torch.randn(1, 2, rows, width).to(dtype) for _ in range(3))


def site_of(*inputs: Tensor) -> Node:
    program = driver.rewrite(from_export(plain, inputs), Options(strict=True)).program
    sites: list[Node] = list(program.graph.find_nodes(op="call_function", target=overload("attention")))
    (site,) = sites
    return site


@pytest.fixture(autouse=True)
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process and a cache that know nothing."""
    monkeypatch.setattr(decisions, "_OF_THIS_PROCESS", {})
    cache.clear()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Says which major compute capability the device is to have, on which nothing is measured in truth."""

    def of(major: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, 0))

    monkeypatch.setattr(attention, "triton_objection", lambda *_: None)
    monkeypatch.setattr(attention, "_measure", lambda site, training, found, failed: dict.fromkeys(names(found), 1.0))
    return of


def names(found: list[Candidate]) -> list[str]:
    return [candidate.name for candidate in found]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Makes PyTorch's own kernel fail when it is measured; the candidates that were measured."""
    measured: list[str] = []
    timed = attention._timed_call

    def call(candidate: Candidate, *rest: Any) -> Callable[[], Any]:
        measured.append(candidate.name)
        if candidate.family == "sdpa":
            raise RuntimeError("out of memory: tried to allocate 1 GiB\nmore of it")
        return timed(candidate, *rest)

    monkeypatch.setattr(attention, "_timed_call", call)
    return measured


def test_what_failed_is_said_and_measured_once_in_a_process(failing: list[str]) -> None:
    def layers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return plain(plain(q, k, v), k, v)

    program = driver.rewrite(from_export(layers, operands(12)), Options(strict=True)).program
    _, both = lower(program, training=False)
    told = "measured; sdpa-cpu failed when it was measured: RuntimeError: out of memory: tried to allocate 1 GiB"
    assert [(d.chosen, d.reason) for d in both] == [("aten", told)] * 2
    assert failing.count("sdpa-cpu") == 1 and list(both[0].seconds) == ["aten"]
    _, again = lower(program, training=False)
    assert [d.reason for d in again] == [told] * 2 and failing.count("sdpa-cpu") == 1


def test_what_failed_is_not_kept_for_another_process(failing: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    site = site_of(*operands(12))
    assert "failed" in choose(site, False, "auto")[1].reason
    monkeypatch.undo()
    decisions._OF_THIS_PROCESS.clear()
    decided = choose(site, False, "auto")[1]
    assert decided.reason == "measured" and set(decided.seconds) == {"sdpa-cpu", "aten"}
    assert choose(site, False, "auto")[1].reason == "measured, from the cache"


def test_an_error_is_told_by_its_kind_and_first_line() -> None:
    assert error_line(ValueError("\n  one \ntwo")) == "ValueError: one"
    assert error_line(AssertionError()) == "AssertionError"
    assert len(error_line(ValueError("long " * 100))) == 120


@pytest.mark.parametrize(("rows", "refused"), [(512, "hopper"), (256, "hopper, pairs"), (200, "pairs")])
def test_kernels_that_another_device_would_have_are_said(
    rows: int, refused: str, device: Callable[[int], None]
) -> None:
    device(8)
    site = site_of(*operands(rows))
    for source in ("measured", "measured, from the cache"):
        assert choose(site, False, "auto")[1].reason.startswith(f"{source}; {refused}: {AMPERE}")
    forced = choose(site, False, "triton")[1]
    assert forced.reason == f"forced by lower='triton'; {refused}: {AMPERE}"
    assert choose(site, False, "aten")[1].reason == "forced by lower='aten'"
    device(9)
    assert ": " not in choose(site, False, "auto")[1].reason
    assert choose(site, False, "triton")[1].reason == "forced by lower='triton'"


@pytest.mark.parametrize("inputs", [operands(64), operands(512, torch.float32), operands(512, width=36)])
def test_what_does_not_fit_the_problem_is_not_said(inputs: tuple[Tensor, ...], device: Callable[[int], None]) -> None:
    """Those kernels would be no candidates on Hopper either."""
    device(8)
    site = site_of(*inputs)
    _, refused = candidates(site, False)
    assert {"triton-hopper", "triton-pairs"} <= set(refused)
    assert ": " not in choose(site, False, "auto")[1].reason


def test_in_training_the_backward_is_said_too(device: Callable[[int], None]) -> None:
    device(8)
    site = site_of(*operands(512))
    assert f"; hopper, hopper-backward: {AMPERE}" in choose(site, True, "auto")[1].reason
    device(9)
    assert ": " not in choose(site, True, "auto")[1].reason
    torch.use_deterministic_algorithms(True)
    try:
        assert "; hopper-backward: torch.use_deterministic_algorithms is on" in choose(site, True, "auto")[1].reason
    finally:
        torch.use_deterministic_algorithms(False)


def test_sizes_that_are_not_known_are_no_reason_for_silence(
    device: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    device(8)
    monkeypatch.setattr(attention, "has_hints", lambda site: False)
    reason = choose(site_of(*operands(512)), False, "auto")[1].reason
    assert reason.startswith(f"best guess: the sizes are not known; hopper: {AMPERE}")


def missing(name: str) -> None:
    """What `importlib.util.find_spec` does where a package around the module is missing."""
    raise ModuleNotFoundError(f"No module named {name.rpartition('.')[0]!r}")


@pytest.mark.parametrize("find_spec", [missing, lambda name: None], ids=["no experimental", "no gluon"])
def test_an_older_triton_has_no_gluon(
    find_spec: Any, device: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hopper_objection((9, 0)) is None
    monkeypatch.setattr(machine, "find_spec", find_spec)
    monkeypatch.setattr(kernels, "ranking", kernels.ranking.__wrapped__)
    device(9)
    assert hopper_objection((9, 0)) == "this Triton has no Gluon"
    found, decision = choose(site_of(*operands(256)), True, "auto")
    assert "; hopper, pairs, hopper-backward: this Triton has no Gluon" in decision.reason
    assert found.name.startswith("triton-") and "hopper" not in found.name


def test_plain_reasons_are_not_shortfalls() -> None:
    assert shortfalls({"triton-hopper": "it is for 256 rows and more, and there are 12"}) == ""
