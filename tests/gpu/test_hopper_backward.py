"""The Hopper backward on the GPU: every expression that it serves, odd lengths, grouped heads, NaN rows, dtypes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import fxopt
from fxopt.codegen.attention.backward.hopper.kernel import candidates, objection
from fxopt.codegen.attention.backward.operator import attention_backward
from fxopt.codegen.attention.operator import attention_forward
from fxopt.codegen.attention.portable.kernel import candidates as forward_candidates
from fxopt.ir.attention import AttentionSpec, EmptyRows
from fxopt.ir.expression import parse
from tests.codegen.cases import EXPRESSIONS, Shape, in_turn, operands, pairwise, specification
from tests.codegen.fillings import lengths, padded, vectors
from tests.codegen.gradients import assert_input_gradients_within_budget
from tests.codegen.holes import HOLES
from tests.gpu.problems import of_any_size
from tests.gpu.test_attention_kernels import DTYPES, on_gpu

pytestmark = pytest.mark.gpu

SHAPES = {
    "D64": Shape(64, 64, 256, 256, 2, "group", "bshd", heads=4),
    "D64 odd": Shape(64, 64, 201, 201, 1, "group", "bhsd", heads=2),
    "D64 packed": Shape(64, 64, 513, 513, 4, "group", "bshd", packed=True, heads=4),
    "D128": Shape(128, 128, 384, 384, 2, "tile", "bshd", heads=4),
    "D128 odd": Shape(128, 128, 301, 301, 1, "group", "bhsd", heads=2),
    "D128 more keys": Shape(128, 128, 258, 707, 1, "group", "bhsd", heads=2),
    "D128 fewer keys": Shape(128, 128, 700, 130, 2, "group", "bshd", heads=2),
    "D80": Shape(80, 80, 385, 385, 2, "tile", "bshd", packed=True),
    "D40": Shape(40, 40, 130, 130, 2, "group", "bshd"),
}


def configurations(spec: AttentionSpec, width: int, dtype: torch.dtype) -> list[str]:
    """Those that would be tried and, of narrow heads, another height and order of blocks; skips where there is none."""
    capability = torch.cuda.get_device_capability()
    reason = objection(spec, width, width, dtype, capability)
    if reason is not None:
        pytest.skip(reason)
    other = ["hopper:128x128s2", "hopper:64x128s4a"] if width <= 64 else []
    return list(dict.fromkeys((*map(str, candidates(of_any_size(spec, width, width, dtype))), *other)))


def backward(
    spec: AttentionSpec,
    inputs: Sequence[Tensor],
    captures: Sequence[Tensor],
    dout: Tensor,
    config: str,
    dlse: Tensor | None = None,
) -> list[Tensor]:
    q, k, v = inputs
    forward = str(forward_candidates(of_any_size(spec, q.shape[3], v.shape[3], q.dtype))[0])
    out, lse = attention_forward(q, k, v, list(captures), str(spec), forward, True)
    wanted = [False] * len(captures)
    found: list[Tensor] = attention_backward(q, k, v, list(captures), out, lse, dout, dlse, wanted, str(spec), config)
    return found


LISTED = {
    "D64": (Shape(64, 64, 400, 600, 2, "group", "bshd", heads=4, batch=2), ("64x128s4", "64x128s4a", "128x128s2")),
    "D128": (Shape(128, 128, 520, 390, 1, "tile", "bhsd", heads=2, batch=2), ("64x128s2",)),
}


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("empty", ["zero", "nan"])
@pytest.mark.parametrize("shape", LISTED)
@pytest.mark.parametrize("name", [name for name in HOLES if name != "plane"])
def test_lists_leave_out_blocks(name: str, shape: str, empty: EmptyRows, dtype: str) -> None:
    torch.manual_seed(0)
    sizes, configs = LISTED[shape]
    spec = HOLES[name].specification(DTYPES[dtype], empty)
    spec = dataclasses.replace(spec, kv_map=sizes.kv_map, out_layout=sizes.layout)
    configurations(spec, sizes.head_dim, DTYPES[dtype])
    inputs = [x.cuda() for x in operands(sizes, DTYPES[dtype])]
    captures = [x.cuda() for x in HOLES[name].draw(sizes)]
    dout = torch.randn(*inputs[0].shape[:3], sizes.value_dim, device="cuda").to(DTYPES[dtype])
    for config in configs:
        found = backward(spec, inputs, captures, dout, f"hopper:{config}list")
        assert_input_gradients_within_budget(spec, inputs, captures, found, dout)


@pytest.mark.parametrize(("name", "shape", "dtype"), pairwise(EXPRESSIONS, SHAPES, ("bf16", "f16")))
def test_gradients_are_within_the_budget_of_eager(name: str, shape: str, dtype: str) -> None:
    sizes = SHAPES[shape]
    empty = "zero" if list(SHAPES).index(shape) % 2 else "nan"
    spec = specification(name, sizes, DTYPES[dtype], empty)
    inputs, captures = on_gpu(name, sizes, spec, DTYPES[dtype])
    dout = torch.randn(*inputs[0].shape[:3], sizes.value_dim, device="cuda").to(DTYPES[dtype])
    config = in_turn(configurations(spec, sizes.head_dim, DTYPES[dtype]), name, shape, SHAPES)
    found = backward(spec, inputs, captures, dout, config)
    assert_input_gradients_within_budget(spec, inputs, captures, found, dout)


@pytest.mark.parametrize("shape", ["D64 odd", "D128 odd"])
@pytest.mark.parametrize("name", ["causal", "alibi"])
def test_gradients_of_the_log_sum_exp(name: str, shape: str) -> None:
    sizes = SHAPES[shape]
    spec = specification(name, sizes, torch.bfloat16, "zero")
    inputs, captures = on_gpu(name, sizes, spec, torch.bfloat16)
    dout, dlse = torch.randn_like(inputs[0]), torch.randn(inputs[0].shape[:3], device="cuda")
    for config in configurations(spec, sizes.head_dim, torch.bfloat16):
        found = backward(spec, inputs, captures, dout, config, dlse)
        assert_input_gradients_within_budget(spec, inputs, captures, found, dout, dlse)


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("mask", [None, "j <= i", "(j <= i) & (j > i - 700)"])
def test_long_sequences_and_many_programs(mask: str | None, width: int) -> None:
    """Barriers turn many times, and more programs than multiprocessors add to the same rows."""
    shape = Shape(width, width, 2048, 2048, 4, "group", "bshd", batch=2, heads=8)
    spec = AttentionSpec(
        parse("s * 0.1"), None if mask is None else parse(mask), out_dtype=torch.bfloat16, out_layout="bshd"
    )
    inputs, _ = on_gpu("plain", shape, spec, torch.bfloat16)
    dout = torch.randn_like(inputs[0])
    for config in configurations(spec, width, torch.bfloat16):
        for _ in range(3):
            found = backward(spec, inputs, [], dout, config)
        assert_input_gradients_within_budget(spec, inputs, [], found, dout)


@pytest.mark.parametrize("name", ["causal", "window", "lengths", "documents"])
@pytest.mark.parametrize("width", [64, 128])
def test_ranges_without_rows_and_shared_heads_end(name: str, width: int) -> None:
    """Keys that no row asks for, more blocks of keys than rows, and the other way round."""
    for rows, keys in ((33, 1030), (1030, 33), (1, 129), (129, 1)):
        shape = Shape(width, width, rows, keys, 4, "group", "bhsd", batch=2, heads=8)
        spec = specification(name, shape, torch.bfloat16, "zero")
        inputs, captures = on_gpu(name, shape, spec, torch.bfloat16)
        dout = torch.randn_like(inputs[0])
        for config in configurations(spec, width, torch.bfloat16):
            found = backward(spec, inputs, captures, dout, config)
            torch.cuda.synchronize()
            assert_input_gradients_within_budget(spec, inputs, captures, found, dout)


def test_a_graph_compiled_before_honours_the_deterministic_mode() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    compiled = fxopt.optimize(attention, lower="triton")
    q, k, v = (torch.randn(4, 8, 1024, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    dout = torch.randn_like(q)
    torch.autograd.grad(compiled(q, k, v), (q, k, v), dout)
    torch.use_deterministic_algorithms(True)
    try:
        first, *others = (torch.autograd.grad(compiled(q, k, v), (q, k, v), dout) for _ in range(6))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("name", ["mixed", "empty", "equal"])
def test_gradients_of_padded_batches(name: str, rows: bool) -> None:
    """Rows and keys that are padding are left out by limits that a small kernel finds."""
    torch.manual_seed(0)
    filled = lengths(name, 1100)
    spec = padded(rows, "zero")
    sizes = Shape(64, 64, 1100, 1100, 2, batch=len(filled), heads=4)
    inputs = [x.cuda() for x in operands(sizes, torch.bfloat16)]
    captures = [c.cuda() for c in vectors(filled, 1100, rows)]
    dout = torch.randn(*inputs[0].shape, device="cuda", dtype=torch.bfloat16)
    for config in configurations(spec, 64, torch.bfloat16):
        found = backward(spec, inputs, captures, dout, config)
        assert_input_gradients_within_budget(spec, inputs, captures, found, dout, None)
