"""Launchers of forward kernels do nothing that can't be repeated without them."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from fxopt.cache import import_source
from fxopt.codegen.attention import kernels
from fxopt.codegen.attention.problem import Problem
from fxopt.codegen.replay import record
from fxopt.ir.attention import EmptyRows
from tests.codegen.cases import Shape
from tests.codegen.vectors import VECTORS

triton = pytest.importorskip("triton")

HALF = torch.bfloat16
SHAPE = Shape(64, 64, 512, 512, 1, "group", "bshd", heads=4)


class Compiled:
    """A compiled kernel that notes what it is launched with."""

    def __init__(self, kernel: Any, launches: list[tuple[str, tuple[Any, ...]]]) -> None:
        self._name, self._launches = kernel.__name__, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self._launches.append((self._name, (grid, *arguments)))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[Any, ...]]]:
    """What compiled kernels are launched with; nothing is compiled or runs."""
    found: list[tuple[str, tuple[Any, ...]]] = []
    monkeypatch.setattr(triton.JITFunction, "run", lambda kernel, *args, **kwargs: Compiled(kernel, found))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: FakeProperties)
    return found


class FakeProperties:
    """Of an H100."""

    multi_processor_count = 132


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("empty_rows", ["nan", "zero", "uniform"])
@pytest.mark.parametrize("name", ["right padding", "contiguous documents"])
def test_every_family_remembers_padded_batches(
    name: str, empty_rows: EmptyRows, with_lse: bool, launches: list[tuple[str, tuple[Any, ...]]]
) -> None:
    vectors = VECTORS[name]
    spec = vectors.specification(HALF, empty_rows)
    q, k, v = (torch.zeros(1, 512, 4, 64, dtype=HALF).transpose(1, 2) for _ in range(3))
    captures = vectors.draw(SHAPE)
    problem = Problem(spec, 64, 64, HALF, (9, 0), 1, 4, 4, 512, 512, with_lse=with_lse)
    configs = kernels.candidates(problem)[0]
    assert any(config.startswith("hopper:") for config in configs)
    for config in configs:
        module = import_source("attention_triton", kernels.source(spec, 64, 64, HALF, config))
        tensors = (q, k, v, *captures)
        (out, lse), replay = record(module, partial(module.launch, q, k, v, captures, with_lse), tensors)
        assert replay is not None, config
        launches.clear()
        again, lse_again = replay(tensors)
        assert launches
        assert (again.shape, again.stride(), again.dtype) == (out.shape, out.stride(), out.dtype)
        assert (
            (lse_again.shape, lse_again.dtype)
            == (lse.shape, lse.dtype)
            == ((1, 4, 512) if with_lse else (0,), torch.float32)
        )
