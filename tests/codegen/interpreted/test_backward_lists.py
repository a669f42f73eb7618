"""Backward kernels that go through lists of the blocks that a mask keeps, against float64; and what they leave out."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fxopt.cache import import_source
from fxopt.codegen.attention.backward.kernel import KIND, candidates, read_backward, source
from fxopt.codegen.attention.problem import Problem
from fxopt.errors import LoweringError
from fxopt.ir.attention import AttentionSpec, Capture, EmptyRows
from fxopt.ir.expression import parse
from tests.codegen.cases import Shape, operands
from tests.codegen.gradients import assert_gradients_within_budget
from tests.codegen.holes import HOLES, kinds
from tests.codegen.interpreted.test_kernel import launch as forward

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning"),
    pytest.mark.usefixtures("poisoned_outputs"),
]
CONFIG = "16x32w4s2list-32x16w4s2list"
SIZES = {
    "square": Shape(16, 16, 70, 70, 1, "group", "bshd", batch=2, heads=1),
    "cross": Shape(24, 16, 36, 90, 1, "tile", batch=1, heads=2),
}
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
CROSS = [
    (name, list(SIZES)[n % 2], list(DTYPES)[n // 2 % 2], ("zero", "uniform", "nan")[n % 3] if n // 2 % 2 else "zero")
    for n, name in enumerate(HOLES)
]


def specification(name: str, sizes: Shape, dtype: torch.dtype, empty_rows: str) -> AttentionSpec:
    spec = HOLES[name].specification(dtype, empty_rows)  # type: ignore[arg-type]
    return dataclasses.replace(spec, kv_map=sizes.kv_map, out_layout=sizes.layout)


@pytest.mark.parametrize(("name", "size", "dtype", "empty_rows"), CROSS)
def test_gradients_are_within_the_budget_of_eager(name: str, size: str, dtype: str, empty_rows: EmptyRows) -> None:
    sizes = SIZES[size]
    spec = specification(name, sizes, DTYPES[dtype], empty_rows)
    q, k, v = inputs = operands(sizes, DTYPES[dtype])
    captures = HOLES[name].draw(sizes)
    out, lse = forward(spec, q, k, v, captures, with_lse=True)
    text = source(spec, q.shape[3], v.shape[3], q.dtype, read_backward(CONFIG), [False] * len(captures))
    dout = torch.randn(*q.shape[:3], v.shape[3]).to(spec.out_dtype)
    found = import_source(KIND, text).launch(q, k, v, captures, out, lse, dout)
    assert_gradients_within_budget(spec, inputs, captures, found, dout)


@pytest.mark.parametrize("name", ["longformer", "interleaved documents"])
def test_blocks_that_are_left_out_are_not_read(name: str) -> None:
    """NaN in a block of rows reaches the gradients of keys that it keeps, and no others; also the other way round."""
    sizes = Shape(16, 16, 96, 96, 1, batch=1, heads=1)
    spec = specification(name, sizes, torch.bfloat16, "zero")
    q, k, v = operands(sizes, torch.bfloat16)
    captures = HOLES[name].draw(sizes)
    out, lse = forward(spec, q, k, v, captures, with_lse=True)
    module = import_source(KIND, source(spec, 16, 16, q.dtype, read_backward(CONFIG), [False] * len(captures)))
    dout = torch.randn(*out.shape).to(out.dtype)
    clean = module.launch(q, k, v, captures, out, lse, dout)
    told = kinds(spec, sizes, captures, 16, 32)[0, 0]
    assert (told == 0).any()
    row = int(torch.nonzero((told == 0).any(1))[0])
    poisoned = dout.clone()
    poisoned[:, :, row * 16 : row * 16 + 16] = torch.nan
    _, dk, dv = module.launch(q, k, v, captures, out, lse, poisoned)
    spared = (told[row] == 0).repeat_interleave(32)
    for found, expected in ((dk, clean[1]), (dv, clean[2])):
        assert torch.equal(found[:, :, spared], expected[:, :, spared]) and found[:, :, ~spared].isnan().any()
    told = kinds(spec, sizes, captures, 32, 16)[0, 0]
    key = int(torch.nonzero((told == 0).any(0))[0])
    hidden = v.clone()
    hidden[:, :, key * 16 : key * 16 + 16] = torch.nan
    dq = module.launch(q, k, hidden, captures, out, lse, dout)[0]
    spared = (told[:, key] == 0).repeat_interleave(32)
    assert torch.equal(dq[:, :, spared], clean[0][:, :, spared]) and dq[:, :, ~spared].isnan().any()


def test_dropped_weights_are_those_of_the_forward() -> None:
    sizes = Shape(16, 16, 64, 64, 1, batch=1, heads=2)
    plain = specification("longformer", sizes, torch.float32, "zero")
    spec = dataclasses.replace(plain, dropout=0.3)
    q, k, v = operands(sizes, torch.float32)
    dout, seed = torch.randn(1, 2, 64, 16), torch.tensor([7])
    lse = forward(plain, q, k, v, [], with_lse=True)[1]
    found = []
    for config in (CONFIG, CONFIG.replace("list", "")):
        module = import_source(KIND, source(spec, 16, 16, torch.float32, read_backward(config), []))
        found.append(module.launch(q, k, v, [], torch.zeros_like(dout), lse, dout, seed=seed))
    torch.testing.assert_close(*found)


def test_lists_come_first_where_they_leave_out_many_blocks() -> None:
    sizes = Shape(64, 64, 4096, 4096)
    masks = {"(j <= i) & ((j < 4) | ((i - j) < 256))": True, "j <= i": False}
    for mask, listed in masks.items():
        spec = dataclasses.replace(specification("ends", sizes, torch.bfloat16, "zero"), mask=parse(mask))
        for capability in ((8, 0), (9, 0), (10, 0)):
            found = candidates(Problem(spec, 64, 64, torch.bfloat16, capability, rows=4096, keys=4096))
            assert [config.listed for config in found] == [listed, False]
    assert not any(
        config.listed for config in candidates(Problem(spec, 64, 64, torch.bfloat16, (9, 0), rows=128, keys=128))
    )


@pytest.mark.parametrize("text", ["16x32w4s2list-32x16w4s2", "16x32w4s2-32x16w4s2list"])
def test_lists_are_for_both_kernels(text: str) -> None:
    with pytest.raises(LoweringError, match="lists are for both kernels"):
        read_backward(text)
    with pytest.raises(LoweringError, match="there is none"):
        source(AttentionSpec(parse("s")), 16, 16, torch.float32, read_backward(CONFIG), [])
    band = AttentionSpec(parse("s + c0"), parse("(j < 4) | (j >= i)"), (Capture("-h-d", torch.float32),))
    with pytest.raises(LoweringError, match="bands have none"):
        source(band, 16, 16, torch.float32, read_backward(CONFIG), [True])
