"""Kernels for few keys: configurations, what they serve, which are tried, their source."""

from __future__ import annotations

import ast
import dataclasses
import os
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from fxopt.codegen.attention import kernels
from fxopt.codegen.attention.problem import Problem
from fxopt.codegen.attention.short.config import Config, cut, read_config
from fxopt.codegen.attention.short.kernel import candidates, objection, source
from fxopt.codegen.attention.short.order import ordered
from fxopt.codegen.attention.short.sums import is_linear, moves_with, split_sum
from fxopt.errors import LoweringError
from fxopt.ir.attention import AttentionSpec, Capture
from fxopt.ir.expression import parse
from tests.codegen.cases import SHAPES, WITHOUT_BANDS, specification

pytest.importorskip("triton")
GOLDEN = Path(__file__).parents[1] / "golden"
HALF = torch.bfloat16
PLAIN = AttentionSpec(parse("s * 0.125"), out_dtype=HALF)
PROBLEM = Problem(PLAIN, 64, 64, HALF, (9, 0), 64, 12, 12, 197, 197)


@pytest.mark.parametrize(
    "text", ["short:64x64w2p8", "short:64x128+64+16w4r4", "short:16x16w1p1s2", "short:64x64w4p8m128"]
)
def test_configurations_print_and_read_back(text: str) -> None:
    assert str(read_config(text)) == text


def test_a_configuration_reads_as_written() -> None:
    config = read_config("short:64x128+64+16w4r3s2m168")
    assert config == Config(64, (128, 64, 16), 4, "rows", 3, 2, 168)
    assert (config.keys, config.starts) == (208, (0, 128, 192))


@pytest.mark.parametrize("text", [
    "short:64x48w4p8", "short:8x16w1p1", "short:64x8w4p1", "short:64x256+16w4p1", "short:64x64w3p1", "short:64x64w4p0",
    "short:64x64w4p1s0", "short:64x64w4", "64x64w4s2", "short:64x64w4p1m100", "short:64x64w4p1m256",
])  # fmt: skip
def test_what_is_no_configuration(text: str) -> None:
    with pytest.raises(LoweringError, match="configuration"):
        read_config(text)


@pytest.mark.parametrize(("keys", "expected"), [
    (1, (16,)), (16, (16,)), (17, (32,)), (49, (64,)), (64, (64,)), (65, (64, 16)), (100, (64, 32, 16)), (128, (128,)),
    (144, (128, 16)), (197, (128, 64, 16)), (240, (256,)), (256, (256,)),
])  # fmt: skip
def test_keys_are_cut_with_little_to_spare(keys: int, expected: tuple[int, ...]) -> None:
    assert cut(keys, 256) == expected


@pytest.mark.parametrize("largest", [32, 128, 256])
def test_every_number_of_keys_fits_its_pieces(largest: int) -> None:
    for keys in range(1, 257):
        pieces = cut(keys, largest)
        assert keys <= sum(pieces) <= 256 and max(pieces) <= largest
        assert sum(pieces[:-1]) < keys
        assert len(pieces) <= max(3, 256 // largest)


@pytest.mark.parametrize(("change", "reason"), [
    ({"keys": None}, "not known"),
    ({"dynamic_keys": True}, "may change"),
    ({"keys": 257}, "256 keys at most, and here are 257"),
    ({"head_dim": 160}, "at most 128"),
    ({"value_dim": 256}, "at most 128"),
    ({"dtype": torch.float64}, "float64"),
    ({"dtype": torch.float32}, "registers"),
    ({"head_dim": 128, "value_dim": 128, "keys": 256}, "registers"),
])  # fmt: skip
def test_objections(change: dict[str, object], reason: str) -> None:
    near_miss = dataclasses.replace(PROBLEM, **change)  # type: ignore[arg-type]
    assert reason in (objection(near_miss) or "")
    assert candidates(near_miss) == ()
    assert objection(PROBLEM) is None


def test_the_family_is_asked_beside_the_portable_one() -> None:
    ranked = kernels.ranking(PROBLEM)
    assert sum(text.startswith("short:") for text in (*ranked.tried, *ranked.left_out)) == 2
    found, refused = kernels.candidates(PROBLEM)
    assert any(":" not in text for text in found)
    assert "short" not in refused
    found, refused = kernels.candidates(dataclasses.replace(PROBLEM, keys=512))
    assert "512" in refused["short"] and not any(text.startswith("short:") for text in found)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0)])
