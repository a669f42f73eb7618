"""Groups of warps that take turns at their products, on the GPU: the same bits as without a baton, at any time."""

from __future__ import annotations

import pytest
import torch

from fxopt.cache import import_source
from fxopt.codegen.attention.hopper.kernel import source
from tests.codegen.cases import Shape, captured, operands, specification

pytestmark = pytest.mark.gpu

HALF = torch.bfloat16
#: Tiles of one block and of many, more programs than tiles and fewer, rows without keys.
SHAPES = {
    "many": Shape(64, 64, 700, 1000, 2, "group", "bshd", heads=8, batch=16),
    "one block": Shape(64, 64, 260, 50, 2, "group", "bshd", heads=2, batch=2),
    "more rows": Shape(64, 64, 1000, 330, 2, "tile", "bhsd", heads=16, batch=8),
}
NAMES = ("plain", "causal", "window", "prefix", "alibi", "softcap", "block-diagonal", "lengths")


@pytest.mark.parametrize("config", ["hopper:192x128s3q2a0", "hopper:128x128s4q2a0"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_turns_change_nothing(name: str, shape: str, config: str) -> None:
    torch.manual_seed(0)
    sizes = SHAPES[shape]
    spec = specification(name, sizes, HALF, "zero")
    q, k, v = (x.cuda() for x in operands(sizes, HALF))
    captures = [x.contiguous().cuda() for x in captured(name, sizes, spec)]
    modules = [
        import_source("attention_triton", source(spec, 64, 64, HALF, config + baton))
        for baton in ("", "b0", "b1", "b2")
    ]
    wanted = modules[0].launch(q, k, v, captures, True)
    for module in modules[1:]:
        for _ in range(10):
            found = module.launch(q, k, v, captures, True)
            assert torch.isfinite(found[0].float()).all()
            assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
