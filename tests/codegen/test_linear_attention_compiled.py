"""Generated kernels of linear attention compiled for GPUs that need not be there: spills, shared memory, addresses."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fxopt.cache import import_source
from fxopt.codegen.linear_attention.kernel import KIND, candidates
from fxopt.codegen.linear_attention.operands import Operands, read_operands
from fxopt.codegen.linear_attention.source import LinearText
from fxopt.ir.linear_attention import LinearSpec
from tests.codegen.test_compiled import HALF, POINTER, SHARED, stack_bytes

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

SINGLE, F16 = torch.float32, torch.float16
#: As the launchers choose it by default.
PRECISION = {SINGLE: "ieee", torch.bfloat16: "tf32", torch.float16: "tf32x3"}
WINDOW = LinearSpec(side=7, out_dtype=HALF, out_layout="bshd")
CAUSAL = LinearSpec(causal=True, out_dtype=HALF)
PLAIN = LinearSpec(out_dtype=HALF)
#: Architecture, specification, head dimension, tokens where they are known, operands, dtype.
CASES: list[tuple[int, LinearSpec, int, int | None, str, torch.dtype]] = [
    (90, WINDOW, 32, 49, "pc5", HALF),
    (90, LinearSpec(side=5), 64, 25, "pc3", SINGLE),
    (80, WINDOW, 32, 49, "pc5", HALF),
    (100, WINDOW, 32, 49, "pc5", HALF),
    (90, LinearSpec(side=14, out_dtype=HALF), 64, 196, "pc5", HALF),
    (90, PLAIN, 64, 16, "p", HALF),
    (90, PLAIN, 64, None, "k", HALF),
    (90, PLAIN, 128, None, "", HALF),
    (80, PLAIN, 256, None, "", HALF),
    (90, CAUSAL, 64, None, "k", HALF),
    (100, CAUSAL, 64, None, "", HALF),
    (80, CAUSAL, 128, None, "", HALF),
    (90, LinearSpec(causal=True, out_dtype=F16), 48, None, "k", F16),
    (80, LinearSpec(causal=True, out_dtype=F16), 32, None, "", F16),
    (90, LinearSpec(side=14, out_dtype=F16), 64, 196, "pc5", F16),
    (100, LinearSpec(side=7, out_dtype=F16), 32, 49, "pc5", F16),
    (90, LinearSpec(out_dtype=F16), 64, None, "k", F16),
    (90, LinearSpec(side=7), 32, 49, "pc5", SINGLE),
    (90, LinearSpec(), 128, None, "", SINGLE),
    (90, LinearSpec(causal=True), 64, None, "", SINGLE),
]


def compiled(text: LinearText, name: str, architecture: int) -> Any:
    """A kernel of the module as Triton would specialise it for aligned, contiguous operands, of one part."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(import_source(KIND, str(text)), name)
    block, keys, values, columns, warps = text.blocks[text.kernels[name].kind]
    constants: dict[str, Any] = {
        "BLOCK_N": block,
        "BLOCK_D": keys,
        "BLOCK_E": values,
        "COLUMNS": columns,
        "SPLIT": False,
        "SAVE": True,
    }
    constants |= {"EVEN_D": text.head_dim % keys == 0, "EVEN_E": text.value_dim % values == 0}
    constants |= {"GROUP": text.config.group, "PRECISION": PRECISION[text.dtype]}
    innermost = {p for p in kernel.arg_names if re.search(r"_stride_[de]$", p) and not p.startswith(("weight", "bias"))}
    constants |= dict.fromkeys(innermost, 1)
    signature = {p: "constexpr" if p in constants else _type(p, text.dtype) for p in kernel.arg_names}
    fixed = {(n,): constants[p] for n, p in enumerate(kernel.arg_names) if p in constants}
    aligned = {(n,): [["tt.divisibility", 16]] for n, p in enumerate(kernel.arg_names) if _aligned(p, constants)}
    source = ASTSource(kernel, signature, fixed, aligned)
    options = {"num_warps": warps, "num_stages": 1}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def _aligned(name: str, constants: dict[str, Any]) -> bool:
    loose = name.startswith(("weight", "bias", "keep"))
    return name not in constants and (name.endswith("_ptr") or ("_stride_" in name and not loose))


def _type(name: str, dtype: torch.dtype) -> str:
    if not name.endswith("_ptr"):
        return "i32"
    if name in ("sums_ptr", "state_ptr", "total_ptr"):
        return "*fp32"
    return "*i1" if name == "keep_ptr" else {**POINTER, torch.float16: "*fp16"}[dtype]


def texts(spec: LinearSpec, width: int, tokens: int | None, operands: Operands, dtype: torch.dtype) -> list[LinearText]:
    configs = candidates(spec, (tokens, tokens), (width, width), dtype, operands)
    return [LinearText(spec, width, width, dtype, operands, config) for config in configs]


@pytest.mark.parametrize(("architecture", "spec", "width", "tokens", "operands", "dtype"), CASES)
def test_every_kernel_compiles_without_spills(
    architecture: int,
    spec: LinearSpec,
    width: int,
    tokens: int | None,
    operands: str,
    dtype: torch.dtype,
    tmp_path: Path,
) -> None:
    found = texts(spec, width, tokens, read_operands(operands), dtype)
    assert found
    # The kernels of gradients are those of every configuration.
    asked = [(found[0], name) for name in found[0].kernels] + [(text, "forward_kernel") for text in found[1:]]
    for text, name in asked:
        kernel = compiled(text, name, architecture)
        ptx = kernel.asm["ptx"]
        what = (name, str(text.config))
        assert kernel.metadata.shared <= SHARED[architecture], what
        assert stack_bytes(kernel.asm["cubin"], tmp_path) == 0, what
        assert not re.search(r"(?<![\w.])(atom|red)\.", ptx), "sums must not depend on the order of blocks"
        if dtype is HALF and name != "filters_kernel":
            assert "mma" in ptx, what


@pytest.mark.parametrize("width", [32, 64, 128])
def test_results_in_bfloat16_are_products_of_bfloat16(width: int) -> None:
    """Of the sum in two parts, which are as exact as the result."""
    for text in texts(PLAIN, width, None, Operands(), HALF):
        assert "tf32" not in compiled(text, "forward_kernel", 90).asm["ptx"]


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("operands", ["", "pk"])
def test_heads_narrower_than_their_values_take_fewer_tokens_at_a_time(
    architecture: int, operands: str, tmp_path: Path
) -> None:
    spec, given = LinearSpec(causal=True, out_dtype=HALF), read_operands(operands)
    (config,) = candidates(spec, (None, None), (24, 48), HALF, given)
    assert (config.block, config.num_warps) == (32, 8)
    kernel = compiled(LinearText(spec, 24, 48, HALF, given, config), "forward_kernel", architecture)
    assert stack_bytes(kernel.asm["cubin"], tmp_path) == 0
