"""Hopper kernels compiled for a GPU that need not be there: spills, shared memory, asynchronous products; refusals."""

from __future__ import annotations

import ast
import dataclasses
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from fxopt.cache import import_source
from fxopt.codegen.attention import kernels
from fxopt.codegen.attention.hopper.config import Config, read_config
from fxopt.codegen.attention.hopper.kernel import candidates, objection, source
from fxopt.codegen.attention.hopper.tile import beneath, is_tile, stages, swizzle
from fxopt.codegen.attention.portable.config import padded
from fxopt.codegen.attention.problem import Problem
from fxopt.errors import LoweringError
from fxopt.ir.attention import AttentionSpec, Capture
from fxopt.ir.expression import parse
from tests.codegen.cases import EXPRESSIONS, SHAPES, specification
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
    if name in ("lse_ptr", "hull_ptr"):
        return {"lse_ptr": "*fp32", "hull_ptr": "*i32"}[name]
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


def test_tiles_that_streams_do_not_read_are_refused() -> None:
    def refusal(captures: tuple[Capture, ...], width: int = 64, **sizes: Any) -> str:
        score = " + ".join(("s", *(f"c{n}" for n in range(len(captures)))))
        return str(objection(problem(AttentionSpec(parse(score), None, captures, out_dtype=HALF), width, **sizes)))

    tile = Capture("bhij", HALF)
    assert refusal((tile,)) == "None" and refusal((tile, Capture("b--j", HALF), Capture("-h-d", HALF))) == "None"
    assert "more than one" in refusal((tile, tile))
    assert "periodic" in refusal((Capture("p-ij", HALF),))
    assert "must be bf16" in refusal((Capture("bhij", torch.float32),))
    assert "must be bf16" in refusal((Capture("bhij", torch.float16),))
    assert "up to 128" in refusal((tile,), 256)
    assert "vectors limit" in str(objection(problem(SPECS["softcap-tile"], 128)))
    assert "multiple of 8 keys, not 197" in refusal((tile,), keys=197)
    assert refusal((tile,), keys=200) == "None"
    masked = AttentionSpec(parse("s"), parse("c0"), (Capture("b-ij", torch.bool),), out_dtype=HALF)
    assert "must be bf16" in str(objection(problem(masked, 64)))
    for config in ("hopper:128x64s4q2", "hopper:128x64s4q3a1", "hopper:192x128s4q2a0"):
        with pytest.raises(LoweringError):
            source(SPECS["tile"], 64, 64, HALF, config)


@pytest.mark.parametrize(("score", "mask", "dtype", "factor"), [
    ("s * 0.125 + c0", None, HALF, 0.125),
    ("c0 + s / 8.0", None, HALF, 0.125),
    ("s + c0", "j <= i", torch.float16, 1.0),
    ("20.0 * tanh((s * 0.25 + c0) / 20.0) + c1", None, HALF, 0.25),
    ("s * 0.125 + c0", None, torch.float16, None),
    ("s * 0.17 + c0", None, HALF, None),
    ("s * -0.125 + c0", None, HALF, None),
    ("s * 0.125 - c0", None, HALF, None),
    ("s * c1 + c0", None, HALF, None),
    ("s * 0.125 + c0 * c1", None, HALF, None),
    ("(s * 0.125 + c1) + c0", None, HALF, None),
    ("(s * 0.125 + c0) * s", None, HALF, None),
    ("(s * 0.125 + c0) + c0", None, HALF, None),
    ("s * 0.125 + c0", "c0 > -10.0", HALF, None),
    ("s * 0.125 + c1", "c0 > -10.0", HALF, None),
])  # fmt: skip
def test_products_are_added_to_a_tile_where_nothing_else_is_read_of_both(
    score: str, mask: str | None, dtype: torch.dtype, factor: float | None
) -> None:
    captures = (Capture("bhij", dtype), Capture("-h--", torch.float32))
    spec = AttentionSpec(parse(score), None if mask is None else parse(mask), captures, out_dtype=dtype)
    found = beneath(spec, dtype)
    assert (None if found is None else found[1]) == factor
    text = source(spec, 64, 64, dtype, "hopper:128x128s3q2a0")
    assert ("zero, use_acc=False" in text) == (factor is None)
    assert ("scale(q_tiles" in text) == (factor not in (None, 1.0))


def test_tiles_of_the_same_values_follow_each_other() -> None:
    group = {"-hij": "batch", "b-ij": "heads", "bhij": "1"}
    for dims, wanted in group.items():
        spec = AttentionSpec(parse("s + c0"), None, (Capture(dims, HALF),), out_dtype=HALF)
        text = source(spec, 64, 64, HALF, "hopper:128x128s3q2a0")
        assert f"group = {wanted}\n" in text
        assert ("within % size * (pairs // group)" in text) == (dims == "-hij")


