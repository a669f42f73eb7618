"""Kernels for few keys on the GPU: every expression and configuration that would be tried, against float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fxopt.codegen.attention import reference
from fxopt.codegen.attention.operator import attention_forward, module
from fxopt.codegen.attention.short.kernel import candidates
from fxopt.ir.attention import AttentionSpec
from fxopt.testing import assert_within_budget
from tests.codegen.cases import WITHOUT_BANDS, Shape, captured, operands, specification
from tests.gpu.problems import problem

pytestmark = pytest.mark.gpu

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
#: Batches that neither the steps of a program nor a period of four divide.
SHAPES = {
    "7": Shape(16, 16, 7, 7, batch=37),
    "windows": Shape(32, 32, 49, 49, 3, "group", "bshd", packed=True, batch=135, heads=3),
    "whole windows": Shape(32, 32, 64, 64, 2, "group", "bshd", packed=True, batch=70, heads=2),
    "ViT": Shape(64, 64, 197, 197, 4, "group", "bshd", packed=True, batch=3, heads=4),
    "BERT": Shape(64, 64, 128, 128, 4, "group", "bshd", batch=3, heads=4),
    "256": Shape(64, 64, 256, 256, 2, "tile", "bshd", batch=3, heads=4),
    "cross": Shape(40, 24, 70, 100, 1, "group", "bhsd", batch=3, heads=4),
    "padded heads": Shape(80, 80, 50, 50, 2, "group", "bshd", packed=True, batch=5),
}


def on_gpu(
    name: str, shape: Shape, spec: AttentionSpec, dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Tensor]]:
    """Operands in memory poisoned with NaN around them and, periodic with a period of four, captures."""
    torch.manual_seed(0)
    q, k, v = (_moved(x) for x in operands(shape, dtype))
    periodic = any(c.dims[0] == "p" for c in spec.captures)
    drawn = captured(name, dataclasses.replace(shape, batch=4) if periodic else shape, spec)
    return (q, k, v), [_moved(x) for x in drawn]


def _moved(x: Tensor) -> Tensor:
    buffer = torch.full((x.untyped_storage().nbytes() // x.element_size(),), 0, dtype=x.dtype, device="cuda")
    buffer = buffer.fill_(torch.nan) if x.is_floating_point() else buffer
    return torch.as_strided(buffer, x.shape, x.stride(), x.storage_offset()).copy_(x)


def exact(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, captures: Sequence[Tensor]) -> Tensor:
    wide = [c.double() if c.is_floating_point() else c for c in captures]
    wide_spec = str(dataclasses.replace(spec, out_dtype=torch.float64))
    return reference.attention(q.double(), k.double(), v.double(), wide, wide_spec)


#: Every expression with every shape; dtypes and candidates in turn, all of both where it matters most.
CROSS = [
    (name, shape, list(DTYPES)[(n + m) % 3], (n + m // 3) % 3)
    for n, name in enumerate(WITHOUT_BANDS)
    for m, shape in enumerate(SHAPES)
]
USUAL = [
    (name, shape, dtype, tried)
    for name, shape in (("swin", "windows"), ("tile-bias", "windows"), ("plain", "ViT"), ("padding", "BERT"))
    for dtype in DTYPES
    for tried in range(3)
]


@pytest.mark.parametrize(("name", "shape", "dtype", "tried"), list(dict.fromkeys((*CROSS, *USUAL))))
def test_kernel_is_within_the_budget_of_eager(name: str, shape: str, dtype: str, tried: int) -> None:
    sizes = SHAPES[shape]
    spec = specification(name, sizes, DTYPES[dtype])
    (q, k, v), captures = on_gpu(name, sizes, spec, DTYPES[dtype])
    found = candidates(problem(spec, q, k, v))
    if dtype == "f32" and sizes.keys > 64:
        pytest.skip("registers don't hold these logits in float32")
    config = found[tried % len(found)]
    eager = reference.attention(q, k, v, captures, str(spec))
    out, _ = attention_forward(q, k, v, captures, str(spec), config, False)
    assert out.stride() == eager.stride()
    assert_within_budget(out, eager, exact(spec, q, k, v, captures))


def test_lse_is_the_log_sum_exp_of_the_logits() -> None:
    spec = specification("swin", SHAPES["windows"], torch.float32)
    (q, k, v), captures = on_gpu("swin", SHAPES["windows"], spec, torch.float32)
    for config in candidates(problem(spec, q, k, v)):
        lse = attention_forward(q, k, v, captures, str(spec), config, True)[1]
        torch.testing.assert_close(lse, torch.logsumexp(reference.logits(spec, q, k, captures), -1))


def test_lengths_and_batches_do_not_specialise_the_kernel() -> None:
    spec = specification("plain", SHAPES["ViT"], torch.bfloat16)
    config = "short:64x128w4r2"
    for length, batch in ((97, 1), (100, 3), (112, 16), (127, 5)):
        q = torch.randn(batch, 2, length, 64, device="cuda", dtype=torch.bfloat16)
        attention_forward(q, q, q, [], str(spec), config, False)
    kernel = module(str(spec), 64, 64, torch.bfloat16, config).attention_kernel
    compiled = kernel.device_caches[torch.cuda.current_device()][0]
    assert len(compiled) <= 2, "lengths must not specialise the kernel (strides may, on divisibility by 16)"
