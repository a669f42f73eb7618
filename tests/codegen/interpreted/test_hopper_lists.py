"""A stream that goes through lists of the blocks of keys that a mask keeps, emulated: numbers against float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fxopt.codegen.attention import reference
from fxopt.codegen.attention.hopper.kernel import source
from fxopt.errors import LoweringError
from fxopt.ir.attention import AttentionSpec, Capture, EmptyRows
from fxopt.ir.expression import parse
from fxopt.testing import assert_within_budget
from tests.codegen.cases import Shape, captured, operands, specification
from tests.codegen.holes import HOLES, kinds
from tests.codegen.interpreted.test_hopper_stream import exact, launch

pytest.importorskip("triton.experimental.gluon")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning"),
    pytest.mark.usefixtures("poisoned_outputs"),
]
CONFIGS = ("hopper:64x64s2q2a0list", "hopper:128x64s3q2a0list", "hopper:192x128s2q2a0blist")
SHAPES = {
    "square": Shape(16, 16, 330, 330, 1, "group", "bshd", heads=2, batch=2),
    "cross": Shape(24, 32, 135, 400, 2, "tile", "bhsd", heads=4, batch=1),
}
#: Those that read one boolean for each row and key have no stream.
NAMES = [name for name in HOLES if name != "plane"]


@pytest.mark.parametrize(
    ("name", "shape", "config", "rows"),
    [
        (name, shape, CONFIGS[(a + b) % 3], ("zero", "uniform", "nan")[(a // 3 + b) % 3])
        for a, name in enumerate(NAMES)
        for b, shape in enumerate(SHAPES)
    ],
)
def test_streams_are_within_the_budget_of_eager(
    name: str, shape: str, config: str, rows: EmptyRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, dtype = SHAPES[shape], torch.float16
    spec = HOLES[name].specification(dtype, rows)
    spec = dataclasses.replace(spec, kv_map=sizes.kv_map, out_layout=sizes.layout)
    q, k, v = operands(sizes, dtype)
    captures = HOLES[name].draw(sizes)
    out, lse = launch(spec, q, k, v, captures, config, monkeypatch)
    assert_within_budget(out, reference.attention(q, k, v, captures, str(spec)), exact(spec, q, k, v, captures))
    wanted = torch.logsumexp(reference.logits(spec, q.double(), k.double(), captures), -1)
    torch.testing.assert_close(lse.double(), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["causal", "causal-band", "alibi", "tile-bias", "window", "padding"])
def test_scores_and_bounds_beside_lists(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a score reads by key is that of the block at its place in the list."""
    sizes, dtype = SHAPES["square"], torch.bfloat16
    spec = specification(name, sizes, dtype, "zero")
    holes = parse("(((i // 16) + (j // 64)) % 2) == 0")
    spec = dataclasses.replace(spec, mask=holes if spec.mask is None else parse(f"({spec.mask}) & ({holes})"))
    q, k, v = operands(sizes, dtype)
    captures = captured(name, sizes, spec)
    out, _ = launch(spec, q, k, v, captures, "hopper:64x64s2q2a0list", monkeypatch)
    assert_within_budget(out, reference.attention(q, k, v, captures, str(spec)), exact(spec, q, k, v, captures))


@pytest.mark.parametrize("name", ["longformer", "strided", "interleaved documents"])
def test_blocks_that_no_row_keeps_are_not_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in the values of a block reaches only rows of blocks that keep one of its keys."""
    sizes = Shape(16, 16, 330, 330, 1, batch=1, heads=1)
    spec = HOLES[name].specification(torch.float16, "zero")
    q, k, v = operands(sizes, torch.float16)
    captures = HOLES[name].draw(sizes)
    config = "hopper:64x64s2q2a0list"
    clean = launch(spec, q, k, v, captures, config, monkeypatch)[0]
    told = kinds(spec, sizes, captures, 64, 64)[0, 0]
    block = int(torch.nonzero((told == 0).sum(0) * (told > 0).sum(0)).flatten()[-1])
    v[:, :, block * 64 : block * 64 + 64] = torch.nan
    out = launch(spec, q, k, v, captures, config, monkeypatch)[0]
    spared = (told[:, block] == 0).repeat_interleave(64)[:330]
    assert spared.any() and not spared.all()
    assert torch.equal(out[:, :, spared], clean[:, :, spared]) and out[:, :, ~spared].isnan().any()


def test_masks_without_lists_are_refused() -> None:
    def scaled(mask: str | None, *captures: Capture) -> AttentionSpec:
        kept = None if mask is None else parse(mask)
        return AttentionSpec(parse("s * 0.25"), kept, captures, out_dtype=torch.bfloat16)

    for spec in (scaled("s > 0.0"), scaled(None)):
        with pytest.raises(LoweringError, match="a list of the blocks that a mask keeps, and there is none"):
            source(spec, 64, 64, torch.bfloat16, CONFIGS[0])
    assert "key_at" in source(scaled("c0", Capture("b--j", torch.bool)), 64, 64, torch.bfloat16, CONFIGS[0])
