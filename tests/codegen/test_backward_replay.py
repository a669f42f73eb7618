"""Launches of the backward remembered: the same kernels on the same numbers as its launcher would launch."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fxopt.codegen.attention.backward import operator as backward
from fxopt.ir.attention import AttentionSpec, Capture
from fxopt.ir.expression import parse
from tests.codegen.cases import Shape, captured, operands, specification
from tests.codegen.gradients import FLOWS
from tests.codegen.offline import compiler

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

HALF = torch.bfloat16
SHAPE = Shape(16, 16, 70, 75, 2, "group", "bshd", batch=3, heads=4)
#: What stands before a kernel's own arguments when it is run: the grid, and what the driver wants.
_DRIVER = 9


@pytest.fixture
def launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[Any]]]:
    """What every launch is given, the grid first; nothing runs. The first launches of a test are not replayed."""
    from triton.compiler import CompiledKernel

    launches: list[list[Any]] = []

    def run(kernel: Any) -> Any:
        return lambda *given: launches.append([kernel.metadata.name, *given[:3], *given[_DRIVER:]])

    backward._REPLAYS.clear()
    with compiler(tmp_path, launches=True):
        monkeypatch.setattr(CompiledKernel, "run", property(run))
        yield launches
    backward._REPLAYS.clear()


def case(name: str) -> tuple[AttentionSpec, list[Tensor]]:
    if name in FLOWS:
        score, mask, dims = FLOWS[name]
        sizes = {"b": 3, "h": 4, "i": 70, "j": 75, "-": 1, "p": 2, "d": 144}
        kept = None if mask is None else parse(mask)
        spec = AttentionSpec(parse(score), kept, (Capture(dims, HALF),), out_dtype=HALF, out_layout="bshd")
        return spec, [torch.randn([sizes[x] for x in dims]).to(HALF)]
    spec = specification(name, SHAPE, HALF, "uniform")
    return spec, captured(name, SHAPE, spec)


def draw(spec: AttentionSpec, captures: list[Tensor], dlse: bool) -> tuple[Any, ...]:
    """The arguments of the operator, but for those that are no tensors."""
    q, k, v = (x.clone() for x in operands(SHAPE, HALF))
    out = torch.randn(3, 70, 4, 16).to(HALF).transpose(1, 2)
    lse, dout = torch.randn(3, 4, 70), torch.randn_like(out)
    return q, k, v, [c.clone() for c in captures], out, lse, dout, torch.randn(3, 4, 70) if dlse else None


def call(spec: AttentionSpec, tensors: tuple[Any, ...], seed: Tensor | None = None) -> list[Tensor]:
    wanted = [c.kind == "float" for c in spec.captures]
    found: list[Tensor] = backward._cuda(*tensors, wanted, str(spec), "", seed)
    return found


def roles(launches: list[list[Any]], tensors: tuple[Any, ...], results: list[Tensor]) -> list[list[Any]]:
    """The launches with each tensor replaced by what it is: which operand, result or scratch."""
    q, k, v, captures, *rest = tensors
    known = [x for x in (q, k, v, *captures, *rest) if x is not None] + results

    def role(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if all(x is not y for y in known):
            known.append(x)
        return next(n for n, y in enumerate(known) if y is x), x.shape, x.stride(), x.dtype

    return [[role(x) for x in launch] for launch in launches]


#: Each way in which the gradient of a captured tensor is put together, without one and with one of the log-sum-exp.
CASES = [
    ("window", False),
    ("swin", False),
    ("causal-band", True),
    ("row-scale", True),
    ("slopes", False),
    ("keys", False),
]


@pytest.mark.parametrize(("name", "dlse"), CASES)
def test_other_operands_go_through_the_same_launches(
    name: str, dlse: bool, launched: list[list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, captures = case(name)
    tensors = draw(spec, captures, dlse)
    results = call(spec, tensors)
    expected = roles(launched, tensors, results)
    assert len(backward._REPLAYS) == 1 and expected
    launched.clear()
    monkeypatch.setattr(backward, "_recorded", None)
    others = draw(spec, captures, dlse)
    again = call(spec, others)
    assert roles(launched, others, again) == expected
    assert [(x.shape, x.stride(), x.dtype) for x in again] == [(x.shape, x.stride(), x.dtype) for x in results]
    assert not {id(x) for x in again} & {id(x) for x in results}


def test_seeds_are_operands(launched: list[list[Any]]) -> None:
    spec = dataclasses.replace(specification("causal", SHAPE, HALF, "zero"), dropout=0.1)
    seeds = [torch.ones(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)]
    for seed in seeds:
        call(spec, draw(spec, [], False), seed)
    assert len(backward._REPLAYS) == 1
    half = len(launched) // 2
    for launches, seed in ((launched[:half], seeds[0]), (launched[half:], seeds[1])):
        assert sum(any(x is seed for x in launch) for launch in launches) == 3


@pytest.mark.parametrize("change", ["strides", "alignment", "gradient of lse", "same tensor"])
def test_other_layouts_are_launched_anew(change: str, launched: list[list[Any]]) -> None:
    spec = dataclasses.replace(specification("plain", SHAPE, HALF), kv_map="group")
    q, k, v, captures, *rest = draw(spec, [], False)
    call(spec, (q, k, v, captures, *rest))
    if change == "strides":
        k = k.transpose(1, 2).contiguous().transpose(1, 2)
    elif change == "alignment":
        k = torch.empty(k.numel() + 1, dtype=HALF)[1:].view(k.shape)
    elif change == "same tensor":
        v = k
    else:
        rest[-1] = torch.randn(3, 4, 70)
    call(spec, (q, k, v, captures, *rest))
    assert len(backward._REPLAYS) == 2


def test_a_tensor_given_twice_does_not_stand_for_two(launched: list[list[Any]]) -> None:
    spec = specification("plain", SHAPE, HALF)
    q, k, v, captures, *rest = draw(spec, [], False)
    call(spec, (q, k, k, captures, *rest))
    launched.clear()
    call(spec, (q, k, v, captures, *rest))
    assert any(x is v for launch in launched for x in launch)


@pytest.mark.parametrize("other", ["strided lse", "strided gradient of lse", "half gradient of lse"])
def test_launchers_that_copy_operands_are_not_remembered(other: str, launched: list[list[Any]]) -> None:
    spec = specification("plain", SHAPE, HALF)
    *tensors, lse, dout, _ = draw(spec, [], False)
    wide = torch.randn(3, 4, 140)[..., ::2]
    dlse = {"strided gradient of lse": wide, "half gradient of lse": lse.to(HALF)}.get(other)
    lse = wide if other == "strided lse" else lse
    call(spec, (*tensors, lse, dout, dlse))
    assert launched and not backward._REPLAYS


def test_broadcast_gradients_of_the_result_are_made_dense_first(launched: list[list[Any]]) -> None:
    spec = specification("plain", SHAPE, HALF)
    *tensors, lse, _, dlse = draw(spec, [], False)
    for _ in range(2):
        call(spec, (*tensors, lse, torch.ones((), dtype=HALF).expand(3, 4, 70, 16), dlse))
    assert len(backward._REPLAYS) == 1


def test_deterministic_mode_is_another_layout(launched: list[list[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that were remembered before it was switched on may sum in any order."""
    spec = specification("plain", SHAPE, HALF)
    tensors = draw(spec, [], False)
    for mode in (False, True):
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda mode=mode: mode)
        call(spec, tensors)
    assert launched and len(backward._REPLAYS) == 2


def test_profilers_see_launches_that_are_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their hooks are left out where there are none."""
    from triton import knobs
    from triton.compiler import CompiledKernel

    hooks: list[tuple[Any, ...]] = []
    spec, _ = case("plain")
    tensors = draw(spec, [], False)
    backward._REPLAYS.clear()
    with compiler(tmp_path, launches=True):
        monkeypatch.setattr(CompiledKernel, "run", property(lambda _: lambda *given: hooks.append(given[7:_DRIVER])))
        call(spec, tensors)
        launches = len(hooks)
        hooks.clear()
        call(spec, tensors)
        assert hooks == [(None, None)] * launches and launches
        hooks.clear()
        monkeypatch.setattr(knobs.runtime.launch_enter_hook, "calls", [print])
        call(spec, tensors)
        assert hooks == [(knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)] * launches
    backward._REPLAYS.clear()
