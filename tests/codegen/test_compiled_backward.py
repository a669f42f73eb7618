"""Generated backward kernels compiled for GPUs that need not be there: spills, shared memory, instructions."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fxopt.cache import import_source
from fxopt.codegen.attention.backward.config import BackwardConfig, band_config, table_config
from fxopt.codegen.attention.backward.kernel import KIND, candidates, source
from fxopt.codegen.attention.portable.config import Config, padded
from fxopt.codegen.attention.problem import Problem
from fxopt.ir.attention import AttentionSpec, Capture
from fxopt.ir.expression import parse
from tests.codegen.test_compiled import POINTER, SHARED, SINGLE, SPECS, stack_bytes

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

HALF = torch.bfloat16
CASES = {
    "plain": SPECS["plain"],
    "causal": SPECS["causal"],
    "softcap": AttentionSpec(parse("50.0 * tanh(s * 0.125 / 50.0)"), parse("j <= i"), out_dtype=HALF),
    "bias": SPECS["tile-bias"],
    "band": AttentionSpec(parse("s * 0.125 + c0"), parse("j <= i"), (Capture("-h-d", HALF),), out_dtype=HALF),
    "mean": dataclasses.replace(SPECS["causal"], empty_rows="uniform"),
    "alibi": AttentionSpec(
        parse("s * 0.125 + c0 * float(j - i)"), parse("j <= i"), (Capture("-h--", torch.float32),), out_dtype=HALF
    ),
}
_SINGLE = ("lse", "dlse", "delta", "shift", "count", "spoilt", "shares")
_INNERMOST = re.compile(r"(q|k|v|out|dout)_stride_[de]|c0_stride_j")


def compiled(
    kernel: str,
    spec: AttentionSpec,
    width: int,
    config: BackwardConfig,
    architecture: int,
    dtype: torch.dtype = HALF,
    **changes: Any,
) -> Any:
    """One kernel as Triton would specialise it for aligned, contiguous operands."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    wanted = [c.kind == "float" for c in spec.captures]
    function = getattr(import_source(KIND, source(spec, width, width, dtype, config, wanted)), f"{kernel}_kernel")
    blocks = _blocks(kernel, spec, config)
    constants: dict[str, Any] = {
        "BLOCK_M": blocks.block_m,
        "BLOCK_N": blocks.block_n,
        "BLOCK_D": padded(width),
        "GROUP": 1,
    }
    constants |= {"BLOCK_E": padded(width), "PRECISION": "ieee", "FAST_TANH": dtype is not torch.float32}
    constants |= {"EVEN": True, "WIDE": False, "WITH_DLSE": False, **changes}
    signature: dict[str, str] = {}
    values: dict[tuple[int], Any] = {}
    aligned: dict[tuple[int], Any] = {}
    for position, name in enumerate(function.arg_names):
        if name.isupper() or _INNERMOST.fullmatch(name):
            signature[name] = "constexpr"
            values[position,] = constants.get(name, 1)
            continue
        signature[name] = _type(name, spec, dtype)
        if name.endswith("_ptr") or "_stride_" in name:
            aligned[position,] = [["tt.divisibility", 16]]
    options = {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages, "maxnreg": blocks.registers or None}
    text = ASTSource(function, signature, values, aligned)
    return triton.compile(text, target=GPUTarget("cuda", architecture, 32), options=options)


def _blocks(kernel: str, spec: AttentionSpec, config: BackwardConfig) -> Config:
    if kernel == "prepare":
        return dataclasses.replace(config.rows, num_stages=1)
    if kernel[0] == "c":
        return band_config(config) if spec.captures[int(kernel[1])].is_band else table_config(config)
    return config.keys if kernel == "dkdv" else config.rows


