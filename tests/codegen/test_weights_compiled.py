"""Generated kernels of attention weights compiled for GPUs that need not be there: spills, shared memory, addresses."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fxopt.cache import import_source
from fxopt.codegen.attention.portable.config import Config, padded
from fxopt.codegen.attention.weights.kernel import KIND, candidates, source
from fxopt.codegen.attention.weights.source import KINDS
from fxopt.ir.attention import AttentionSpec
from tests.codegen.test_compiled import HALF, POINTER, SHARED, SPECS, stack_bytes

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

#: (architecture, specification, head dimension, dtype)
CASES = [
    (90, "plain", 64, HALF),
    (90, "softcap-window", 64, HALF),
    (90, "causal", 128, HALF),
    (90, "tile-bias", 128, HALF),
    (90, "padding", 72, HALF),
    (90, "plain", 64, torch.float32),
    (80, "causal", 64, HALF),
    (100, "tile-bias", 64, HALF),
]


def compiled(
    name: str,
    spec: AttentionSpec,
    width: int,
    dtype: torch.dtype,
    kind: str,
    config: Config,
    architecture: int,
    *,
    known: bool = False,
) -> Any:
    """A kernel of the module as Triton would specialise it for aligned, contiguous operands."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(import_source(KIND, source(spec, width, dtype, kind, str(config), known)), name)
    constants = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_D": padded(width), "PRECISION": "ieee"}
    constants |= {"FAST_TANH": dtype is not torch.float32, "EVEN": False, "WIDE": False}
    constants |= dict.fromkeys(("q_stride_d", "k_stride_d", "c0_stride_j"), 1)
    signature: dict[str, str] = {}
    for parameter in kernel.arg_names:
        signature[parameter] = "constexpr" if parameter in constants else _type(parameter, spec, dtype)
    values = {(n,): constants[p] for n, p in enumerate(kernel.arg_names) if p in constants}
    aligned = {(n,): [["tt.divisibility", 16]] for n, p in enumerate(kernel.arg_names) if _aligned(p, constants)}
    text = ASTSource(kernel, signature, values, aligned)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return triton.compile(text, target=GPUTarget("cuda", architecture, 32), options=options)


def _aligned(name: str, constants: dict[str, Any]) -> bool:
    return name not in constants and (name.endswith("_ptr") or "_stride_" in name)


def _type(name: str, spec: AttentionSpec, dtype: torch.dtype) -> str:
    if not name.endswith("_ptr"):
        return "i32"
    if name in ("peak_ptr", "total_ptr", "lse_ptr"):
        return "*fp32"
    return POINTER[spec.captures[int(name[1])].dtype if name[0] == "c" else dtype]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("architecture", "name", "width", "dtype"), CASES)
def test_first_candidate_compiles_without_spills(
    architecture: int, name: str, width: int, dtype: torch.dtype, kind: str, tmp_path: Path
) -> None:
    spec = SPECS[name]
    config = candidates(spec, width, dtype)[0]
    for kernel_name in ("rows_kernel", *(("columns_kernel",) if kind == "column_sum" else ())):
        kernel = compiled(kernel_name, spec, width, dtype, kind, config, architecture)
        ptx = kernel.asm["ptx"]
        assert kernel.metadata.shared <= SHARED[architecture]
        assert stack_bytes(kernel.asm["cubin"], tmp_path) == 0, (kernel_name, str(config))
        assert ("wgmma.mma_async" in ptx) == (architecture == 90 and dtype is HALF)
        assert re.search(r"mul(\.lo|\.wide)\.[su]\d+\s+%rd", ptx), "addresses are not computed in 64 bits"
        assert not re.search(r"(?<![\w.])(atom|red)\.", ptx), "sums must not depend on the order of blocks"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("architecture", "name"), [(90, "plain"), (90, "softcap-window"), (80, "causal"), (100, "padding")]
)
def test_one_walk_compiles_without_spills(architecture: int, name: str, kind: str, tmp_path: Path) -> None:
    config = candidates(SPECS[name], 64, HALF)[0]
    kernel_name = "columns_kernel" if kind == "column_sum" else "rows_kernel"
    one, two = (
        compiled(kernel_name, SPECS[name], 64, HALF, kind, config, architecture, known=known) for known in (True, False)
    )
    assert stack_bytes(one.asm["cubin"], tmp_path) == 0, (kernel_name, str(config))
    assert one.metadata.shared <= SHARED[architecture]
    products, of_both = (kernel.asm["ttir"].count("tt.dot ") for kernel in (one, two))
    # Column sums have the first walk in a kernel of its own, which is left out.
    assert 0 < products <= of_both and (products < of_both or kind == "column_sum")


@pytest.mark.parametrize("kind", KINDS)
def test_few_rows_compile_without_spills(kind: str, tmp_path: Path) -> None:
    config = candidates(SPECS["plain"], 64, HALF, rows=1)[0]
    kernel = compiled("rows_kernel", SPECS["plain"], 64, HALF, kind, config, 90)
    assert stack_bytes(kernel.asm["cubin"], tmp_path) == 0
