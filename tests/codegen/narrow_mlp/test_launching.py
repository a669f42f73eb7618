"""Launches of narrow feed-forward blocks on a GPU that isn't there: compiled once, remembered by layout."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import Tensor

from fxopt.codegen import launching
from fxopt.codegen.building import compile_together
from fxopt.codegen.mlp.narrow_mlp.operator import mlp_forward
from tests.codegen.narrow_mlp.cases import CASES, Operands
from tests.codegen.offline import Compiled, compiler

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Compiled]]:
    monkeypatch.setattr(launching, "_REPLAYS", {})
    with compiler(tmp_path, launches=True) as kernels:
        yield kernels


def forward(operands: Operands, name: str = "gelu bf16", config: str = "64x32w4s2") -> Tensor:
    found: Tensor = mlp_forward(*operands, CASES[name].activation, config)
    return found


def test_a_layout_is_compiled_once_and_then_remembered(compiled: list[Compiled]) -> None:
    for rows in (64, 64, 80, 37):
        operands = CASES["gelu bf16"].operands(2, rows, width=32, hidden=64)
        assert [forward(operands).shape for _ in range(2)] == [(2, rows, 32)] * 2
    assert [kernel.name for kernel in compiled] == ["forward_kernel"] and len(launching._REPLAYS) == 3


def test_building_launches_nothing(tmp_path: Path) -> None:
    operands = CASES["gelu bf16"].operands(64, width=48, hidden=64)
    with compiler(tmp_path) as kernels:
        compile_together([lambda: forward(operands)])
    assert [kernel.name for kernel in kernels] == ["forward_kernel"]


def test_the_input_as_the_residual_is_not_taken_for_two_tensors(compiled: list[Compiled]) -> None:
    x, *weights, residual = CASES["gelu bf16"].operands(64, width=64, hidden=64)
    forward((x, *weights, x))  # type: ignore[arg-type]
    forward((x, *weights, residual))  # type: ignore[arg-type]
    first, second = launching._REPLAYS.values()
    places = [tuple(n for _, n in replay.launches[0].tensors) for replay in (first, second)]
    assert places[0] != places[1]


def test_rows_that_lie_otherwise_are_copied_and_weights_are_not(compiled: list[Compiled]) -> None:
    x, up, up_bias, down, *rest = CASES["gelu bf16"].operands(64, width=80, hidden=64)
    forward((x.t().contiguous().t(), up, up_bias, down, *rest))  # type: ignore[arg-type]
    assert not launching._REPLAYS
    forward((x, up.t().contiguous().t(), up_bias, down, *rest))  # type: ignore[arg-type]
    assert len(launching._REPLAYS) == 1 and len(compiled) == 2


def test_what_is_not_there_is_no_argument(compiled: list[Compiled]) -> None:
    operands = CASES["relu bf16"].operands(64, width=16, hidden=64)
    forward(operands, "relu bf16")
    (replay,) = launching._REPLAYS.values()
    assert len(replay.launches[0].tensors) == 5, "x, two weights, the residual and the result"
