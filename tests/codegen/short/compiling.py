"""Kernels for few keys, compiled for GPUs that need not be there."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fxopt.cache import import_source
from fxopt.codegen.attention.portable.config import padded
from fxopt.codegen.attention.portable.kernel import KIND
from fxopt.codegen.attention.short.config import Config
from fxopt.codegen.attention.short.kernel import source
from fxopt.codegen.attention.weights.wants import Want
from fxopt.ir.attention import AttentionSpec

_POINTER = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.bool: "*i1"}
_INNERMOST = ("q_stride_d", "k_stride_d", "v_stride_e")


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel: what the assembler says it takes, and its texts."""

    registers: int
    stack: int
    local: int
    shared: int
    asm: Any


def compiled(
    spec: AttentionSpec,
    width: int,
    dtype: torch.dtype,
    config: Config,
    architecture: int,
    keys: int,
    folder: Path,
    *,
    wants: tuple[Want, ...] = (),
) -> Compiled:
    """The kernel as Triton would specialise it for aligned operands and ``keys`` keys; captures have odd strides."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = import_source(KIND, source(spec, width, width, dtype, str(config), wants=wants)).attention_kernel
    full = sum(keys >= start + size for start, size in zip(config.starts, config.pieces, strict=True))
    constants: dict[str, Any] = {
        "BLOCK_M": config.rows,
        "BLOCK_D": padded(width),
        "BLOCK_E": padded(width),
        "FULL": full,
    }
    constants |= {"PRECISION": "ieee", "FAST_TANH": dtype is not torch.float32, "WITH_LSE": True, "WIDE": False}
    constants |= dict.fromkeys((*_INNERMOST, *(f"c{n}_stride_j" for n in range(len(spec.captures)))), 1)
    signature: dict[str, str] = {}
    values: dict[tuple[int], Any] = {}
    aligned: dict[tuple[int], Any] = {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            values[position,] = constants[name]
            continue
        signature[name] = _type(name, spec, dtype) if not name.startswith("want_") else _wanted(name, wants)
        if name.endswith("_ptr") or ("_stride_" in name and name[0] != "c"):
            aligned[position,] = [["tt.divisibility", 16]]
    options = {"num_warps": config.warps, "num_stages": config.stages, "maxnreg": config.registers or None}
    text = ASTSource(kernel, signature, values, aligned)
    built = triton.compile(text, target=GPUTarget("cuda", architecture, 32), options=options)
    return _usage(built, folder, Path(triton.__file__).parent)


def _usage(built: Any, folder: Path, package: Path) -> Compiled:
    path = folder / "kernel.cubin"
    path.write_bytes(built.asm["cubin"])
    tool = package / "backends" / "nvidia" / "bin" / "cuobjdump"
    run = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", run.stdout + run.stderr)
    assert found is not None, run.stdout + run.stderr
    registers, stack, local = map(int, found.groups())
    return Compiled(registers, stack, local, built.metadata.shared, built.asm)


def _wanted(name: str, wants: tuple[Want, ...]) -> str:
    want = wants[int(name.removeprefix("want_").removesuffix("_ptr"))]
    return _POINTER[torch.float32 if want.kind == "column_sum" else want.dtype]


def _type(name: str, spec: AttentionSpec, dtype: torch.dtype) -> str:
    if not name.endswith("_ptr"):
        return "i32"
    if name == "lse_ptr":
        return "*fp32"
    return _POINTER[spec.captures[int(name[1])].dtype if name[0] == "c" else dtype]
