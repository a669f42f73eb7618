"""Every family of generated attention kernels on the GPU: each expression and shape; configurations in turn."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import get_args

import pytest
import torch
from torch import Tensor

from fxopt.codegen.attention import reference
from fxopt.codegen.attention.kernels import FAMILIES
from fxopt.codegen.attention.operator import attention_forward
from fxopt.ir.attention import AttentionSpec, EmptyRows
from fxopt.testing import assert_within_budget
from tests.codegen.cases import EXPRESSIONS, Shape, in_turn, operands, pairwise, specification
from tests.codegen.vectors import VECTORS
from tests.gpu.problems import problem
from tests.gpu.test_attention_kernels import DTYPES, on_gpu

pytestmark = pytest.mark.gpu

SHAPES = {
    "D64": Shape(64, 64, 200, 200, 2, "group", "bshd", heads=4),
    "D64 packed": Shape(64, 64, 513, 513, 4, "group", "bshd", packed=True, heads=4),
    "D128": Shape(128, 128, 300, 300, 1, "tile", "bhsd", heads=2),
    "D128 cross": Shape(128, 128, 258, 333, 1, "group", "bhsd", heads=2),
    "D80": Shape(80, 80, 385, 385, 2, "tile", "bshd", packed=True),
    "D256": Shape(256, 256, 260, 260, 2, "group", "bshd"),
    "D16": Shape(16, 16, 300, 270, 2, "group", "bshd", heads=4),
    "D32": Shape(32, 32, 261, 515, 1, "tile", "bhsd", heads=2),
    "D48": Shape(48, 48, 322, 322, 2, "group", "bshd", packed=True),
    # More tiles than a device takes at once, several blocks of keys to each, or one.
    "D64 many": Shape(64, 64, 700, 333, 4, "group", "bshd", heads=16, batch=8),
    "D64 one block": Shape(64, 64, 610, 40, 8, "tile", "bhsd", heads=16, batch=8),
    "D128 many": Shape(128, 128, 520, 390, 2, "group", "bshd", heads=16, batch=4),
}


def widened(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Real ones in float64."""
    return [x.double() if x.is_floating_point() else x for x in tensors]


def expected(spec: AttentionSpec, inputs: Sequence[Tensor], captures: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """What float64 gives, and what eager PyTorch gives in the dtype of the operands."""
    wide = str(dataclasses.replace(spec, out_dtype=torch.float64))
    q, k, v = inputs
    exact = reference.attention(q.double(), k.double(), v.double(), widened(captures), wide)
    return exact, reference.attention(q, k, v, captures, str(spec))


@pytest.mark.parametrize(("name", "shape", "dtype"), pairwise(EXPRESSIONS, SHAPES, ("bf16", "f16")))
@pytest.mark.parametrize("prefix", [prefix for prefix in FAMILIES if prefix])
def test_kernel_is_within_the_budget_of_eager(prefix: str, name: str, shape: str, dtype: str) -> None:
    sizes = SHAPES[shape]
    spec = specification(name, sizes, DTYPES[dtype])
    (q, k, v), captures = on_gpu(name, sizes, spec, DTYPES[dtype])
    asked = problem(spec, q, k, v)
    reason = FAMILIES[prefix].objection(asked)
    if reason is not None:
        pytest.skip(reason)
    exact, eager = expected(spec, (q, k, v), captures)
    lse = torch.logsumexp(reference.logits(spec, q.double(), k.double(), widened(captures)), -1)
    config = in_turn(FAMILIES[prefix].candidates(asked), name, shape, SHAPES)
    out, found = attention_forward(q, k, v, captures, str(spec), config, True)
    assert_within_budget(out, eager, exact)
    assert out.stride() == eager.stride()
    torch.testing.assert_close(found.double(), lse, rtol=2e-2, atol=2e-2)


#: Captured by key, by distance and by row and key; a mask, which bounds blocks of keys, or none.
WIDTHS_OF = ("plain", "causal", "softcap", "alibi", "causal-padding", "causal-band", "tile-bias")


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("width", [40, 72, 80, 96, 192])
@pytest.mark.parametrize("name", WIDTHS_OF)
def test_head_widths_of_the_hopper_kernel(name: str, width: int, dtype: str) -> None:
    """Widths that are no powers of two are padded in shared memory; what lies beyond them must count nowhere."""
    sizes = Shape(width, width, 300, 328, 1, "group", "bshd", heads=2)
    spec = specification(name, sizes, DTYPES[dtype])
    (q, k, v), captures = on_gpu(name, sizes, spec, DTYPES[dtype])
    asked = problem(spec, q, k, v)
    reason = FAMILIES["hopper"].objection(asked)
    if reason is not None:
        pytest.skip(reason)
    exact, eager = expected(spec, (q, k, v), captures)
    for config in FAMILIES["hopper"].candidates(asked):
        out, _ = attention_forward(q, k, v, captures, str(spec), config, True)
        assert_within_budget(out, eager, exact)


@pytest.mark.parametrize("width", [32, 64, 128])
@pytest.mark.parametrize("empty_rows", get_args(EmptyRows))
@pytest.mark.parametrize("name", VECTORS)
def test_captured_vectors_limit_the_keys_of_the_hopper_kernel(name: str, empty_rows: EmptyRows, width: int) -> None:
    torch.manual_seed(0)
    shape = Shape(width, width, 700, 900, 2, heads=4, batch=12)
    spec = VECTORS[name].specification(torch.bfloat16, empty_rows)
    q, k, v = (x.cuda() for x in operands(shape, torch.bfloat16))
    captures = [c.cuda() for c in VECTORS[name].draw(shape)]
    asked = problem(spec, q, k, v)
    reason = FAMILIES["hopper"].objection(asked)
    if reason is not None:
        pytest.skip(reason)
    exact, eager = expected(spec, (q, k, v), captures)
    for config in FAMILIES["hopper"].candidates(asked):
        for with_lse in (False, True):
            out, lse = attention_forward(q, k, v, captures, str(spec), config, with_lse)
            assert_within_budget(out, eager, exact)
            assert (lse.numel() > 0) == with_lse
