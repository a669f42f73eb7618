"""The streaming Hopper kernel against float64: its Gluon kernel emulated, its Triton kernels in the interpreter."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fxopt.codegen.attention import reference
from fxopt.codegen.attention.hopper.kernel import objection, source
from fxopt.codegen.attention.hopper.tile import is_tile
from fxopt.codegen.attention.problem import Problem
from fxopt.testing import assert_within_budget
from tests.codegen.cases import EXPRESSIONS, Shape, captured, operands, pairwise, specification
from tests.codegen.emulated_gluon import emulated

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
SHAPES = {
    "even": Shape(64, 64, 384, 384, 2, "group", "bhsd", heads=2),
    "tails": Shape(64, 64, 331, 331, 1, "group", "bshd", heads=2),
    "fewer-keys": Shape(64, 64, 400, 77, 2, "tile", "bshd", batch=1, heads=4),
    "more-keys": Shape(64, 64, 270, 490, 1, "group", "bhsd", batch=1, heads=2),
}
CONFIGS = ("hopper:192x128s3q2a0", "hopper:128x128s4q2a0", "hopper:128x64s4q3a1")
NAMES = [
    name
    for name in EXPRESSIONS
    if objection(Problem(specification(name, SHAPES["even"], torch.bfloat16), 64, 64, torch.bfloat16, (9, 0))) is None
]


@pytest.fixture(autouse=True)
def few_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer than there are tiles, so that programs take several."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=3))


@pytest.mark.parametrize(("name", "shape", "config"), pairwise(NAMES, SHAPES, CONFIGS))
def test_results_are_within_the_budget_of_eager(name: str, shape: str, config: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes, dtype = SHAPES[shape], torch.bfloat16
    if config.endswith("a1") and any(map(is_tile, specification(name, sizes, dtype).captures)):
        config = CONFIGS[1]
    spec = specification(name, sizes, dtype, "zero" if len(shape) % 2 else "nan")
    (q, k, v), captures = operands(sizes, dtype), captured(name, sizes, spec)
    wide = [c.double() if c.is_floating_point() else c for c in captures]
    exact = reference.attention(
        q.double(), k.double(), v.double(), wide, str(dataclasses.replace(spec, out_dtype=torch.float64))
    )
    eager = reference.attention(q, k, v, captures, str(spec))
    lse = torch.logsumexp(reference.logits(spec, q.double(), k.double(), wide), -1)
    module = emulated(source(spec, 64, 64, dtype, config), tmp_path)
    out, found = module.launch(q, k, v, captures, True)
    assert_within_budget(out, eager, exact)
    torch.testing.assert_close(found.double(), lse, rtol=2e-2, atol=2e-2)
