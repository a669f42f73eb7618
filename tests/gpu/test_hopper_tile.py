"""The Hopper kernel on tensors captured by row and key, on the GPU: every form, what they hide, and how they lie."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest
import torch
from torch import Tensor

from fxopt.codegen.attention import reference
from fxopt.codegen.attention.hopper import kernel as hopper
from fxopt.codegen.attention.operator import attention_forward
from fxopt.ir.attention import AttentionSpec, EmptyRows
from fxopt.testing import assert_within_budget
from tests.codegen.cases import Shape, operands, pairwise
from tests.codegen.tiles import TILES
from tests.gpu.problems import problem
from tests.gpu.test_attention_kernels import DTYPES

pytestmark = pytest.mark.gpu

SHAPES = {
    "D64": Shape(64, 64, 264, 264, 2, "group", "bshd", heads=4),
    "D64 cross": Shape(64, 64, 330, 1000, 1, "tile", "bhsd", heads=4, batch=3),
    "D64 one block": Shape(64, 64, 610, 40, 8, "tile", "bhsd", heads=16, batch=8),
    "D64 many": Shape(64, 64, 700, 336, 4, "group", "bshd", heads=16, batch=8),
    # Rows that don't begin at multiples of 16 bytes are copied.
    "D64 unaligned": Shape(64, 64, 390, 333, 2, "group", "bshd", heads=4),
    "D128": Shape(128, 128, 520, 392, 2, "group", "bshd", heads=16, batch=4),
    "D80": Shape(80, 80, 384, 384, 2, "tile", "bshd", packed=True),
    "D32": Shape(32, 32, 261, 520, 1, "tile", "bhsd", heads=2),
    "D16": Shape(16, 16, 300, 272, 2, "group", "bshd", heads=4),
}


def draw(name: str, sizes: Shape, dtype: torch.dtype, moved: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Operands and captured tensors; those ``moved`` lie as they were drawn, inside larger ones."""
    torch.manual_seed(0)
    captures = TILES[name].draw(sizes, dtype)
    if not moved:
        return [x.cuda() for x in operands(sizes, dtype)], [x.contiguous().cuda() for x in captures]
    placed = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda").copy_(x) for x in captures]
    return [x.cuda() for x in operands(sizes, dtype)], placed


def check(name: str, shape: str, dtype: torch.dtype, empty_rows: EmptyRows, configs: slice, moved: bool) -> None:
    sizes = SHAPES[shape]
    spec = TILES[name].specification(sizes, dtype, empty_rows)
    (q, k, v), captures = draw(name, sizes, dtype, moved)
    asked = problem(spec, q, k, v)
    reason = hopper.objection(dataclasses.replace(asked, keys=None))
    if reason is not None:
        pytest.skip(reason)
    wide = [c.double() for c in captures]
    exact_spec = dataclasses.replace(spec, out_dtype=torch.float64)
    exact = reference.attention(q.double(), k.double(), v.double(), wide, str(exact_spec))
    eager = reference.attention(q, k, v, captures, str(spec))
    logits = reference.logits(exact_spec, q.double(), k.double(), wide)
    for config in hopper.candidates(asked)[configs]:
        # The second launch is a replay, where nothing is copied.
        for _ in range(2):
            out, lse = attention_forward(q, k, v, captures, str(spec), config, True)
            assert_within_budget(out, eager, exact)
            assert out.stride() == eager.stride()
            torch.testing.assert_close(lse.double(), torch.logsumexp(logits, -1), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("name", "shape", "dtype"), pairwise(TILES, SHAPES, ("bf16", "f16")))
def test_tiles_are_within_the_budget_of_eager(name: str, shape: str, dtype: str) -> None:
    turn = list(TILES).index(name) + list(SHAPES).index(shape)
    empty_rows = get_args(EmptyRows)[turn % 3]
    check(name, shape, DTYPES[dtype], empty_rows, slice(turn % 2, turn % 2 + 1), turn % 5 == 0)


@pytest.mark.parametrize("shape", ["D64", "D64 many", "D128"])
@pytest.mark.parametrize("empty_rows", get_args(EmptyRows))
@pytest.mark.parametrize("name", ["by head", "for all", "infinite", "lowest", "causal", "softcap"])
def test_every_configuration_of_tiles(name: str, empty_rows: EmptyRows, shape: str) -> None:
    check(name, shape, torch.bfloat16, empty_rows, slice(None), moved=False)


def test_tiles_of_a_long_sequence() -> None:
    """Many tiles to a program, so that rings of shared memory wrap at every place, and batch entries share a bias."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(8, 8, 2048, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    bias = torch.randn(1, 8, 2048, 2048, device="cuda", dtype=torch.bfloat16)
    spec: AttentionSpec = TILES["by head"].specification(Shape(64, 64, 2048, 2048), torch.bfloat16, "zero")
    asked = problem(spec, q, k, v)
    if hopper.objection(asked) is not None:
        pytest.skip(str(hopper.objection(asked)))
    eager = reference.attention(q, k, v, [bias], str(spec))
    wide = str(dataclasses.replace(spec, out_dtype=torch.float64))
    parts = zip(*(x.double().split(1) for x in (q, k, v)), strict=True)
    exact = torch.cat([reference.attention(part[0], part[1], part[2], [bias.double()], wide) for part in parts])
    for config in hopper.candidates(asked):
        out, _ = attention_forward(q, k, v, [bias], str(spec), config, False)
        assert_within_budget(out, eager, exact)
