"""Kernels of narrow feed-forward blocks compiled for GPUs that need not be there: spills, memory, tensor cores."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fxopt.cache import import_source
from fxopt.codegen.mlp.narrow_mlp.config import candidates, read_config
from fxopt.codegen.mlp.narrow_mlp.kernel import KIND, source
from fxopt.codegen.mlp.narrow_mlp.problem import Problem
from tests.codegen.narrow_mlp.cases import CASES
from tests.codegen.test_compiled import SHARED, stack_bytes

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

POINTER = {torch.bfloat16: "*bf16", torch.float16: "*fp16"}
#: (architecture, case, width); four times as many hidden elements.
COMPILED = [
    *((90, "gelu bf16", width) for width in (32, 64, 96, 128, 192)),
    *((architecture, "gelu bf16", width) for architecture in (80, 100) for width in (96, 128, 192)),
    (90, "gelu f16", 96),
    (90, "silu f16", 192),
    (90, "tanh bf16", 176),
    (90, "relu bf16", 112),
    (80, "gelu f16", 192),
]


def compiled(problem: Problem, config: str, architecture: int) -> Any:
    """The kernel as Triton would specialise it for aligned, contiguous operands."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, chosen = import_source(KIND, source(problem, config)).forward_kernel, read_config(config)
    constants = {"UP_ROW": problem.width, "UP_COLUMN": 1, "DOWN_ROW": problem.hidden}
    constants |= {"DOWN_COLUMN": 1}
    names = list(enumerate(kernel.arg_names))
    pointer = POINTER[problem.dtype]
    signature = {p: "constexpr" if p in constants else pointer if p.endswith("_ptr") else "i32" for _, p in names}
    values = {(n,): constants[p] for n, p in names if p in constants}
    aligned = {(n,): [["tt.divisibility", 16]] for n, p in names if p.endswith(("_ptr", "_stride"))}
    options: dict[str, int] = {"num_warps": chosen.warps, "num_stages": chosen.stages}
    options |= {"maxnreg": chosen.registers} if chosen.registers else {}
    text = ASTSource(kernel, signature, values, aligned)
    return triton.compile(text, target=GPUTarget("cuda", architecture, 32), options=options)


@pytest.mark.parametrize(("architecture", "name", "width"), COMPILED)
def test_it_compiles_without_spills(architecture: int, name: str, width: int, tmp_path: Path) -> None:
    problem = CASES[name].problem(width, 4 * width)
    for config in candidates(problem, architecture):
        kernel = compiled(problem, config, architecture)
        assert stack_bytes(kernel.asm["cubin"], tmp_path) == 0, config
        assert kernel.metadata.shared <= SHARED[architecture], config
        assert "ld.global.v4.b32" in kernel.asm["ptx"] or "cp.async.cg" in kernel.asm["ptx"], config


@pytest.mark.parametrize("width", [32, 64, 96, 128, 192])
def test_all_products_are_asynchronous_on_hopper(width: int) -> None:
    problem = CASES["gelu bf16"].problem(width, 4 * width)
    for config in candidates(problem):
        ptx, ttgir = (compiled(problem, config, 90).asm[kind] for kind in ("ptx", "ttgir"))
        assert "wgmma.mma_async" in ptx and "mma.sync" not in ptx, config
        # Hidden elements are the left operand of the second product, out of registers.
        second = re.findall(r"warp_group_dot [^\n]*dot_op<\{opIdx = 0[^\n]*", ttgir)
        assert second and not re.search(r"tt\.dot |local_alloc %h", ttgir), config


@pytest.mark.parametrize("name", ["gelu bf16", "silu f16", "tanh bf16"])
def test_an_activation_takes_one_exponential_and_one_reciprocal(name: str) -> None:
    ptx = compiled(CASES[name].problem(64, 256), "128x64w8s3", 90).asm["ptx"]
    elements = 128 * 64 // 256
    assert len(re.findall(r"\brcp\.approx\.ftz\.f32", ptx)) == elements
    assert len(re.findall(r"\bex2\.approx", ptx)) == elements and "div." not in ptx