def test_bands_that_streams_do_not_read_are_refused() -> None:
    single = AttentionSpec(parse("s + c0"), None, (Capture("-h-d", torch.float32),), out_dtype=HALF)
    assert "half precision" in str(objection(problem(single, 64)))
    assert "up to 128" in str(objection(problem(SPECS["band"], 256)))
    assert all("a0" in config for config in candidates(problem(SPECS["band"], 128)))
    with pytest.raises(LoweringError, match="reads no bands"):
        source(SPECS["band"], 128, 128, HALF, "hopper:128x64s4q2")


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


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_source_is_deterministic_valid_python_or_refused_with_a_reason(name: str) -> None:
    spec = specification(name, SHAPES["packed"], HALF)
    asked = problem(spec, 80)
    reason = objection(asked)
    if reason is not None:
        assert "row and key" in reason
        with pytest.raises(LoweringError, match="row and key"):
            source(spec, 80, 80, HALF, "hopper:128x128s2q2")
        return
    config = candidates(asked)[0]
    text = source(spec, 80, 80, HALF, config)
    assert text == source(specification(name, SHAPES["packed"], HALF), 80, 80, HALF, config)
    assert str(spec.score) in (ast.get_docstring(ast.parse(text)) or "")
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize(("score", "logits", "aside"), [
    ("s * 0.125", "x = s", ""),
    ("s * 0.125 + c0 * float(j - i)", "x = along(s, (c0) * 8.0, BLOCK_N)", "c0 * (start - i)"),
    ("s * 0.125 - c0 * float(i - j)", "x = along(s, (-(-c0)) * 8.0, BLOCK_N)", "c0 * ((0 - start) + i)"),
    ("(s + c0 * float(j - i)) + c0 * c0 * float(j + i)", "x = along(s, c0 + ((c0 * c0)), BLOCK_N)", "(start + i)"),
    ("tanh(s + c0 * float(j - i)) + c0 * float(j)", "whole(c0 * (first - start)", "c0 * start"),
    ("s * 0.125 + c1", "x = s * 0.125", "of_rows(c1, "),
    ("c1 + s * 0.125 + c0", "x = s * 0.125", "of_rows(c1 + c0, "),
    ("(s - c1) * c0", "x = (s - c1) * c0", ""),
    ("tanh(s + c1) + float(j)", "tanh((s + c1)", ""),
])  # fmt: skip
def test_what_all_logits_of_a_row_share_is_kept_aside(score: str, logits: str, aside: str) -> None:
    captures = (Capture("-h--", torch.float32), Capture("bhi-", torch.float32))
    text = source(AttentionSpec(parse(score), None, captures, out_dtype=HALF), 64, 64, HALF, "hopper:128x128s4q2a0")
    body = text[text.index("def attend(") : text.index("def weigh(")]
    assert logits in body
    assert ("aside = " in body) == ("shift - aside" in body) == bool(aside)
    assert aside in body


def test_objections_say_why() -> None:
    plain = SPECS["plain"]
    assert "9.0" in str(objection(problem(plain, 128, capability=(8, 0))))
    assert "rows and more" in str(objection(problem(plain, 128, rows=100)))
    assert "multiples of 8" in str(objection(problem(plain, 100)))
    assert "multiples of 8" in str(objection(problem(plain, 36)))
    assert objection(problem(plain, 64)) is None and objection(problem(plain, 24)) is None
    assert "pad alike" in str(objection(problem(plain, 128, value_dim=64)))
    assert "alike" in str(objection(problem(plain, 128, dtype=torch.float32)))
    wide = dataclasses.replace(plain, out_dtype=torch.float32)
    assert "alike" in str(objection(problem(wide, 128)))
    assert objection(problem(plain, 128)) is None


@pytest.mark.parametrize("text", ["hopper:128x128", "hopper:100x128s2q2", "hopper:128x32s2q2", "hopper:128x128s1q2",
                                  "hopper:128x128s2q1a0", "hopper:128x128s2q2a1"])  # fmt: skip
def test_bad_configurations_are_refused(text: str) -> None:
    with pytest.raises(LoweringError):
        read_config(text)


@pytest.mark.parametrize(
    ("name", "within"), [("padding", []), ("padded-rows", ["c1"]), ("documents", []), ("softcap-tile", [])]
)
def test_blocks_cut_by_padding_read_its_run_and_no_vector_of_keys(name: str, within: list[str]) -> None:
    """Vectors of rows tell which rows have none; those of keys are read where there is no run."""
    text = source(SPECS[name], 64, 64, HALF, "hopper:128x128s4q2a0")
    body = text[text.index("def attend(") : text.index("def weigh(")]
    always, run, read = re.split("if run_stop >= 0:|else:", body)
    loads = [re.findall(r"gl\.load\((c\d)_(?:ptr|block)", part) for part in (always, run, read)]
    vectors = [f"c{n}" for n, c in enumerate(SPECS[name].captures) if not is_tile(c)]
    assert loads == [[], within, vectors]


def test_rows_without_keys_are_filled_afterwards() -> None:
    averaging = dataclasses.replace(SPECS["padding"], empty_rows="uniform")
    assert any(text.startswith("hopper:") for text in kernels.candidates(problem(averaging, 128))[0])
    text = source(averaging, 128, 128, HALF, "hopper:128x64s3q2a0")
    assert "average_kernel[" in text and "WITH_LSE=True" in text
    assert "average_kernel" not in source(SPECS["padding"], 128, 128, HALF, "hopper:128x64s3q2a0")


def test_configurations_print_what_is_read() -> None:
    for text in ("hopper:192x128s3q2", "hopper:192x128s3q2a0", "hopper:128x64s4q3a1"):
        assert str(read_config(text)) == text
