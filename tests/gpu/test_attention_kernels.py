"""Generated kernels on the GPU: every expression and dtype, configurations in turn, against float64."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest
import torch
from torch import Tensor

from fxopt.codegen.attention import reference
from fxopt.codegen.attention.operator import attention_forward
from fxopt.codegen.attention.portable.kernel import candidates
from fxopt.ir.attention import AttentionSpec, EmptyRows
from fxopt.testing import assert_within_budget, evaluate, oracle_gradients
from tests.codegen.cases import EXPRESSIONS, SHAPES, Shape, captured, in_turn, operands, pairwise, specification
from tests.codegen.holes import HOLES
from tests.codegen.vectors import VECTORS
from tests.gpu.problems import of_any_size

pytestmark = pytest.mark.gpu

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
LARGE = {
    "D64": Shape(64, 64, 200, 200, 2, "group", "bshd", heads=4),
    "D128 cross": Shape(128, 128, 130, 333, 1, "group", "bhsd", heads=2),
    "D96": Shape(96, 96, 129, 129, 2, "tile", "bshd", packed=True),
    "D192": Shape(192, 128, 65, 97, 1),
    "D256": Shape(256, 256, 100, 100, 2, "group", "bshd"),
}
ALL_SHAPES = SHAPES | LARGE


def on_gpu(name: str, shape: Shape, spec: AttentionSpec, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Operands and captures on the device, in memory poisoned with NaN around them."""
    torch.manual_seed(0)
    tensors = [x.detach() for x in operands(shape, dtype)]
    moved = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda").copy_(x) for x in tensors]
    return moved, [x.cuda() for x in captured(name, shape, spec)]


