"""Hopper kernels compiled for a GPU that need not be there: spills, shared memory, asynchronous products."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from fxopt.cache import import_source
from fxopt.codegen.attention.hopper import baton
from fxopt.codegen.attention.hopper.config import Config, read_config
from fxopt.codegen.attention.hopper.kernel import candidates, source
from fxopt.codegen.attention.hopper.tile import is_tile, stages, swizzle
from fxopt.codegen.attention.portable.config import padded
from fxopt.codegen.attention.problem import Problem
from fxopt.ir.attention import AttentionSpec, Capture
from fxopt.ir.expression import parse
from tests.codegen.test_compiled import stack_bytes

triton = pytest.importorskip("triton")

HALF = torch.bfloat16
SHARED = 232_448
POINTER = {torch.bool: "*i1", torch.int64: "*i64", torch.float32: "*fp32", HALF: "*bf16"}
SPECS = {
    "plain": AttentionSpec(parse("s * 0.125"), out_dtype=HALF),
    "causal": AttentionSpec(parse("s * 0.125"), parse("j <= i"), out_dtype=HALF, out_layout="bshd"),
    "softcap-window": AttentionSpec(
        parse("50.0 * tanh(s * 0.125 / 50.0)"), parse("(j <= i) & (j > i - 1024)"), out_dtype=HALF
    ),
    "prefix": AttentionSpec(parse("s * 0.125"), parse("(j <= i) | (j < 256)"), out_dtype=HALF),
    "padding": AttentionSpec(
        parse("s * 0.125"), parse("c0"), (Capture("b--j", torch.bool),), empty_rows="zero", out_dtype=HALF
    ),
    "padded-rows": AttentionSpec(
        parse("s * 0.125"), parse("c0 & c1"), (Capture("b--j", torch.bool), Capture("b-i-", torch.bool)),
        empty_rows="zero", out_dtype=HALF,
    ),
    "alibi": AttentionSpec(
        parse("s * 0.125 + c0 * float(j - i)"), parse("j <= i"), (Capture("-h--", torch.float32),), out_dtype=HALF
    ),
    "relative": AttentionSpec(
        parse("s * 0.125 + c0 * float(j - i)"), None, (Capture("-h--", torch.float32),), out_dtype=HALF
    ),
    "curved-window": AttentionSpec(
        parse("s * 0.125 + c0 * log(1.0 + abs(float(j - i)))"), parse("(j <= i) & (j > i - 1024)"),
        (Capture("-h--", torch.float32),), out_dtype=HALF,
    ),
    "additive": AttentionSpec(parse("s * 0.125 + c0"), None, (Capture("b--j", HALF),), out_dtype=HALF),
    "band": AttentionSpec(parse("s * 0.125 + c0"), None, (Capture("-h-d", HALF),), out_dtype=HALF),
    "causal-band": AttentionSpec(parse("s * 0.125 + c0"), parse("j <= i"), (Capture("bh-d", HALF),), out_dtype=HALF),
    "tile": AttentionSpec(parse("s * 0.125 + c0"), None, (Capture("-hij", HALF),), out_dtype=HALF),
    "causal-tile": AttentionSpec(parse("s * 0.125 + c0"), parse("j <= i"), (Capture("bhij", HALF),), out_dtype=HALF),
    "unscaled-tile": AttentionSpec(parse("s + c0"), None, (Capture("--ij", HALF),), out_dtype=HALF),
    "softcap-tile": AttentionSpec(
        parse("20.0 * tanh((s * 0.125 + c0) / 20.0)"), parse("(j <= i) & c1"),
        (Capture("-hij", HALF), Capture("b--j", torch.bool)), empty_rows="zero", out_dtype=HALF,
    ),
    "scaled-tile": AttentionSpec(parse("s * 0.17 + c0"), None, (Capture("b-ij", HALF),), out_dtype=HALF),
    "documents": AttentionSpec(
        parse("s * 0.125"), parse("(j <= i) & (c0 == c1)"),
        (Capture("b-i-", torch.int64), Capture("b--j", torch.int64)), empty_rows="zero", out_dtype=HALF,
    ),
}  # fmt: skip
CASES = [
    ("plain", 96), ("plain", 128), ("plain", 256), ("causal", 80), ("causal", 128), ("softcap-window", 128),
    ("padding", 128), ("alibi", 128), ("prefix", 128), ("plain", 16), ("plain", 32), ("causal", 48), ("plain", 64),
    ("causal", 64), ("softcap-window", 64), ("padding", 64), ("alibi", 64), ("prefix", 64), ("documents", 64),
    ("documents", 128), ("padding", 32), ("padded-rows", 64), ("padded-rows", 128), ("relative", 64), ("additive", 64),
    ("relative", 128), ("curved-window", 64), ("curved-window", 128),
    ("band", 48), ("band", 64), ("band", 128), ("causal-band", 64), ("causal-band", 128),
    ("tile", 16), ("tile", 32), ("tile", 64), ("tile", 128), ("causal-tile", 64), ("causal-tile", 128),
    ("unscaled-tile", 64), ("unscaled-tile", 128), ("softcap-tile", 64), ("softcap-tile", 32),
    ("scaled-tile", 32), ("scaled-tile", 64), ("scaled-tile", 80),
]  # fmt: skip


def problem(spec: AttentionSpec, width: int, **sizes: Any) -> Problem:
    return dataclasses.replace(Problem(spec, width, width, HALF, (9, 0)), **sizes)


def descriptor(rows: int, width: int) -> str:
    from triton.experimental.gluon import language as gl

    block = [1, 1, rows, width]
    return f"tensordesc<bf16{block},{gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)!r}>"


def tile_descriptor(config: Config) -> str:
    from triton.experimental.gluon import language as gl

    layout = gl.NVMMASharedLayout(swizzle_byte_width=swizzle(config), element_bitwidth=16, rank=4)
    return f"tensordesc<bf16{[1, 1, 64, config.keys]},{layout!r}>"


def compiled(spec: AttentionSpec, width: int, config: Config) -> Any:
    """The kernel as Triton would specialise it for aligned, contiguous operands."""
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    text = source(spec, width, width, HALF, str(config))
    kernel = import_source("attention_triton", text).attention_kernel
    sizes = {"ROWS": config.rows, "BLOCK_N": config.keys, "WIDTH": padded(width), "STAGES": config.stages}
    sizes |= {"QUERIES": config.queries, "GROUPS": config.groups, "REGISTERS": config.registers, "WITH_LSE": True}
    sizes["AHEAD"] = config.ahead or 0
    sizes["HULL"] = True
    if any(map(is_tile, spec.captures)):
        sizes["TILE_STAGES"] = stages(config, padded(width))
    rows = {"q_source": 64, "out_target": 64, "k_source": config.keys, "v_source": config.keys}
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    aligned: dict[tuple[int], Any] = {}
    for position, name in enumerate(kernel.arg_names):
        innermost = re.fullmatch(r"c\d_stride_[jd]", name) is not None
        if innermost:
            signature[name] = "constexpr"
            constants[position,] = 1
        elif name in rows:
            signature[name] = descriptor(rows[name], padded(width))
        elif name.endswith("_source"):
            signature[name] = tile_descriptor(config)
        elif name in sizes:
            signature[name] = "constexpr"
            constants[position,] = sizes[name]
        else:
            signature[name] = _type(name, spec)
        if name.endswith("_ptr") or ("_stride_" in name and not innermost):
            aligned[position,] = [["tt.divisibility", 16]]
    text = GluonASTSource(kernel, signature, constants, aligned)
    return triton.compile(text, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


def _type(name: str, spec: AttentionSpec) -> str:
    if not name.endswith("_ptr"):
        return "i32"
    known = {"lse_ptr": "*fp32", **dict.fromkeys(("hull_ptr", "hull_lists_ptr", "key_lists_ptr"), "*i32")}
    if name in known:
        return known[name]
    return POINTER[spec.captures[int(name[1])].dtype]


def disassembled(cubin: bytes, folder: Path) -> str:
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return subprocess.run([tool, "-c", path], capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize(("name", "width"), CASES)
def test_candidates_neither_spill_nor_wait_for_each_product(name: str, width: int, tmp_path: Path) -> None:
    spec = SPECS[name]
    for config in map(read_config, candidates(problem(spec, width))):
        kernel = compiled(spec, width, config)
        assert kernel.metadata.shared <= SHARED
        assert stack_bytes(kernel.asm["cubin"], tmp_path) == 0, config
        text = disassembled(kernel.asm["cubin"], tmp_path)
        # Where the assembler gives up overlapping products it waits after every one of them.
        waits, products = len(re.findall(r"DEPBAR\.LE gsb", text)), len(re.findall("HGMMA", text))
        assert products >= 2 * waits, (config, waits, products)
        assert "UTMALDG" in text and "UTMASTG" in text
        assert "setmaxnreg" in kernel.asm["ptx"]


HOLES = {
    "sinks": AttentionSpec(parse("s * 0.125"), parse("(j <= i) & ((j < 4) | ((i - j) < 512))"), out_dtype=HALF),
    "longformer": AttentionSpec(
        parse("s * 0.125"), parse("((abs(i - j) <= 256) | (j < 64)) | (i < 64)"), out_dtype=HALF
    ),
    "alibi-sinks": AttentionSpec(
        parse("s * 0.125 + c0 * float(j - i)"), parse("(j <= i) & ((j < 4) | ((i - j) < 512))"),
        (Capture("-h--", torch.float32),), out_dtype=HALF,
    ),
}  # fmt: skip


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("name", HOLES)
def test_streams_through_lists_do_not_spill(name: str, width: int, tmp_path: Path) -> None:
    sizes = {"batch": 4, "heads": 16, "rows": 8192, "keys": 8192}
    found = [read_config(config) for config in candidates(problem(HOLES[name], width, **sizes))]
    assert [config.listed for config in found] == [True, True, False]
    for config in found[:2]:
        kernel = compiled(HOLES[name], width, config)
        assert kernel.metadata.shared <= SHARED
        assert stack_bytes(kernel.asm["cubin"], tmp_path) == 0, config


@pytest.mark.parametrize("mask", ["(j <= i) & (j > i - 1024)", "(j <= i) | (j < 256)", "s > 0.0", "c0 == c1"])
def test_masks_of_one_interval_or_of_vectors_have_no_lists(mask: str) -> None:
    captures = (Capture("b-i-", torch.int64), Capture("b--j", torch.int64)) if "c0" in mask else ()
    spec = AttentionSpec(parse("s * 0.125"), parse(mask), captures, out_dtype=HALF)
    found = candidates(problem(spec, 64, batch=4, heads=16, rows=8192, keys=8192))
    assert found and not any(read_config(config).listed for config in found)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize("width", [64, 128])
def test_a_stream_computes_its_softmax_beside_products(width: int, tmp_path: Path) -> None:
    """Exponentials of wide heads stand before the wait for the group's own products; those of narrow ones behind it,
    where no weights are moved. Nothing repacks weights."""
    config = read_config(candidates(problem(SPECS["plain"], width))[0])
    assert config.ahead is not None
    text = disassembled(compiled(SPECS["plain"], width, config).asm["cubin"], tmp_path)
    loops = [loop for loop in steady_loops(text) if sum("HGMMA" in line for line in loop) >= 8]
    assert len(loops) >= config.groups
    for loop in loops:
        last = max(n for n, line in enumerate(loop) if "DEPBAR.LE gsb0, 0x0" in line)
        exponentials = [n for n, line in enumerate(loop) if "MUFU.EX2" in line]
        before = sum(n < last for n in exponentials)
        assert before > 0.9 * len(exponentials) if width > 64 else before == 0
        assert width > 64 or sum(" MOV " in line for line in loop) < 8
        assert not any("PRMT" in line or "LDL" in line or "LDS" in line for line in loop)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize("name", ["padding", "padded-rows"])
def test_padded_streams_move_no_weights_to_their_products(name: str, tmp_path: Path) -> None:
    """They take 32 registers, and moving them the time of seven percent of all other instructions of a block."""
    config = read_config("hopper:128x128s4q2a0")
    text = disassembled(compiled(SPECS[name], 64, config).asm["cubin"], tmp_path)
    loops = [loop for loop in steady_loops(text) if sum("HGMMA" in line for line in loop) >= 8]
    assert len(loops) >= config.groups
    for loop in loops:
        last = max(n for n, line in enumerate(loop) if "HGMMA" in line)
        assert sum(" MOV " in line or "IMAD.MOV" in line for line in loop[:last]) < 12


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize(("name", "config"), [
    ("plain", "hopper:192x128s3q2a0b"), ("causal", "hopper:192x128s3q2a0b"), ("causal", "hopper:128x128s4q2a0b"),
    ("relative", "hopper:192x128s3q2a0b"), ("tile", "hopper:192x128s3q2a0b"),
    ("padded-rows", "hopper:128x128s4q2a0b"),
])  # fmt: skip
def test_batons_have_barriers_of_their_own(name: str, config: str, tmp_path: Path) -> None:
    """The hardware has 16; which of them the compiler takes for itself is not documented."""
    cut = read_config(config)
    kernel = compiled(SPECS[name], 64, cut)
    assert stack_bytes(kernel.asm["cubin"], tmp_path) == 0
    text = disassembled(kernel.asm["cubin"], tmp_path)
    found = re.findall(r"\bBAR\.(\w+)\S* (\w+)(?:, (\w+))?", text)
    assert {kind for kind, *_ in found} == {"SYNC", "ARV"} and all(number.startswith("0x") for _, number, _ in found)
    ours = [(kind, int(number, 16)) for kind, number, threads in found if threads == "0x100"]
    others = {int(number, 16) for _, number, threads in found if threads != "0x100"}
    assert max(others) < baton.FIRST
    # Each group takes it in its loop and passes it on; the last one offers it, and the first keeps it.
    wanted = [(kind, baton.FIRST + group) for kind in ("ARV", "SYNC") for group in (0, *range(cut.groups))]
    assert sorted(ours) == sorted(wanted)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize("name", ["causal", "softcap-window", "prefix", "alibi"])
def test_masked_blocks_share_the_loop_of_full_ones(name: str, tmp_path: Path) -> None:
    """All of a kernel's code fits the instruction cache, 128 KiB, and each group has one loop."""
    text = disassembled(compiled(SPECS[name], 64, read_config("hopper:192x128s3q2a0")).asm["cubin"], tmp_path)
    assert len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", text, re.MULTILINE)) * 16 < 128 * 1024
    assert text.count("HGMMA") == 3 * 20


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize("width", [64, 128])
def test_bands_are_read_in_pairs(width: int) -> None:
    config = read_config(candidates(problem(SPECS["band"], width))[0])
    ptx = compiled(SPECS["band"], width, config).asm["ptx"]
    loads = re.findall(r"ld\.global\S*", ptx)
    assert loads and all(load.endswith("b32") for load in loads)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize(("name", "most"), [("unscaled-tile", 100), ("scaled-tile", 170)])
