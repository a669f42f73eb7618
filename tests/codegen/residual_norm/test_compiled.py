"""Kernels of residual norms compiled for GPUs that need not be there: spills, shared memory, wide loads, no atomics."""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fxopt.cache import import_source
from fxopt.codegen.norm.residual_norm.config import backward_candidates, candidates, read_config
from fxopt.codegen.norm.residual_norm.kernel import KIND, backward_source, source
from tests.codegen.residual_norm.cases import CASES, Case
from tests.codegen.test_compiled import POINTER, SHARED, stack_bytes

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

#: (architecture, case, width)
COMPILED = [
    *((90, name, width) for name in ("layer bf16", "rms llama") for width in (96, 384, 768, 1000, 1024, 1536)),
    *((90, name, width) for name in ("layer bf16", "rms llama") for width in (2048, 4096, 8192)),
    (90, "layer f32", 768),
    (90, "layer f32", 8192),
    (90, "layer wide stream", 1024),
    (90, "layer bf16", 16384),
    (90, "layer bf16", 20000),
    (80, "layer bf16", 768),
    (80, "layer bf16", 4096),
    (80, "layer f32", 1024),
    (100, "layer bf16", 768),
    (100, "rms llama", 4096),
    (100, "layer bf16", 8192),
]


def compiled(module: ModuleType, name: str, case: Case, warps: int, architecture: int, statistics: bool = True) -> Any:
    """A kernel as Triton would specialise it for aligned, contiguous operands."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(module, name)
    constants = {"WITH_SUM": True, "WITH_STATISTICS": statistics, "WITH_DSUM": True}
    signature = {p: "constexpr" if p in constants else _type(p, case) for p in kernel.arg_names}
    values = {(n,): constants[p] for n, p in enumerate(kernel.arg_names) if p in constants}
    aligned = {(n,): [["tt.divisibility", 16]] for n, p in enumerate(kernel.arg_names) if _aligned(p)}
    text = ASTSource(kernel, signature, values, aligned)
    return triton.compile(text, target=GPUTarget("cuda", architecture, 32), options={"num_warps": warps})


def _aligned(name: str) -> bool:
    return name.endswith(("_ptr", "_stride"))


def _type(name: str, case: Case) -> str:
    if not name.endswith("_ptr"):
        return "i32"
    plain = name.removesuffix("_ptr")
    if plain in ("mean", "scale") or plain.endswith("_partial"):
        return "*fp32"
    problem = case.problem(8)
    dtypes: dict[str, torch.dtype | None] = {
        "x": case.x,
        "residual": case.residual,
        "normal": problem.out,
        "dnormal": problem.out,
    }
    dtypes |= dict.fromkeys(("weight", "dweight"), case.weight) | dict.fromkeys(("bias", "dbias"), case.bias)
    return POINTER[dtypes.get(plain) or torch.promote_types(case.x, case.residual)]


def assert_lean(kernel: Any, architecture: int, folder: Path) -> None:
    assert stack_bytes(kernel.asm["cubin"], folder) == 0
    assert kernel.metadata.shared <= SHARED[architecture]
    assert not re.search(r"(?<![\w.])(atom|red)\.", kernel.asm["ptx"]), "sums must not depend on the order of programs"


@pytest.mark.parametrize(("architecture", "name", "width"), COMPILED)
def test_forward_compiles_without_spills(architecture: int, name: str, width: int, tmp_path: Path) -> None:
    case = CASES[name]
    for config in candidates(width):
        module = import_source(KIND, source(case.problem(width), config))
        kernel = compiled(module, "forward_kernel", case, read_config(config).warps, architecture)
        assert_lean(kernel, architecture, tmp_path)
        assert "ld.global.v4.b32" in kernel.asm["ptx"] and "st.global.v4.b32" in kernel.asm["ptx"], config


@pytest.mark.parametrize(("architecture", "name", "width"), [c for c in COMPILED if c[2] <= 8192])
def test_backward_compiles_without_spills(architecture: int, name: str, width: int, tmp_path: Path) -> None:
    case = CASES[name]
    wanted = [n for n in ("weight", "bias") if getattr(case, n) is not None]
    for config in backward_candidates(width):
        module = import_source(KIND, backward_source(case.problem(width), config, wanted))
        kernel = compiled(module, "backward_kernel", case, read_config(config).warps, architecture)
        assert_lean(kernel, architecture, tmp_path)
        assert "ld.global.v4.b32" in kernel.asm["ptx"], config
        assert_lean(compiled(module, "reduce_kernel", case, 8, architecture), architecture, tmp_path)


@pytest.mark.parametrize("width", [384, 768, 1024])
@pytest.mark.parametrize("name", ["layer bf16", "layer f32", "rms llama", "layer plain"])
def test_a_warp_sums_whole_rows_without_barriers(name: str, width: int) -> None:
    case = CASES[name]
    config = candidates(width)[0]
    module = import_source(KIND, source(case.problem(width), config))
    kernel = compiled(module, "forward_kernel", case, read_config(config).warps, 90, statistics=False)
    assert "bar.sync" not in kernel.asm["ptx"]
