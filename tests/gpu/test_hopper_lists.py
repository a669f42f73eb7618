"""The Hopper kernel through lists of the blocks that masks with holes keep, on the GPU."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest
import torch

from fxopt.codegen.attention import reference
from fxopt.codegen.attention.hopper import kernel as hopper
from fxopt.codegen.attention.operator import attention_forward
from fxopt.ir.attention import EmptyRows
from fxopt.testing import assert_within_budget
from tests.codegen.cases import Shape, operands
from tests.codegen.holes import HOLES
from tests.gpu.problems import problem
from tests.gpu.test_attention_kernels import DTYPES

pytestmark = pytest.mark.gpu

SHAPES = {
    "D64": Shape(64, 64, 400, 600, 1, heads=2, batch=2),
    "D64 many": Shape(64, 64, 700, 700, 4, "group", "bshd", heads=16, batch=8),
    "D128": Shape(128, 128, 520, 520, 2, "tile", "bshd", heads=4, batch=2),
    "D80": Shape(80, 80, 385, 900, 2, "group", "bhsd", heads=4, batch=2),
    "D32": Shape(32, 32, 261, 515, 1, "tile", "bhsd", heads=2, batch=2),
}
CONFIGS = {
    64: ("hopper:128x128s4q2a0list", "hopper:128x64s4q2a0list", "hopper:64x64s4q2a0list"),
    128: ("hopper:128x128s2q2a0list", "hopper:128x64s3q2a0list"),
}


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("empty_rows", get_args(EmptyRows))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [name for name in HOLES if name != "plane"])
def test_lists_leave_out_blocks(name: str, shape: str, empty_rows: EmptyRows, dtype: str) -> None:
    torch.manual_seed(0)
    sizes = SHAPES[shape]
    spec = HOLES[name].specification(DTYPES[dtype], empty_rows)
    spec = dataclasses.replace(spec, kv_map=sizes.kv_map, out_layout=sizes.layout)
    q, k, v = (x.cuda() for x in operands(sizes, DTYPES[dtype]))
    reason = hopper.objection(problem(spec, q, k, v))
    if reason is not None:
        pytest.skip(reason)
    captures = [c.cuda() for c in HOLES[name].draw(sizes)]
    wide_spec = str(dataclasses.replace(spec, out_dtype=torch.float64))
    exact = reference.attention(q.double(), k.double(), v.double(), captures, wide_spec)
    eager = reference.attention(q, k, v, captures, str(spec))
    wanted = torch.logsumexp(reference.logits(spec, q.double(), k.double(), captures), -1)
    for config in CONFIGS[max(64, 1 << (q.shape[3] - 1).bit_length())]:
        out, lse = attention_forward(q, k, v, captures, str(spec), config, True)
        assert_within_budget(out, eager, exact)
        torch.testing.assert_close(lse.double(), wanted, rtol=1e-3, atol=1e-3)
        again = [attention_forward(q, k, v, captures, str(spec), config, True)[0] for _ in range(2)]
        assert all(torch.equal(x.nan_to_num(), out.nan_to_num()) for x in again), "blocks come in one order"


def test_lists_may_change_between_replays_of_a_graph() -> None:
    torch.manual_seed(0)
    sizes = Shape(64, 64, 512, 512, 2, heads=2, batch=2)
    spec = HOLES["interleaved documents"].specification(torch.bfloat16, "zero")
    q, k, v = (x.cuda().contiguous() for x in operands(sizes, torch.bfloat16))
    reason = hopper.objection(problem(spec, q, k, v))
    if reason is not None:
        pytest.skip(reason)
    captures = [c.cuda() for c in HOLES["interleaved documents"].draw(sizes)]
    config = CONFIGS[64][0]
    attention_forward(q, k, v, captures, str(spec), config, False)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = attention_forward(q, k, v, captures, str(spec), config, False)
    for shift in (0, 100, 300):
        for x, axis in zip(captures, (2, 3), strict=True):
            x.copy_(x.roll(shift, axis))
        graph.replay()
        assert torch.equal(out, attention_forward(q, k, v, captures, str(spec), config, False)[0])
        plain = attention_forward(q, k, v, captures, str(spec), "hopper:128x128s4q2a0", False)[0]
        torch.testing.assert_close(out, plain)