def test_tiles_cost_an_instruction_or_two_a_score(name: str, most: int, tmp_path: Path) -> None:
    """Beside plain attention, for 64 rows and 128 keys: eight reads, 64 conversions, and 64 additions if need be."""
    counts = []
    for spec, config in (("plain", "hopper:128x128s4q2a0"), (name, "hopper:128x128s3q2a0")):
        text = disassembled(compiled(SPECS[spec], 64, read_config(config)).asm["cubin"], tmp_path)
        loops = [loop for loop in steady_loops(text) if sum("HGMMA" in line for line in loop) >= 8]
        assert all(sum("LDSM" in line for line in loop) == 8 * (spec != "plain") for loop in loops)
        assert not re.search(r"\bLDG", text)
        counts.append(max(sum(";" in line for line in loop) for loop in loops))
    assert counts[1] - counts[0] <= most


def steady_loops(text: str) -> list[list[str]]:
    """The instructions of loops without loops inside."""
    labels: dict[str, int] = {}
    lines: list[str] = []
    found = []
    for line in text.splitlines():
        label = re.fullmatch(r"(\.L_x_\d+):", line.strip())
        if label:
            labels[label[1]] = len(lines)
        lines.append(line)
        back = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
        if back and back[1] in labels:
            found.append((labels[back[1]], len(lines)))
    inner = [(a, b) for a, b in found if not any((c, d) != (a, b) and a <= c and d <= b for c, d in found)]
    return [lines[a:b] for a, b in inner]