@pytest.mark.parametrize("width", [16, 40, 64, 80])
@pytest.mark.parametrize("keys", [1, 7, 49, 64, 128])
def test_candidates_are_few_and_different(keys: int, width: int, capability: tuple[int, int]) -> None:
    given = dataclasses.replace(PROBLEM, rows=keys, keys=keys, head_dim=width, value_dim=width, capability=capability)
    found = candidates(given)
    assert 1 <= len(set(found)) == len(found) <= 3
    assert all(keys <= read_config(text).keys < max(17, 2 * keys) for text in found)
    assert found == candidates(given)


def test_unknown_sizes_have_candidates() -> None:
    assert candidates(dataclasses.replace(PROBLEM, batch=None, heads=None, kv_heads=None, rows=None))


def test_small_problems_fill_the_device_rather_than_walk() -> None:
    large = ordered(dataclasses.replace(PROBLEM, keys=49, rows=49, batch=4096))[0]
    small = ordered(dataclasses.replace(PROBLEM, keys=49, rows=49, batch=8))[0]
    assert large.steps > 4 and small.steps == 1


@pytest.mark.parametrize(("score", "axis", "moving", "fixed"), [
    ("s * 0.125 + c0 + c1", "b", "(s * 0.125)", "(c0 + c1)"),
    ("c0 - c1 + s", "b", "s", "(c0 + (-c1))"),
    ("s + c2 + c0", "b", "(s + c2)", "c0"),
    ("s + c2 + c0", "i", "(s + c0)", "c2"),
    ("s + float(j - i) + float(b)", "b", "(s + float(b))", "float((j - i))"),
    ("s * c0", "b", "(s * c0)", None),
    ("c0 + c1", "b", "(c0 + c1)", None),
])  # fmt: skip
def test_sums_are_split(score: str, axis: str, moving: str, fixed: str | None) -> None:
    captures = (Capture("-hij", HALF), Capture("p-ij", HALF), Capture("b--j", HALF))
    found = split_sum(parse(score), moves_with(axis, captures))
    assert found == (parse(moving), parse(fixed) if fixed else None)


@pytest.mark.parametrize(("moving", "expected"), [
    ("s * 0.125", True), ("s", True), ("s * 0.125 + 2.0", True), ("s * c0", False), ("1.0 / s", False),
    ("s + float(j)", False), ("s * inf", False), ("20.0 * tanh(s)", False), ("exp(s)", False), ("2.0 - s / 3.0", True),
])  # fmt: skip
def test_only_what_is_linear_in_the_score_ends_the_keys_by_a_sum(moving: str, expected: bool) -> None:
    assert is_linear(parse(moving)) == expected


@pytest.mark.parametrize(("name", "config"), [
    ("swin", "short:64x64w4p8m128"), ("causal-padding", "short:64x128+64+16w4r4"),
])  # fmt: skip
def test_golden(name: str, config: str) -> None:
    spec = specification(name, SHAPES["packed"], HALF)
    text = source(spec, 80, 80, HALF, config).replace(f"fxopt {version('fxopt')}", "fxopt VERSION")
    kept = GOLDEN / f"short_{name.replace('-', '_')}.py.txt"
    if os.environ.get("FXOPT_UPDATE_GOLDEN") == "1":
        kept.write_text(text, encoding="utf-8")
    assert text == kept.read_text(encoding="utf-8"), "set FXOPT_UPDATE_GOLDEN=1 to accept the new source"


@pytest.mark.parametrize("config", ["short:64x64w4p8", "short:64x128+64+16w4r4"])
@pytest.mark.parametrize("name", WITHOUT_BANDS)
def test_same_specification_same_bytes_and_valid_python(name: str, config: str) -> None:
    spec = specification(name, SHAPES["packed"], HALF)
    text = source(spec, 80, 80, HALF, config)
    assert text == source(specification(name, SHAPES["packed"], HALF), 80, 80, HALF, config)
    tree = ast.parse(text)
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert functions[-4:] == ["attention_kernel", "launch", "reference", "main"]
    assert str(spec.score) in (ast.get_docstring(tree) or "") and config in (ast.get_docstring(tree) or "")
    assert "fxopt" not in text.split('"""', 2)[2]
    assert max(map(len, text.splitlines())) <= 120


def test_source_refuses_what_it_can_not_serve() -> None:
    with pytest.raises(LoweringError, match="at most 128"):
        source(PLAIN, 160, 64, HALF, "short:64x64w4p8")
