"""Kernels of whole pairs on Hopper: configurations, refusals, and, compiled offline, spills, memory and products."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fxopt.cache import import_source
from fxopt.codegen.attention.pairs.config import Config, read_config
from fxopt.codegen.attention.pairs.kernel import candidates, source
from fxopt.codegen.attention.pairs.tile import tile_stages
from fxopt.codegen.attention.portable.config import padded
from fxopt.codegen.attention.problem import Problem
from fxopt.ir.attention import AttentionSpec, Capture
from fxopt.ir.expression import parse
from tests.codegen.test_compiled import stack_bytes
from tests.codegen.test_hopper import POINTER, descriptor, disassembled

triton = pytest.importorskip("triton")
HALF = torch.bfloat16
SHARED = 232_448
SPECS = {
    "plain": AttentionSpec(parse("s * 0.125"), out_dtype=HALF),
    "causal": AttentionSpec(parse("s * 0.125"), parse("j <= i"), out_dtype=HALF, out_layout="bshd"),
    "padding": AttentionSpec(
        parse("s * 0.125"), parse("c0"), (Capture("b--j", torch.bool),), empty_rows="uniform", out_dtype=HALF
    ),
    "tile": AttentionSpec(parse("s * 0.125 + c0"), None, (Capture("-hij", HALF),), out_dtype=HALF),
    "causal-tile": AttentionSpec(
        parse("s * 0.125 + c0"), parse("j <= i"), (Capture("bhij", HALF),), empty_rows="zero", out_dtype=HALF
    ),
    "alibi": AttentionSpec(
        parse("s * 0.125 + c0 * float(j - i)"), parse("j <= i"), (Capture("-h--", torch.float32),), out_dtype=HALF
    ),
}
KEYS = (64, 128, 197, 256)


def problem(name: str, width: int = 64, keys: int = 197, **sizes: Any) -> Problem:
    return Problem(
        SPECS[name], width, width, HALF, (9, 0), **({"batch": 64, "heads": 32, "rows": keys} | sizes), keys=keys
    )


def compiled(spec: AttentionSpec, width: int, config: Config, keys: int) -> Any:
    """The kernel as Triton would specialise it for aligned, contiguous operands."""
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    kernel = import_source("attention_triton", source(spec, width, width, HALF, str(config))).attention_kernel
    size = padded(width)
    full = sum(keys >= start + piece for start, piece in zip(config.starts, config.pieces, strict=True))
    values = {"ROWS": config.rows, "PARTS": config.keys // config.part, "PART": config.part, "STAGES": config.stages}
    values |= {"QUERIES": config.queries, "GROUPS": config.groups, "REGISTERS": config.registers, "WIDTH": size}
    values |= {"AHEAD": config.ahead, "FULL": full, "WITH_LSE": True, "TILE_STAGES": tile_stages(config, size)}
    blocks = {"q_source": (64, size), "out_target": (64, size)}
    blocks |= dict.fromkeys(("k_source", "v_source"), (config.part, size))
    blocks |= {f"c0_source_{n}": (64, piece) for n, piece in enumerate(config.pieces)}
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    for position, name in enumerate(kernel.arg_names):
        if name in values or re.fullmatch(r"c\d_stride_j", name):
            signature[name], constants[position,] = "constexpr", values.get(name, 1)
        elif name in blocks:
            signature[name] = descriptor(*blocks[name])
        else:
            signature[name] = _type(name, spec)
    text = GluonASTSource(kernel, signature, constants)
    return triton.compile(text, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


def _type(name: str, spec: AttentionSpec) -> str:
    if not name.endswith("_ptr"):
        return "i32"
    return "*fp32" if name == "lse_ptr" else POINTER[spec.captures[int(name[1])].dtype]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("name", SPECS)
def test_candidates_neither_spill_nor_wait_for_each_product(name: str, keys: int, tmp_path: Path) -> None:
    keys = keys + keys % 8 % 5 if name == "causal-tile" else keys
    for config in map(read_config, candidates(problem(name, keys=keys))):
        kernel = compiled(SPECS[name], 64, config, keys)
        assert kernel.metadata.shared <= SHARED
        assert stack_bytes(kernel.asm["cubin"], tmp_path) == 0, config
        text = disassembled(kernel.asm["cubin"], tmp_path)
        # Where the assembler gives up overlapping products it waits after every one of them.
        waits, products = len(re.findall(r"DEPBAR\.LE gsb", text)), len(re.findall("HGMMA", text))
        assert products >= 3 * waits, (config, waits, products)
        assert "UTMALDG" in text and "UTMASTG" in text
        assert "setmaxnreg" in kernel.asm["ptx"]
