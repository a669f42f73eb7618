"""Kernels of whole pairs on the GPU: every expression and configuration that would be tried, against float64."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest
import torch
from torch import Tensor

from fxopt.codegen.attention import reference
from fxopt.codegen.attention.operator import attention_forward
from fxopt.codegen.attention.pairs.kernel import candidates, objection
from fxopt.ir.attention import AttentionSpec, EmptyRows
from fxopt.testing import assert_within_budget
from tests.codegen.cases import WITHOUT_BANDS, Shape, operands, specification
from tests.codegen.tiles import TILES
from tests.codegen.vectors import VECTORS
from tests.gpu.problems import problem
from tests.gpu.test_short_kernels import exact, on_gpu

pytestmark = pytest.mark.gpu

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
SHAPES = {
    "ViT": Shape(64, 64, 197, 197, 4, "group", "bshd", packed=True, batch=37, heads=12),
    "BERT": Shape(64, 64, 128, 128, 4, "group", "bshd", batch=40, heads=12),
    "256": Shape(64, 64, 256, 256, 2, "tile", "bshd", batch=13, heads=16),
    "64": Shape(32, 32, 100, 64, 3, "group", "bhsd", batch=70, heads=6),
    "cross": Shape(40, 64, 700, 77, 1, "group", "bhsd", batch=3, heads=8),
    "few": Shape(16, 16, 90, 20, 2, "group", "bshd", batch=3, heads=4),
}
CROSS = [
    (name, shape, list(DTYPES)[(n + m) % 2], (n + m // 2) % 2)
    for n, name in enumerate(WITHOUT_BANDS)
    for m, shape in enumerate(SHAPES)
]


def check(spec: AttentionSpec, qkv: tuple[Tensor, Tensor, Tensor], captures: list[Tensor], tried: int) -> None:
    asked = problem(spec, *qkv)
    reason = objection(asked)
    if reason is not None:
        pytest.skip(reason)
    found = candidates(asked)
    config = found[tried % len(found)]
    eager = reference.attention(*qkv, captures, str(spec))
    out, lse = attention_forward(*qkv, captures, str(spec), config, True)
    assert out.stride() == eager.stride()
    assert_within_budget(out, eager, exact(spec, *qkv, captures))
    wide = [c.double() if c.is_floating_point() else c for c in captures]
    wanted = torch.logsumexp(reference.logits(spec, qkv[0].double(), qkv[1].double(), wide), -1)
    torch.testing.assert_close(lse.double(), wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("name", "shape", "dtype", "tried"), CROSS)
def test_kernel_is_within_the_budget_of_eager(name: str, shape: str, dtype: str, tried: int) -> None:
    spec = specification(name, SHAPES[shape], DTYPES[dtype], "zero")
    check(spec, *on_gpu(name, SHAPES[shape], spec, DTYPES[dtype]), tried)


@pytest.mark.parametrize("name", TILES)
@pytest.mark.parametrize("shape", ["ViT", "BERT", "256"])
def test_tiles_come_piece_by_piece(name: str, shape: str) -> None:
    torch.manual_seed(0)
    spec = TILES[name].specification(SHAPES[shape], torch.bfloat16, "zero")
    q, k, v = (x.cuda() for x in operands(SHAPES[shape], torch.bfloat16))
    check(spec, (q, k, v), [c.cuda() for c in TILES[name].draw(SHAPES[shape], torch.bfloat16)], 0)


@pytest.mark.parametrize("empty_rows", get_args(EmptyRows))
@pytest.mark.parametrize("name", VECTORS)
def test_captured_vectors_leave_rows_without_keys(name: str, empty_rows: EmptyRows) -> None:
    torch.manual_seed(0)
    shape = dataclasses.replace(SHAPES["ViT"], batch=12)
    spec = VECTORS[name].specification(torch.bfloat16, empty_rows)
    q, k, v = (x.cuda() for x in operands(shape, torch.bfloat16))
    check(spec, (q, k, v), [c.cuda() for c in VECTORS[name].draw(shape)], 0)


def test_results_do_not_change_from_launch_to_launch() -> None:
    """Groups of warps that got ahead of what they wait for would show now and then."""
    shape = SHAPES["ViT"]
    for name in ("plain", "tile-bias"):
        spec = specification(name, shape, torch.bfloat16)
        qkv, captures = on_gpu(name, shape, spec, torch.bfloat16)
        for config in candidates(problem(spec, *qkv)):
            first = attention_forward(*qkv, captures, str(spec), config, False)[0]
            for _ in range(200):
                assert torch.equal(attention_forward(*qkv, captures, str(spec), config, False)[0], first)
