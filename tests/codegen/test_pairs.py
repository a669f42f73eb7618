"""Kernels of whole pairs on Hopper: configurations, refusals, and, compiled offline, spills, memory and products."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fxopt.cache import import_source
from fxopt.codegen.attention.pairs.config import Config, read_config
from fxopt.codegen.attention.pairs.kernel import candidates, objection, source
from fxopt.codegen.attention.pairs.tile import tile_stages
from fxopt.codegen.attention.portable.config import padded
from fxopt.codegen.attention.problem import Problem
from fxopt.errors import LoweringError
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
CASES = [
    *(("plain", keys) for keys in (64, 128, 197, 256)), *(("tile", keys) for keys in (128, 197, 256)),
    ("causal", 197), ("padding", 197), ("padding", 256), ("causal-tile", 200), ("alibi", 128), ("alibi", 197),
]  # fmt: skip


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
    values = {
        "BLOCKS": config.blocks,
        "PARTS": config.keys // config.part,
        "PART": config.part,
        "STAGES": config.stages,
    }
    values |= {"QUERIES": config.queries, "GROUPS": config.groups, "REGISTERS": config.registers, "WIDTH": size}
    values |= {"FULL": full, "WITH_LSE": True, "TILE_STAGES": tile_stages(config, size)}
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
@pytest.mark.parametrize(("name", "keys"), CASES)
def test_candidates_neither_spill_nor_wait_for_each_product(name: str, keys: int, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("text", ["pairs:256x128+64+16g2s2q4", "pairs:192x16g3s1q3", "pairs:128x64g2s4q2"])
def test_configurations_print_and_read_back(text: str) -> None:
    assert str(read_config(text)) == text


def test_a_configuration_reads_as_written() -> None:
    config = read_config("pairs:256x128+64+16g2s3q4")
    assert config == Config(256, (128, 64, 16), 2, 3, 4)
    assert (config.keys, config.starts, config.part, config.blocks, config.registers) == (
        208,
        (0, 128, 192),
        16,
        4,
        240,
    )


@pytest.mark.parametrize(("text", "reason"), [
    ("pairs:256x128+64+16g2s2", "not a configuration of this kernel"),
    ("short:64x64w4p8", "not a configuration of this kernel"),
    ("pairs:256x128+48g2s2q4", "falling powers of two"),
    ("pairs:256x64+128g2s2q4", "falling powers of two"),
    ("pairs:256x64+32+16+16g2s2q4", "falling powers of two"),
    ("pairs:256x256+16g2s2q4", "256 keys at most"),
    ("pairs:96x64g2s2q4", "rows in 64s"),
    ("pairs:256x64g4s2q4", "two or three groups"),
    ("pairs:64x64g2s2q4", "a block of every turn"),
    ("pairs:128x64g3s2q3", "a block of every turn"),
    ("pairs:256x64g2s0q4", "stages from 1"),
    ("pairs:256x64g2s2q3", "a multiple of groups"),
    ("pairs:256x64g3s2q0", "a multiple of groups"),
])  # fmt: skip
def test_what_is_no_configuration(text: str, reason: str) -> None:
    with pytest.raises(LoweringError, match=reason):
        read_config(text)


@pytest.mark.parametrize(("change", "reason"), [
    ({"capability": (8, 0)}, "needs compute capability 9.0, not 8.0"),
    ({"capability": (10, 0)}, "needs compute capability 9.0"),
    ({"keys": None}, "not known"),
    ({"dynamic_keys": True}, "may change"),
    ({"rows": 64}, "more than 64 rows, and there are 64"),
    ({"keys": 257}, "256 keys at most, and here are 257"),
    ({"head_dim": 128, "value_dim": 128}, "multiples of 8 up to 64"),
    ({"head_dim": 36, "value_dim": 36}, "multiples of 8 up to 64"),
    ({"value_dim": 32}, "pad alike"),
    ({"dtype": torch.float32}, "bfloat16 or float16 alike"),
    ({"dtype": torch.float16}, "bfloat16 or float16 alike"),
])  # fmt: skip
def test_objections(change: dict[str, Any], reason: str) -> None:
    near_miss = dataclasses.replace(problem("plain"), **change)
    assert reason in str(objection(near_miss))
    assert objection(problem("plain")) is None


@pytest.mark.parametrize(("captures", "reason"), [
    ((Capture("-hij", HALF), Capture("b-ij", HALF)), "more than one"),
    ((Capture("p-ij", HALF),), "periodic"),
    ((Capture("-hij", torch.float32),), "must be bf16"),
    ((Capture("-hij", torch.float16),), "must be bf16"),
    ((Capture("bhij", HALF),), "multiple of 8 keys, not 197"),
    ((Capture("-h-d", HALF),), "distance of key and row"),
    ((Capture("--ij", HALF),), "None"),
    ((Capture("-hij", HALF), Capture("b--j", torch.float32)), "None"),
])  # fmt: skip
def test_what_is_captured_by_row_and_key(captures: tuple[Capture, ...], reason: str) -> None:
    score = " + ".join(("s", *(f"c{n}" for n in range(len(captures)))))
    spec = AttentionSpec(parse(score), None, captures, out_dtype=HALF)
    assert reason in str(objection(dataclasses.replace(problem("plain"), spec=spec)))
    if "8 keys" in reason:
        assert objection(dataclasses.replace(problem("plain"), spec=spec, keys=200)) is None


def test_scores_of_places_leave_registers_for_fewer_keys() -> None:
    assert objection(problem("alibi", keys=208)) is None
    assert "hold 208 keys" in str(objection(problem("alibi", keys=216)))
    assert objection(problem("padding", keys=256)) is None


def test_what_takes_too_much_shared_memory_is_refused() -> None:
    with pytest.raises(LoweringError, match="shared memory"):
        source(SPECS["tile"], 64, 64, HALF, "pairs:256x256g2s2q4")
    assert source(SPECS["plain"], 64, 64, HALF, "pairs:256x256g2s2q4")


def test_candidates_fit_for_every_number_of_keys_and_rows() -> None:
    for name in ("plain", "tile", "alibi"):
        for keys in range(8, 209 if name == "alibi" else 257, 8):
            for rows in (65, 128, 197, 1000):
                found = candidates(problem(name, keys=keys, rows=rows))
                assert 1 <= len(set(found)) == len(found) <= 2
                for text in found:
                    assert read_config(text).keys >= keys
                    source(SPECS[name], 64, 64, HALF, text)
