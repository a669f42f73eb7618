"""The Hopper backward without a GPU: spills, shared memory, asynchronous products, launches; refusals, fallbacks."""

from __future__ import annotations

import ast
import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fxopt.cache import import_source
from fxopt.codegen.attention.backward import families
from fxopt.codegen.attention.backward.hopper.config import Config, is_hopper, read_config
from fxopt.codegen.attention.backward.hopper.kernel import candidates, flow_objection, objection, source
from fxopt.codegen.attention.backward.kernel import KIND
from fxopt.codegen.attention.backward.kernel import candidates as portable_candidates
from fxopt.codegen.attention.backward.operator import attention_backward, chosen_config, module
from fxopt.codegen.attention.portable.config import padded
from fxopt.codegen.attention.problem import Problem
from fxopt.errors import LoweringError
from fxopt.ir.attention import AttentionSpec, Capture
from fxopt.ir.expression import parse
from fxopt.lowering.attention import _with_backward
from tests.codegen.cases import EXPRESSIONS, SHAPES, specification
from tests.codegen.offline import compiler
from tests.codegen.test_compiled import POINTER, stack_bytes
from tests.codegen.test_hopper import HOLES, SPECS, descriptor, disassembled, steady_loops

triton = pytest.importorskip("triton")

HALF = torch.bfloat16
SHARED = 232_448
VECTORS = ("shift_source", "count_source", "delta_source")
BY_KEY = ("k_source", "v_source", "dk_source", "dv_source")
compiles = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def compiled(spec: AttentionSpec, width: int, config: Config, even: bool = True, group: int = 1) -> Any:
    """The kernel of all products, for lengths that are ``even``, multiples of the blocks, or not."""
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    text = source(spec, width, width, HALF, str(config), [False] * len(spec.captures))
    kernel = import_source(KIND, text).gradient_kernel
    vector = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    parts = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)
    values = {"GROUP": group, "BLOCK_M": config.rows, "KEYS": config.keys, "WIDTH": padded(width)}
    values |= {"STAGES": config.stages, "WHOLE": even, "HULL": True}
    columns = padded(width) // (2 if config.rows == 64 else 1)
    types = {
        "hull_ptr": "*i32",
        "row_lists_ptr": "*i32",
        "sums_source": f"tensordesc<fp32[{2 * columns},32],{parts!r}>",
    }
    types |= {name: descriptor(config.rows, padded(width)) for name in ("q_source", "dout_source")}
    types |= {name: descriptor(config.keys, padded(width)) for name in BY_KEY}
    types |= dict.fromkeys(VECTORS, f"tensordesc<fp32[{config.rows}],{vector!r}>")
    types |= {f"c{n}_ptr": POINTER[c.dtype] for n, c in enumerate(spec.captures)}
    values = {name: value for name, value in values.items() if name in kernel.arg_names}
    signature = {n: "constexpr" if n in values else types.get(n, "i32") for n in kernel.arg_names}
    places = list(enumerate(kernel.arg_names))
    constants = {(place,): values[name] for place, name in places if name in values}
    text = GluonASTSource(kernel, signature, constants)
    return triton.compile(text, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


@compiles
@pytest.mark.parametrize(("name", "width"), [
    ("plain", 64), ("plain", 96), ("plain", 128), ("causal", 64), ("causal", 80), ("causal", 128), ("alibi", 64),
    ("alibi", 128), ("relative", 128), ("padding", 64), ("padding", 128), ("padded-rows", 64), ("padded-rows", 128),
    ("softcap-window", 64), ("softcap-window", 128), ("documents", 64), ("documents", 128), ("curved-window", 64),
    ("additive", 128),
])  # fmt: skip
@pytest.mark.parametrize("even", [True, False])
def test_first_candidate_neither_spills_nor_waits_for_each_product(
    name: str, width: int, even: bool, tmp_path: Path
) -> None:
    spec = SPECS[name]
    kernel = compiled(spec, width, candidates(Problem(spec, width, width, HALF, (9, 0)))[0], even)
    assert kernel.metadata.shared <= SHARED
    assert stack_bytes(kernel.asm["cubin"], tmp_path) == 0
    check_instructions(kernel, tmp_path)


@compiles
@pytest.mark.parametrize("name", ["plain", "causal", "alibi", "documents", "curved-window"])
def test_products_ahead_do_not_spill(name: str, tmp_path: Path) -> None:
    kernel = compiled(SPECS[name], 64, read_config("hopper:64x128s4a"))
    assert stack_bytes(kernel.asm["cubin"], tmp_path) == 0
    check_instructions(kernel, tmp_path)


@compiles
@pytest.mark.parametrize(("name", "width", "most"), [
    *((name, 64, 0) for name in HOLES), ("sinks", 128, 16), ("longformer", 128, 32), ("alibi-sinks", 128, 16),
])  # fmt: skip
@pytest.mark.parametrize("even", [True, False])
def test_lists_of_rows_spill_next_to_nothing(name: str, width: int, most: int, even: bool, tmp_path: Path) -> None:
    """Wide heads leave no register for a list; told which blocks are whole they would spill twice as much."""
    found = candidates(Problem(HOLES[name], width, width, HALF, (9, 0), rows=8192, keys=8192))
    assert [config.listed for config in found] == [True, False]
    kernel = compiled(HOLES[name], width, found[0], even)
    assert kernel.metadata.shared <= SHARED
    assert stack_bytes(kernel.asm["cubin"], tmp_path) <= most
    check_instructions(kernel, tmp_path)


def test_products_ahead_are_refused_where_they_would_spill() -> None:
    with pytest.raises(LoweringError, match="heads up to 64 wide"):
        source(SPECS["plain"], 128, 128, HALF, "hopper:64x128s2a", [])


#: The most instructions of a loop over blocks of rows: about as many as there are, so that none is added unseen.
MOST = {("causal", 128): 445, ("softcap-window", 128): 610, ("documents", 128): 570, ("padded-rows", 128): 485}


@compiles
@pytest.mark.parametrize(("name", "width"), MOST)
def test_masks_take_few_instructions_and_no_load_from_memory(name: str, width: int, tmp_path: Path) -> None:
    """Bounds that follow the rows are one comparison a weight; what is captured by row lies in shared memory."""
    kernel = compiled(SPECS[name], width, candidates(Problem(SPECS[name], width, width, HALF, (9, 0)))[0])
    text = disassembled(kernel.asm["cubin"], tmp_path)
    loops = [loop for loop in steady_loops(text) if sum("HGMMA" in line for line in loop) >= 8]
    assert len(loops) == 2
    for loop in loops:
        assert sum(";" in line for line in loop) <= MOST[name, width]
        assert not any(re.search(r"\bLD[GL]\b", line) for line in loop)


def check_instructions(kernel: Any, folder: Path) -> None:
    """Products overlap; loads, sums of dq and stores are by TMA."""
    text = disassembled(kernel.asm["cubin"], folder)
    waits, products = len(re.findall(r"DEPBAR\.LE gsb", text)), len(re.findall("HGMMA", text))
    assert products >= 5 * waits, (waits, products)
    assert "UTMALDG" in text and "setmaxnreg" in kernel.asm["ptx"]
    assert "UTMAREDG" in text and "UTMASTG" in text and not re.search(r"\b(RED|REDG|STG)\b", text)


@compiles
@pytest.mark.parametrize("config", ["hopper:64x128s2", "hopper:128x128s2"])
def test_a_launch_compiles_what_it_launches(config: str, tmp_path: Path) -> None:
    spec = AttentionSpec(parse("s * 0.125"), parse("j <= i"), out_dtype=HALF, out_layout="bshd")
    q, k = torch.zeros(2, 4, 200, 64, dtype=HALF), torch.zeros(2, 2, 200, 64, dtype=HALF)
    with compiler(tmp_path, launches=True) as kernels:
        found = attention_backward(q, k, k, [], q, torch.zeros(2, 4, 200), q, None, [], str(spec), config)
    assert [x.shape for x in found] == [q.shape, k.shape, k.shape]
    assert [x.stride() for x in found[:2]] == [x.transpose(1, 2).contiguous().transpose(1, 2).stride() for x in (q, k)]
    names = [kernel.name for kernel in kernels]
    assert names == ["prepare_kernel", "gradient_kernel", "finish_kernel"]


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_source_is_deterministic_valid_python_or_refused_with_a_reason(name: str) -> None:
    spec = specification(name, SHAPES["packed"], HALF)
    wanted = [False] * len(spec.captures)
    reason = objection(spec, 80, 80, HALF, (9, 0))
    if reason is not None:
        assert re.search("row and key|distance of key and row", reason)
        with pytest.raises(LoweringError, match="no Hopper kernels"):
            source(spec, 80, 80, HALF, "hopper:64x128s2", wanted)
        return
    text = source(spec, 80, 80, HALF, "hopper:64x128s2", wanted)
    again = specification(name, SHAPES["packed"], HALF)
    assert text == source(again, 80, 80, HALF, "hopper:64x128s2", wanted)
    assert str(spec.score) in (ast.get_docstring(ast.parse(text)) or "")
    assert max(map(len, text.splitlines())) <= 120


def test_objections_say_why() -> None:
    plain = SPECS["plain"]
    assert "9.0" in str(objection(plain, 128, 128, HALF, (8, 0)))
    assert "multiples of 8" in str(objection(plain, 100, 100, HALF, (9, 0)))
    assert "pad alike" in str(objection(plain, 128, 64, HALF, (9, 0)))
    assert "from 40 to 128" in str(objection(plain, 256, 256, HALF, (9, 0)))
    single = dataclasses.replace(plain, out_dtype=torch.float32)
    assert "alike" in str(objection(single, 128, 128, torch.float32, (9, 0)))
    dropping = dataclasses.replace(plain, dropout=0.1)
    assert "drops no weights" in str(objection(dropping, 128, 128, HALF, (9, 0)))
    assert objection(plain, 128, 128, HALF, (9, 0)) is None


@pytest.mark.parametrize(("score", "safe"), [
    ("log(s)", False), ("1.0 / s", False), ("s ** 0.5", False), ("sqrt(s)", False), ("s / 8.0", True),
    ("tanh(s)", True), ("s / c0", True),
])  # fmt: skip
def test_scores_that_may_be_infinite_beyond_the_last_row(score: str, safe: bool) -> None:
    spec = AttentionSpec(parse(score), None, (Capture("-h--", torch.float32),), out_dtype=HALF)
    reason = objection(spec, 64, 64, HALF, (9, 0))
    assert reason is None if safe else "infinite" in str(reason)


def test_rows_that_average_the_values_are_left_to_the_portable_kernels() -> None:
    spec = dataclasses.replace(SPECS["padding"], empty_rows="uniform")
    assert "mean of the values" in str(objection(spec, 64, 64, HALF, (9, 0)))
    found, refused = families.candidates(Problem(spec, 64, 64, HALF, (9, 0)))
    assert not any(map(is_hopper, found)) and "mean of the values" in refused["hopper"]


def test_gradients_of_captured_tensors_are_left_to_the_portable_kernels() -> None:
    spec = SPECS["alibi"]
    assert flow_objection(spec, [False]) is None
    assert "c0" in str(flow_objection(spec, [True]))
    found, refused = families.candidates(Problem(spec, 128, 128, HALF, (9, 0)), [True])
    assert found and not any(map(is_hopper, found)) and "c0" in refused["hopper"]
    found, refused = families.candidates(Problem(spec, 128, 128, HALF, (9, 0)), [False])
    assert is_hopper(found[0]) and not is_hopper(found[1]) and not refused
    found, refused = families.candidates(Problem(SPECS["plain"], 128, 128, HALF, (9, 0)))
    assert [is_hopper(config) for config in found] == [True, False, False] and not refused
    found, refused = families.candidates(Problem(spec, 128, 128, HALF, (9, 0)), [False])
    q = torch.zeros(1, 1, 4, 128, dtype=HALF)
    portable = str(portable_candidates(Problem(spec, 128, 128, HALF, (9, 0)))[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        assert chosen_config(spec, q, q, torch.zeros(1, 1, 4), found[0], [True]) == portable
        assert chosen_config(spec, q, q, torch.zeros(1, 1, 4), found[0], [False]) == found[0]


def test_deterministic_mode_is_honoured_when_chosen(deterministic: None) -> None:
    spec = SPECS["plain"]
    problem = Problem(spec, 128, 128, HALF, (9, 0))
    refused: dict[str, str] = {}
    assert not any("hopper" in config for config in _with_backward(problem, ("A",), refused))
    assert "any order" in refused["triton-hopper-backward"]


def test_deterministic_mode_is_honoured_when_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by a graph that was compiled before it was switched on."""
    spec, q = SPECS["plain"], torch.zeros(1, 1, 4, 128, dtype=HALF)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    before = chosen_config(spec, q, q, torch.zeros(1, 1, 4), "hopper:64x128s2")
    torch.use_deterministic_algorithms(True)
    try:
        after = chosen_config(spec, q, q, torch.zeros(1, 1, 4), "hopper:64x128s2")
    finally:
        torch.use_deterministic_algorithms(False)
    assert is_hopper(before) and not is_hopper(after)


@pytest.mark.parametrize(
    "text", ["hopper:64x128", "hopper:100x128s2", "hopper:64x64s2", "hopper:64x128s3", "hopper:64x128s2b", "64x128s2"]
)
def test_bad_configurations_are_refused(text: str) -> None:
    with pytest.raises(LoweringError):
        read_config(text)


def test_configurations_print_what_is_read() -> None:
    assert str(read_config("hopper:128x128s2")) == "hopper:128x128s2"
    assert str(read_config("hopper:64x128s4a")) == "hopper:64x128s4a"


def test_what_descriptors_can_read() -> None:
    found = module(str(SPECS["plain"]), 64, 64, HALF, "hopper:64x128s4", ())
    assert found.describable(torch.zeros(2, 4, 33, 64, dtype=HALF))
    assert not found.describable(torch.zeros(1, 4, 33, 64, dtype=HALF).expand(2, -1, -1, -1))
    assert found.described(torch.zeros(1, 4, 33, 64, dtype=HALF).expand(2, -1, -1, -1), 64).base.shape == (2, 4, 33, 64)


@pytest.mark.parametrize("name", ["alibi", "relative", "padding", "documents"])
def test_captured_tensors_that_need_no_gradient_are_the_default(name: str) -> None:
    """As benchmarks and direct callers ask."""
    found, refused = families.candidates(Problem(SPECS[name], 128, 128, HALF, (9, 0)))
    assert is_hopper(found[0]) and not refused
    assert (found, refused) == families.candidates(Problem(SPECS[name], 128, 128, HALF, (9, 0)), [False] * 2)
