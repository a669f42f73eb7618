"""Split kernels on the GPU: every expression against float64, launches that follow or overlap, graphs, lengths."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from fxopt.codegen.attention import kernels, reference
from fxopt.codegen.attention.operator import attention_forward, module
from fxopt.codegen.attention.problem import Problem
from fxopt.ir.attention import AttentionSpec
from fxopt.testing import assert_within_budget
from tests.codegen.cases import EXPRESSIONS, Shape, pairwise, specification
from tests.gpu.test_attention_kernels import DTYPES, on_gpu

pytestmark = pytest.mark.gpu

SHAPES = {
    "one query": Shape(128, 128, 1, 3001, 2, "group", "bshd", heads=8),
    "three queries": Shape(64, 64, 3, 2048, 3, "tile", "bshd", heads=6, batch=3),
    "one kv head": Shape(80, 96, 2, 1025, 1, "group", "bhsd", heads=32),
    "narrow values": Shape(192, 128, 1, 1500, 4, "group", "bhsd", heads=4),
    "wide": Shape(256, 256, 1, 1100, 2, "group", "bhsd", heads=4),
}


def configs(spec: AttentionSpec, shape: Shape, dtype: torch.dtype) -> list[str]:
    sizes = (shape.batch, shape.heads, shape.kv_heads, shape.rows, shape.keys)
    capability = torch.cuda.get_device_capability()
    split = kernels.FAMILIES["split"]
    problem = Problem(spec, shape.head_dim, shape.value_dim, dtype, capability, *sizes)
    assert split.objection(problem) is None
    return list(split.candidates(problem))


@pytest.mark.parametrize(("name", "shape", "dtype"), pairwise(EXPRESSIONS, SHAPES, ("bf16", "f16")))
def test_kernel_is_within_the_budget_of_eager(name: str, shape: str, dtype: str) -> None:
    sizes = SHAPES[shape]
    spec = specification(name, sizes, DTYPES[dtype])
    (q, k, v), captures = on_gpu(name, sizes, spec, DTYPES[dtype])
    wide = [c.double() if c.is_floating_point() else c for c in captures]
    wide_spec = str(dataclasses.replace(spec, out_dtype=torch.float64))
    exact = reference.attention(q.double(), k.double(), v.double(), wide, wide_spec)
    eager = reference.attention(q, k, v, captures, str(spec))
    found = configs(spec, sizes, DTYPES[dtype])
    assert found
    for config in found:
        for _ in range(2):  # the second launch finds the counters that the first one left
            out, lse = attention_forward(q, k, v, captures, str(spec), config, True)
            assert_within_budget(out, eager, exact)
        expected = torch.logsumexp(reference.logits(spec, q, k, captures).float(), -1)
        torch.testing.assert_close(lse, expected, rtol=1e-2, atol=1e-2)


def cache(batch: int, length: int, heads: int = 8, kv_heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(batch, heads, 1, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(batch, length, kv_heads, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return q, k.transpose(1, 2), v.transpose(1, 2)


def test_launches_repeat_to_the_bit_on_any_stream_and_in_graphs() -> None:
    spec = str(specification("plain", SHAPES["one query"], torch.bfloat16))
    q, k, v = cache(3, 20_011)
    config = "split:64w4s3x2"
    expected, _ = attention_forward(q, k, v, [], spec, config, False)
    streams = [torch.cuda.Stream() for _ in range(3)]
    results = []
    torch.cuda.synchronize()
    for n in range(60):
        with torch.cuda.stream(streams[n % 3]):
            results.append(attention_forward(q, k, v, [], spec, config, False)[0])
    torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in results)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, _ = attention_forward(q, k, v, [], spec, config, False)
    for _ in range(5):
        captured.fill_(torch.nan)
        graph.replay()
        assert torch.equal(captured, expected)


def test_one_kernel_serves_every_length() -> None:
    spec = specification("causal", SHAPES["one query"], torch.bfloat16)
    kernel = module(str(spec), 128, 128, torch.bfloat16, "split:64w4s3x2").attention_kernel
    for length in (1024, 1025, 5000, 5001, 70_000):
        q, k, v = cache(2, length)
        attention_forward(q, k, v, [], str(spec), "split:64w4s3x2", False)
    assert len(kernel.device_caches[torch.cuda.current_device()][0]) == 1
