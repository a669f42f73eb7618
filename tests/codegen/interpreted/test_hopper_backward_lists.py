"""The Hopper backward through lists of the blocks of rows that keep some keys of a block, emulated."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from fxopt.codegen.attention.backward.hopper.kernel import source
from fxopt.errors import LoweringError
from fxopt.ir.attention import AttentionSpec, EmptyRows
from fxopt.ir.expression import parse
from tests.codegen.cases import Shape, operands
from tests.codegen.holes import HOLES
from tests.codegen.interpreted.test_hopper_backward import check

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")
SHAPES = {
    "D64": (Shape(64, 64, 200, 330, 2, "group", "bshd", batch=1, heads=4), "hopper:64x128s4list"),
    "D64 ahead": (Shape(64, 64, 330, 300, 2, "tile", "bhsd", batch=2, heads=2), "hopper:64x128s4alist"),
    "D128": (Shape(128, 128, 260, 260, 1, "group", "bshd", batch=2, heads=1), "hopper:64x128s2list"),
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("name", "shape", "rows"),
    [
        (name, shape, ("zero", "nan")[(n + m) % 2])
        for n, name in enumerate(name for name in HOLES if name != "plane")
        for m, shape in enumerate(SHAPES)
        if (n + m) % 2 == 0 or shape == "D64"
    ],
)
def test_gradients_are_within_the_budget_of_eager(name: str, shape: str, rows: EmptyRows, tmp_path: Path) -> None:
    sizes, config = SHAPES[shape]
    spec = HOLES[name].specification(torch.bfloat16, rows)
    spec = dataclasses.replace(spec, kv_map=sizes.kv_map, out_layout=sizes.layout)
    check(spec, operands(sizes, torch.bfloat16), HOLES[name].draw(sizes), config, tmp_path)


def test_masks_without_lists_are_refused() -> None:
    spec = AttentionSpec(parse("s * 0.25"), parse("s > 0.0"), out_dtype=torch.bfloat16)
    with pytest.raises(LoweringError, match="lists of the blocks that a mask keeps, and there is none"):
        source(spec, 64, 64, torch.bfloat16, "hopper:64x128s4list", [])
