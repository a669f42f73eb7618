"""Split kernels without a GPU: when they are tried, their source, and what they compile to."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fxopt.cache import import_source
from fxopt.codegen.attention import kernels
from fxopt.codegen.attention.portable.config import padded
from fxopt.codegen.attention.problem import Problem
from fxopt.codegen.attention.split.config import Config, fitting, read_config
from fxopt.codegen.attention.split.kernel import KIND, candidates, objection, source
from fxopt.errors import LoweringError
from fxopt.ir.attention import AttentionSpec, Capture
from fxopt.ir.expression import parse
from tests.codegen.cases import EXPRESSIONS, Shape, specification
from tests.codegen.test_compiled import HALF, POINTER, SHARED, SPECS, pytestmark, stack_bytes

triton = pytest.importorskip("triton")
__all__ = ["pytestmark"]

SHAPE = Shape(80, 80, 1, 4096, 2, "group", "bshd", heads=8)
LENGTHS = AttentionSpec(parse("s * 0.125"), parse("j < c0"), (Capture("b---", torch.int64),), out_dtype=HALF)
PROBLEM = Problem(LENGTHS, 128, 128, HALF, (9, 0), batch=16, heads=32, kv_heads=8, rows=1, keys=8192)


def compiled(
    spec: AttentionSpec,
    widths: tuple[int, int],
    dtype: torch.dtype,
    config: str,
    architecture: int,
    rows: int = 16,
    wide: bool = False,
) -> Any:
    """The kernel as Triton would specialise it for aligned operands with contiguous rows."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    cut = read_config(config)
    kernel = import_source(KIND, source(spec, *widths, dtype, config)).attention_kernel
    sizes = {"BLOCK_M": rows, "BLOCK_N": cut.block_n, "BLOCK_D": padded(widths[0]), "BLOCK_E": max(map(padded, widths))}
    switches = {"PRECISION": "ieee", "FAST_TANH": dtype is not torch.float32, "WITH_LSE": True}
    known = {**sizes, **switches, "EVEN": False, "WIDE": wide, "BATCHES": 16}
    known |= dict.fromkeys(("q_stride_d", "k_stride_d", "v_stride_e", "c0_stride_j"), 1)
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    aligned: dict[tuple[int], Any] = {}
    for position, name in enumerate(kernel.arg_names):
        if name in known:
            signature[name], constants[position,] = "constexpr", known[name]
            continue
        signature[name] = _type(name, spec, dtype)
        if name.endswith("_ptr") or "_stride_" in name:
            aligned[position,] = [["tt.divisibility", 16]]
    options = {"num_warps": cut.num_warps, "num_stages": cut.num_stages}
    text = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(text, target=GPUTarget("cuda", architecture, 32), options=options)


def _type(name: str, spec: AttentionSpec, dtype: torch.dtype) -> str:
    if not name.endswith("_ptr"):
        return "i32"
    if name in ("lse_ptr", "scratch_ptr", "counter_ptr"):
        return "*i32" if name == "counter_ptr" else "*fp32"
    read = spec.captures[int(name[1])].dtype if name[0] == "c" else dtype
    return "*i64" if read is torch.int64 else POINTER[read]


#: (architecture, specification, head dimensions, dtype, rows of a tile)
CASES = [
    (90, "plain", (128, 128), HALF, 16),
    (90, "causal", (128, 128), HALF, 64),
    (90, "lengths", (128, 128), HALF, 16),
    (90, "softcap-window", (256, 256), HALF, 32),
    (90, "tile-bias", (64, 64), HALF, 16),
    (90, "padding", (80, 96), HALF, 16),
    (90, "plain", (192, 128), HALF, 64),
    (90, "plain", (128, 128), torch.float32, 16),
    (80, "causal", (128, 128), HALF, 16),
    (80, "lengths", (64, 64), HALF, 64),
    (100, "causal", (128, 128), HALF, 16),
    (100, "lengths", (128, 128), HALF, 64),
]


@pytest.mark.parametrize(("architecture", "name", "widths", "dtype", "rows"), CASES)
def test_candidates_compile_without_spills(
    architecture: int, name: str, widths: tuple[int, int], dtype: torch.dtype, rows: int, tmp_path: Path
) -> None:
    spec = LENGTHS if name == "lengths" else SPECS[name]
    problem = Problem(spec, *widths, dtype, (architecture // 10, 0), 16, rows, 1, 1, 8192)
    for config in candidates(problem):
        kernel = compiled(spec, widths, dtype, config, architecture, rows)
        ptx = kernel.asm["ptx"]
        limit = SHARED[architecture] + 1024
        assert (kernel.metadata.shared + 1024) * read_config(config).programs <= limit, config
        assert stack_bytes(kernel.asm["cubin"], tmp_path) == 0, config
        # Keys and values come in steps of 16 bytes, past the first level of the cache.
        copies = re.findall(r"cp\.async\.\w+\.shared\.global \[[^\]]*\], \[[^\]]*\], (0x\w+|\d+)", ptx)
        assert {int(size, 0) for size in copies} == {16}, config