@pytest.mark.parametrize(("name", "shape", "dtype"), pairwise(EXPRESSIONS, ALL_SHAPES, DTYPES))
def test_kernel_is_within_the_budget_of_eager(name: str, shape: str, dtype: str) -> None:
    sizes = ALL_SHAPES[shape]
    spec = specification(name, sizes, DTYPES[dtype])
    (q, k, v), captures = on_gpu(name, sizes, spec, DTYPES[dtype])
    wide = [c.double() if c.is_floating_point() else c for c in captures]
    wide_spec = str(dataclasses.replace(spec, out_dtype=torch.float64))
    exact = reference.attention(q.double(), k.double(), v.double(), wide, wide_spec)
    eager = reference.attention(q, k, v, captures, str(spec))
    configs = candidates(of_any_size(spec, sizes.head_dim, sizes.value_dim, q.dtype))
    assert configs, "no configuration fits this device"
    config = in_turn(configs, name, shape, ALL_SHAPES)
    out, _ = attention_forward(q, k, v, captures, str(spec), str(config), False)
    assert_within_budget(out, eager, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("empty_rows", get_args(EmptyRows))
@pytest.mark.parametrize("name", VECTORS)
def test_captured_vectors_limit_the_keys(name: str, empty_rows: EmptyRows, dtype: str) -> None:
    torch.manual_seed(0)
    shape = Shape(64, 64, 400, 600, 2, heads=2, batch=4)
    spec = VECTORS[name].specification(DTYPES[dtype], empty_rows)
    q, k, v = (x.cuda() for x in operands(shape, DTYPES[dtype]))
    captures = [c.cuda() for c in VECTORS[name].draw(shape)]
    wide_spec = str(dataclasses.replace(spec, out_dtype=torch.float64))
    exact = reference.attention(q.double(), k.double(), v.double(), captures, wide_spec)
    eager = reference.attention(q, k, v, captures, str(spec))
    for config in candidates(of_any_size(spec, 64, 64, q.dtype)):
        out, _ = attention_forward(q, k, v, captures, str(spec), str(config), False)
        assert_within_budget(out, eager, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("empty_rows", get_args(EmptyRows))
@pytest.mark.parametrize("name", HOLES)
def test_lists_leave_out_blocks(name: str, empty_rows: EmptyRows, dtype: str) -> None:
    torch.manual_seed(0)
    shape = Shape(64, 64, 400, 600, 1, heads=2, batch=2)
    spec = HOLES[name].specification(DTYPES[dtype], empty_rows)
    q, k, v = (x.cuda() for x in operands(shape, DTYPES[dtype]))
    captures = [c.cuda() for c in HOLES[name].draw(shape)]
    wide_spec = str(dataclasses.replace(spec, out_dtype=torch.float64))
    exact = reference.attention(q.double(), k.double(), v.double(), captures, wide_spec)
    eager = reference.attention(q, k, v, captures, str(spec))
    found = candidates(of_any_size(spec, 64, 64, q.dtype))
    for config in dict.fromkeys(dataclasses.replace(config, listed=True) for config in found):
        out, lse = attention_forward(q, k, v, captures, str(spec), str(config), True)
        assert_within_budget(out, eager, exact)
        wanted = torch.logsumexp(reference.logits(spec, q.double(), k.double(), captures), -1)
        torch.testing.assert_close(lse.double(), wanted, rtol=1e-3, atol=1e-3)
        again = [attention_forward(q, k, v, captures, str(spec), str(config), True)[0] for _ in range(2)]
        assert all(torch.equal(x.nan_to_num(), out.nan_to_num()) for x in again), "blocks come in one order"


def test_lists_may_change_between_replays_of_a_graph() -> None:
    torch.manual_seed(0)
    shape = Shape(64, 64, 512, 512, 2, heads=2, batch=2)
    spec = HOLES["interleaved documents"].specification(torch.bfloat16, "zero")
    q, k, v = (x.cuda().contiguous() for x in operands(shape, torch.bfloat16))
    captures = [c.cuda() for c in HOLES["interleaved documents"].draw(shape)]
    attention_forward(q, k, v, captures, str(spec), "64x64w4s3list", False)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = attention_forward(q, k, v, captures, str(spec), "64x64w4s3list", False)
    for shift in (0, 100, 300):
        for x, axis in zip(captures, (2, 3), strict=True):
            x.copy_(x.roll(shift, axis))
        graph.replay()
        torch.testing.assert_close(out, attention_forward(q, k, v, captures, str(spec), "64x64w4s3", False)[0])


def test_vectors_may_change_between_replays_of_a_graph() -> None:
    torch.manual_seed(0)
    shape = Shape(64, 64, 512, 512, 2, heads=2, batch=4)
    spec = VECTORS["right padding"].specification(torch.bfloat16, "zero")
    q, k, v = (x.cuda().contiguous() for x in operands(shape, torch.bfloat16))
    (kept,) = (c.cuda() for c in VECTORS["right padding"].draw(shape))
    config = str(candidates(of_any_size(spec, 64, 64, q.dtype))[0])
    attention_forward(q, k, v, [kept], str(spec), config, False)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = attention_forward(q, k, v, [kept], str(spec), config, False)
    for change in (kept.clone(), ~kept, kept.flip(3)):
        kept.copy_(change)
        graph.replay()
        torch.testing.assert_close(out, attention_forward(q, k, v, [kept], str(spec), config, False)[0])


@pytest.mark.parametrize("name", ["plain", "causal", "tile-bias", "softcap", "additive-mask"])
def test_gradients_are_within_the_budget_of_eager(name: str) -> None:
    shape = LARGE["D64"]
    spec = specification(name, shape, torch.float32)
    (q, k, v), captures = on_gpu(name, shape, spec, torch.float32)
    config = candidates(of_any_size(spec, 64, 64, q.dtype))[0]
    leaves = [x.requires_grad_() for x in (q, k, v, *(c for c in captures if c.is_floating_point()))]

    def fused(q: Tensor, k: Tensor, v: Tensor, *captures: Tensor) -> Tensor:
        out: Tensor = attention_forward(q, k, v, list(captures), str(spec), str(config), True)[0]
        return out

    def eager(q: Tensor, k: Tensor, v: Tensor, *captures: Tensor) -> Tensor:
        dtype = torch.float64 if q.dtype is torch.float64 else spec.out_dtype
        return reference.attention(q, k, v, captures, str(dataclasses.replace(spec, out_dtype=dtype)))

    results = evaluate(fused, *leaves), evaluate(eager, *leaves), oracle_gradients(eager, *leaves)
    assert_within_budget(*results, floor=1.0)


def test_one_kernel_serves_every_length() -> None:
    spec = specification("causal", LARGE["D64"], torch.bfloat16)
    config = str(candidates(of_any_size(spec, 64, 64, torch.bfloat16))[0])
    from fxopt.codegen.attention.operator import module

    kernel = module(str(spec), 64, 64, torch.bfloat16, config).attention_kernel
    for length in (17, 64, 65, 1000, 1024):
        q = torch.randn(1, 2, length, 64, device="cuda", dtype=torch.bfloat16)
        attention_forward(q, q, q, [], str(spec), config, False)
    compiled = kernel.device_caches[torch.cuda.current_device()][0]
    assert len(compiled) <= 2, "lengths must not specialise the kernel (strides may, on divisibility by 16)"
