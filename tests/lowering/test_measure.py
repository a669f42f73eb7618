"""Timing of candidates: how often they run, and when a single time is enough."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch
from torch.fx import Node

import fxopt.codegen.meanings  # noqa: F401 - canonical operators get their meaning
from fxopt import driver
from fxopt.frontend.export import from_export
from fxopt.ir.operators import overload
from fxopt.lowering import attention, measure
from fxopt.lowering.candidate import Candidate
from fxopt.lowering.options import Options

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still but for what is added to it."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


class Function:
    """Takes the given seconds, one after the other, the last ones again and again."""

    def __init__(self, clock: list[float], *seconds: float) -> None:
        self.clock, self.seconds, self.calls = clock, seconds, 0

    def __call__(self) -> None:
        self.clock[0] += self.seconds[min(self.calls, len(self.seconds) - 1)]
        self.calls += 1


def test_the_median_of_several_calls_after_a_warm_up(clock: list[float]) -> None:
    function = Function(clock, 9.0, 0.0, 0.004, 0.003, 0.001, 0.001, 0.005)
    assert measure.median_seconds(function, CPU) == pytest.approx(0.005)
    assert function.calls == 3 + int(0.05 / 0.004)


@pytest.mark.parametrize(("first", "calls"), [(0.0021, 3), (0.0019, 3 + 20)])
def test_one_time_is_enough_of_what_takes_twice_the_best(clock: list[float], first: float, calls: int) -> None:
    """The warm-up call, which may compile, does not count."""
    function = Function(clock, 5.0, 0.001, first, 0.001)
    found = measure.median_seconds(function, CPU, best=0.001)
    assert function.calls == calls
    assert found == pytest.approx(first if calls == 3 else 0.001)


@pytest.mark.parametrize(("once", "calls"), [(0.0031, 2), (0.0029, 3 + 20)])
def test_what_is_slow_by_far_is_not_captured(clock: list[float], once: float, calls: int) -> None:
    """The first time includes launches, for which a millisecond is allowed."""
    function = Function(clock, 5.0, once, 0.001)
    found = measure.median_seconds(function, CPU, best=0.001)
    assert function.calls == calls
    assert found == pytest.approx(once if calls == 2 else 0.001)


def test_without_others_nothing_is_hopeless(clock: list[float]) -> None:
    function = Function(clock, 0.0, 1.0)
    assert measure.median_seconds(function, CPU) == 1.0
    assert function.calls == 4


@pytest.fixture
def site() -> Node:
    """An attention on the CPU."""
    q, k, v = (torch.randn(1, 2, 8, 16) for _ in range(3))
    traced = from_export(lambda q, k, v: (q @ k.mT).softmax(-1) @ v, (q, k, v))
    found: list[Node] = list(
        driver.rewrite(traced, Options(strict=True)).program.graph.find_nodes(
            op="call_function", target=overload("attention")
        )
    )
    return found[0]


def test_candidates_are_told_the_best_so_far(site: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[float] = []
    taken = iter([0.3, 0.2, 0.4])

    def timed(function: object, device: torch.device, best: float) -> float:
        told.append(best)
        return next(taken)

    monkeypatch.setattr(attention, "median_seconds", timed)
    found, refused = attention.candidates(site, False)
    attention._measure(site, False, [found[0], *found], refused)
    assert told[:3] == [float("inf"), 0.3, 0.2]


def failing(candidate: Candidate) -> Candidate:
    def target(*arguments: object) -> None:
        raise torch.OutOfMemoryError("no room for the weights")

    return dataclasses.replace(candidate, target=target)


def test_the_original_may_fail_where_another_serves(site: Node) -> None:
    (served, *_, plain), refused = attention.candidates(site, False)
    seconds = attention._measure(site, False, [served, failing(plain)], refused)
    assert list(seconds) == [served.name]
    assert "no room for the weights" in refused[plain.name]


def test_where_nothing_serves_the_error_is_the_original_s(site: Node) -> None:
    found, refused = attention.candidates(site, False)
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        attention._measure(site, False, [failing(candidate) for candidate in found], refused)


def test_times_are_real_ones() -> None:
    assert 0.002 <= measure.median_seconds(lambda: time.sleep(0.002), CPU) < 0.2
