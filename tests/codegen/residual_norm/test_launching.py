"""Launches of residual norms on a GPU that isn't there: compiled once, remembered by layout, built without being run.

A kernel that is compiled stays so for the process: every test has a width of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fxopt.codegen import launching
from fxopt.codegen.building import compile_together
from fxopt.codegen.norm.residual_norm.backward_operator import residual_norm_backward
from fxopt.codegen.norm.residual_norm.operator import residual_norm_forward
from tests.codegen.offline import Compiled, compiler
from tests.codegen.residual_norm.cases import CASES, Case

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Compiled]]:
    monkeypatch.setattr(launching, "_REPLAYS", {})
    with compiler(tmp_path, launches=True) as kernels:
        yield kernels


def forward(case: Case, operands: list[Tensor | None], with_sum: bool = True) -> tuple[Tensor, ...]:
    settings = (case.kind, case.eps, case.scale_after_cast, "4w4/4w4p4", with_sum, True)
    found: tuple[Tensor, ...] = residual_norm_forward(*operands, *settings)
    return found


def backward(case: Case, operands: list[Tensor | None], with_dsum: bool = True) -> list[Tensor]:
    x, residual, weight, bias = operands
    assert x is not None
    mean = torch.zeros(x.shape[:-1] if case.kind == "layer_norm" else (0,))
    given = (x, residual if with_dsum else None, x, mean, torch.ones(x.shape[:-1]), weight, bias, [True, True])
    found: list[Tensor] = residual_norm_backward(*given, case.kind, case.eps, case.scale_after_cast, "4w4p4")
    return found


@pytest.mark.parametrize("name", ["layer bf16", "layer plain", "rms llama"])
def test_a_layout_is_compiled_once_and_then_remembered(name: str, compiled: list[Compiled]) -> None:
    case = CASES[name]
    for rows in (64, 64, 80, 37):
        operands = case.operands(2, rows, 768)
        shapes = [x.shape for x in forward(case, operands)]
        assert shapes[:2] == [(2, rows, 768)] * 2 and shapes[3] == (2, rows)
        for _ in range(2):
            forward(case, operands)
            backward(case, operands)
    names = [kernel.name for kernel in compiled]
    weights = "reduce_kernel" in names
    assert weights == (name != "layer plain")
    assert sorted(names) == ["backward_kernel", "forward_kernel", *(["reduce_kernel"] if weights else [])]
    assert len(launching._REPLAYS) == 6, "three layouts of either"


def test_what_is_asked_for_is_part_of_what_is_remembered(compiled: list[Compiled]) -> None:
    case = CASES["layer bf16"]
    operands = case.operands(64, 512)
    assert [forward(case, operands, with_sum=flag)[1].numel() for flag in (True, False, True)] == [32768, 0, 32768]
    assert [len(backward(case, operands, with_dsum=flag)) for flag in (True, False)] == [3, 3]
    assert len(launching._REPLAYS) == 4 and len(compiled) == 5


def test_building_launches_nothing(tmp_path: Path) -> None:
    case = CASES["layer bf16"]
    operands = case.operands(64, 384)
    with compiler(tmp_path) as kernels:
        compile_together([lambda: forward(case, operands), lambda: backward(case, operands)])
    assert sorted(kernel.name for kernel in kernels) == ["backward_kernel", "forward_kernel", "reduce_kernel"]


def test_a_launch_on_one_tensor_twice_is_not_taken_for_one_on_two(compiled: list[Compiled]) -> None:
    case = CASES["layer bf16"]
    x, residual, weight, bias = case.operands(64, 320)
    forward(case, [x, x, weight, bias])
    forward(case, [x, residual, weight, bias])
    first, second = launching._REPLAYS.values()
    places = [tuple(n for _, n in replay.launches[0].tensors) for replay in (first, second)]
    assert places[0][:2] == (0, 0) and places[1][:2] == (0, 1)


def test_rows_that_lie_otherwise_are_copied(compiled: list[Compiled]) -> None:
    case = CASES["layer bf16"]
    x, *rest = case.operands(64, 640)
    assert x is not None
    found = forward(case, [x.t().contiguous().t(), *rest])
    assert found[0].is_contiguous() and len(compiled) == 1 and not launching._REPLAYS
