"""A stream of blocks that reads a tensor captured by row and key, emulated: numbers against float64."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

import pytest
import torch

from fxopt.codegen.attention import reference
from fxopt.codegen.attention.hopper.config import read_config
from fxopt.codegen.attention.hopper.tile import stages
from fxopt.ir.attention import EmptyRows
from fxopt.testing import assert_within_budget
from tests.codegen.cases import Shape, operands
from tests.codegen.interpreted.test_hopper_stream import exact, launch
from tests.codegen.tiles import TILES

pytest.importorskip("triton.experimental.gluon")
pytestmark = pytest.mark.usefixtures("poisoned_outputs")
CONFIGS = ("hopper:128x64s2q2a0", "hopper:192x64s3q2a0", "hopper:64x128s4q2a0", "hopper:192x128s3q2a0")
SHAPES = {
    "square": Shape(16, 16, 330, 330, 1, "group", "bshd", heads=2, batch=3),
    "cross": Shape(24, 32, 135, 400, 2, "tile", "bhsd", heads=4),
    "one block": Shape(16, 16, 260, 50, 2, "group", "bhsd", heads=2, batch=2),
}
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
CASES = [
    (n, s, CONFIGS[(a + b) % len(CONFIGS)], list(DTYPES)[(a + b) % 3 // 2])
    for a, n in enumerate(TILES)
    for b, s in enumerate(SHAPES)
]


def check(name: str, sizes: Shape, config: str, of: torch.dtype, empty_rows: EmptyRows, patch: Any) -> None:
    spec = TILES[name].specification(sizes, of, empty_rows)
    q, k, v = operands(sizes, of)
    captures = TILES[name].draw(sizes, of)
    out, lse = launch(spec, q, k, v, captures, config, patch)
    assert_within_budget(out, reference.attention(q, k, v, captures, str(spec)), exact(spec, q, k, v, captures))
    wide = dataclasses.replace(spec, out_dtype=torch.float64)
    logits = reference.logits(wide, q.double(), k.double(), [c.double() for c in captures])
    torch.testing.assert_close(lse.double(), torch.logsumexp(logits, -1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("name", "shape", "config", "dtype"), CASES)
def test_tiles_are_within_the_budget_of_eager(
    name: str, shape: str, config: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty_rows: EmptyRows = get_args(EmptyRows)[CASES.index((name, shape, config, dtype)) % 2]
    check(name, SHAPES[shape], config, DTYPES[dtype], empty_rows, monkeypatch)


@pytest.mark.parametrize(("width", "config", "count"), [
    (64, "hopper:192x128s3q2a0", 1), (64, "hopper:128x128s3q2a0", 2), (128, "hopper:128x64s3q2a0", 2),
])  # fmt: skip
@pytest.mark.parametrize("name", ["by head", "infinite", "causal"])
def test_rings_as_short_as_shared_memory_allows(
    name: str, width: int, config: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert stages(read_config(config), width) == count
    shape = Shape(width, width, 500, 700, 2, "group", "bshd", heads=2, batch=2)
    check(name, shape, config, torch.bfloat16, "zero", monkeypatch)
