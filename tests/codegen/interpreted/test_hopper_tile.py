"""A stream of blocks that reads a tensor captured by row and key, emulated: numbers against float64."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

import pytest
import torch

from fxopt.codegen.attention import reference
from fxopt.ir.attention import EmptyRows
from fxopt.testing import assert_within_budget
from tests.codegen.cases import Shape, operands
from tests.codegen.interpreted.test_hopper_stream import exact, launch
from tests.codegen.tiles import TILES

pytest.importorskip("triton.experimental.gluon")
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


@pytest.fixture(autouse=True)
def poisoned_outputs() -> Any:
    """``torch.empty`` gives NaN, so that an element which is not written shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("name", "shape", "config", "dtype"), CASES)
def test_tiles_are_within_the_budget_of_eager(
    name: str, shape: str, config: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, of = SHAPES[shape], DTYPES[dtype]
    empty_rows: EmptyRows = get_args(EmptyRows)[CASES.index((name, shape, config, dtype)) % 2]
    spec = TILES[name].specification(sizes, of, empty_rows)
    q, k, v = operands(sizes, of)
    captures = TILES[name].draw(sizes, of)
    out, lse = launch(spec, q, k, v, captures, config, monkeypatch)
    assert_within_budget(out, reference.attention(q, k, v, captures, str(spec)), exact(spec, q, k, v, captures))
    wide = dataclasses.replace(spec, out_dtype=torch.float64)
    logits = reference.logits(wide, q.double(), k.double(), [c.double() for c in captures])
    torch.testing.assert_close(lse.double(), torch.logsumexp(logits, -1), rtol=1e-3, atol=1e-3)