def _type(name: str, spec: AttentionSpec, dtype: torch.dtype) -> str:
    if not name.endswith("_ptr"):
        return "i32"
    if name == "seed_ptr":
        return SINGLE[name]
    if name.endswith("_lists_ptr"):
        return "*i32"
    if name.removesuffix("_ptr") in _SINGLE or name.endswith("_grad_ptr"):
        return "*fp32"
    return POINTER[spec.captures[int(name[1])].dtype if name[0] == "c" else dtype]


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("name", ["plain", "causal", "softcap", "bias", "band", "mean"])
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_first_candidate_compiles_without_spills(architecture: int, name: str, width: int, tmp_path: Path) -> None:
    spec = CASES[name]
    config = candidates(Problem(spec, width, width, HALF, (architecture // 10, 0)))[0]
    for kernel in ("dkdv", "dq", *(("c0",) if spec.captures else ())):
        found = compiled(kernel, spec, width, config, architecture)
        assert found.metadata.shared <= SHARED[architecture], kernel
        assert stack_bytes(found.asm["cubin"], tmp_path) == 0, kernel
        assert ("wgmma.mma_async" in found.asm["ptx"]) == (architecture == 90)
        assert ("tcgen05.mma" in found.asm["ptx"]) == (architecture == 100)
        assert not re.search(r"\b(atom|red)\.", found.asm["ptx"]), f"{kernel} adds across programs"


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("architecture", [80, 90])
def test_lists_of_blocks_spill_next_to_nothing(architecture: int, width: int, tmp_path: Path) -> None:
    spec = SPECS["longformer"]
    config = candidates(Problem(spec, width, width, HALF, (architecture // 10, 0), rows=8192, keys=8192))[0]
    assert config.listed
    for kernel in ("dkdv", "dq"):
        found = compiled(kernel, spec, width, config, architecture)
        assert found.metadata.shared <= SHARED[architecture], kernel
        # Without lists, and with the mask in every block, it is 208 bytes for wide heads on sm_90.
        spills = 16 if (architecture, width, kernel) == (90, 128, "dkdv") else 0
        assert stack_bytes(found.asm["cubin"], tmp_path) <= spills, kernel
        assert not re.search(r"\b(atom|red)\.", found.asm["ptx"]), f"{kernel} adds across programs"


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("name", ["plain", "softcap", "bias", "band"])
@pytest.mark.parametrize("architecture", [80, 90])
def test_dropout_does_not_spill_nor_on_hopper_exchange_anything(
    architecture: int, name: str, width: int, tmp_path: Path
) -> None:
    """There every thread finds the random words of its weights by itself, also where keys run down and rows across."""
    spec = dataclasses.replace(CASES[name], dropout=0.1)
    config = candidates(Problem(spec, width, width, HALF, (architecture // 10, 0)))[0]
    for kernel in ("dkdv", "dq", *(("c0",) if spec.captures else ())):
        found, without = (compiled(kernel, s, width, config, architecture) for s in (spec, CASES[name]))
        assert found.metadata.shared <= SHARED[architecture], kernel
        assert stack_bytes(found.asm["cubin"], tmp_path) == 0, kernel
        exchanges = [x.asm["ttgir"].count("convert_layout") for x in (found, without)]
        assert architecture != 90 or exchanges[0] == exchanges[1], kernel


@pytest.mark.parametrize("name", ["bias", "band"])
@pytest.mark.parametrize("kernel", ["prepare", "dkdv", "dq", "c0"])
def test_offsets_of_huge_strides_take_64_bits(kernel: str, name: str) -> None:
    """With a tail, heads that share keys, a gradient of the log-sum-exp: none of it keeps 32-bit offsets in a block."""
    spec = CASES[name]
    config = candidates(Problem(spec, 64, 64, HALF, (9, 0)))[0]
    changes: dict[str, Any] = {"WIDE": True, "EVEN": False, "GROUP": 4, "WITH_DLSE": True}
    text = compiled(kernel, spec, 64, config, 90, **changes).asm["ttir"]
    products = [line for line in text.splitlines() if "arith.muli" in line]
    assert not [line for line in products if "xi32>" in line]
    assert [line for line in products if "xi64>" in line]


@pytest.mark.parametrize("name", ["causal", "band"])
def test_float32_does_not_spill(name: str, tmp_path: Path) -> None:
    captures = tuple(dataclasses.replace(c, dtype=torch.float32) for c in CASES[name].captures)
    spec = dataclasses.replace(CASES[name], captures=captures, out_dtype=torch.float32)
    config = candidates(Problem(spec, 64, 64, torch.float32, (9, 0)))[0]
    for kernel in ("dkdv", "dq", *(("c0",) if captures else ())):
        assert stack_bytes(compiled(kernel, spec, 64, config, 90, torch.float32).asm["cubin"], tmp_path) == 0, kernel
