"""Launches that are remembered give what a first launch gives, for every family, and leave other layouts alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from fxopt.codegen.attention import kernels, operator, reference
from fxopt.codegen.attention.operator import attention_forward
from fxopt.ir.attention import AttentionSpec
from fxopt.testing import assert_within_budget
from tests.codegen.cases import Shape, captured, operands, specification
from tests.codegen.vectors import VECTORS
from tests.gpu.problems import problem

pytestmark = pytest.mark.gpu

DTYPE = torch.bfloat16
SHAPES = {
    "short": Shape(64, 64, 197, 197, 4, "group", "bshd", packed=True, heads=4),
    "long": Shape(64, 64, 600, 600, 2, "group", "bshd", heads=4),
    "wide": Shape(128, 128, 512, 512, 2, "group", "bshd", heads=4),
}


def configs(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> tuple[str, ...]:
    return kernels.candidates(problem(spec, q, k, v))[0]


def draw(name: str, shape: Shape, spec: AttentionSpec) -> tuple[list[Tensor], list[Tensor]]:
    captures = VECTORS[name].draw(shape) if name in VECTORS else captured(name, shape, spec)
    moved = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda").copy_(x) for x in captures]
    return [x.cuda() for x in operands(shape, DTYPE)], moved


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["plain", "causal", "tile-bias", "right padding"])
def test_replays_are_within_the_budget_of_eager(name: str, shape: str) -> None:
    torch.manual_seed(0)
    sizes = SHAPES[shape]
    spec = VECTORS[name].specification(DTYPE, "zero") if name in VECTORS else specification(name, sizes, DTYPE)
    wide_spec = str(dataclasses.replace(spec, out_dtype=torch.float64))
    first, _ = draw(name, sizes, spec)
    remembered = 0
    for config in configs(spec, *first):
        operator._REPLAYS.clear()
        for _ in range(3):
            (q, k, v), captures = draw(name, sizes, spec)
            wide = [c.double() if c.is_floating_point() else c for c in captures]
            eager = reference.attention(q, k, v, captures, str(spec))
            exact = reference.attention(q.double(), k.double(), v.double(), wide, wide_spec)
            out, _ = attention_forward(q, k, v, captures, str(spec), config, False)
            assert out.stride() == eager.stride()
            assert_within_budget(out, eager, exact)
        remembered += len(operator._REPLAYS)
    assert remembered, "at least one family remembers its launches"


@pytest.mark.parametrize("name", ["right padding", "holes", "rows and keys"])
def test_rows_that_take_the_mean_are_replayed_too(name: str) -> None:
    torch.manual_seed(0)
    sizes = dataclasses.replace(SHAPES["long"], batch=4)
    spec = VECTORS[name].specification(DTYPE, "uniform")
    wide_spec = str(dataclasses.replace(spec, out_dtype=torch.float64))
    (q, k, v), captures = draw(name, sizes, spec)
    q, k, v = (x.contiguous() for x in (q, k, v))
    config = next(c for c in configs(spec, q, k, v) if c.startswith("hopper:"))
    eager = reference.attention(q, k, v, captures, str(spec))
    exact = reference.attention(q.double(), k.double(), v.double(), captures, wide_spec)
    operator._REPLAYS.clear()
    for _ in range(3):
        out, lse = attention_forward(q, k, v, captures, str(spec), config, False)
        assert lse.numel() == 0
        assert_within_budget(out, eager, exact)
        assert len(operator._REPLAYS) == 1


def test_other_layouts_are_launched_anew() -> None:
    operator._REPLAYS.clear()
    spec = specification("plain", SHAPES["long"], DTYPE)
    (q, k, v), _ = draw("plain", SHAPES["long"], spec)
    config = next(c for c in configs(spec, q, k, v) if ":" not in c)
    expected, _ = attention_forward(q, k, v, [], str(spec), config, False)
    others = (k.clone(), k.transpose(1, 2).contiguous().transpose(1, 2), k.transpose(2, 3).contiguous().transpose(2, 3))
    for keys in others:
        out, _ = attention_forward(q, keys, v, [], str(spec), config, False)
        torch.testing.assert_close(out, expected)
    assert len(operator._REPLAYS) == len({x.stride() for x in (k, *others)}) > 1


def test_replays_are_captured_by_graphs() -> None:
    spec = specification("causal", SHAPES["short"], DTYPE)
    (q, k, v), _ = draw("causal", SHAPES["short"], spec)
    for config in configs(spec, q, k, v):
        for _ in range(2):
            expected, _ = attention_forward(q, k, v, [], str(spec), config, False)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, _ = attention_forward(q, k, v, [], str(spec), config, False)
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, expected)
