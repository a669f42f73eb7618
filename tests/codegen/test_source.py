"""Generated source as a product: deterministic, formatted, complete, and the same as the one kept in ``golden``."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from fxopt.cache import import_source
from fxopt.codegen.attention.interval import Bound, key_range
from fxopt.codegen.attention.portable.kernel import KIND, Config, candidates, read_config, source
from fxopt.codegen.attention.possible import possible_keys
from fxopt.codegen.attention.problem import Problem
from fxopt.errors import LoweringError
from fxopt.ir.attention import AttentionSpec, Capture
from fxopt.ir.expression import parse
from tests.codegen.cases import EXPRESSIONS, SHAPES, specification

pytest.importorskip("triton")
GOLDEN = Path(__file__).parent / "golden"
CONFIG = read_config("128x64w8s3")
SPEC = AttentionSpec(
    parse("50.0 * tanh(s * 0.0625 / 50.0)"),
    parse("(j <= i) & (j > i - 1024) & c0"),
    (Capture("b--j", torch.bool),),
    empty_rows="zero",
    out_dtype=torch.bfloat16,
    out_layout="bshd",
)


DOCUMENTS = AttentionSpec(
    parse("s * 0.125"),
    parse("(j <= i) & (c0 == c1)"),
    (Capture("b-i-", torch.int64), Capture("b--j", torch.int64)),
    empty_rows="uniform",
    out_dtype=torch.bfloat16,
)
#: By the name of the file: no captured vector limits the keys; a padding vector does; documents do, by rows.
GOLDEN_CASES = {
    "causal_alibi": AttentionSpec(
        parse("s * 0.125 + c0 * float(j - i)"), parse("j <= i"), (Capture("-h--", torch.float32),),
        out_dtype=torch.bfloat16,
    ),
    "softcap_window_padding": SPEC,
    "documents_mean": DOCUMENTS,
    "causal_dropout": AttentionSpec(parse("s * 0.125"), parse("j <= i"), dropout=0.1, out_dtype=torch.bfloat16),
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_golden(name: str) -> None:
    spec, width, path = GOLDEN_CASES[name], 128 if name == "softcap_window_padding" else 64, GOLDEN / f"{name}.py.txt"
    text = source(spec, width, width, torch.bfloat16, CONFIG).replace(f"fxopt {version('fxopt')}", "fxopt VERSION")
    if os.environ.get("FXOPT_UPDATE_GOLDEN") == "1":
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), "set FXOPT_UPDATE_GOLDEN=1 to accept the new source"


def test_only_captured_vectors_bring_a_kernel_in_front() -> None:
    texts = {name: (GOLDEN / f"{name}.py.txt").read_text(encoding="utf-8") for name in GOLDEN_CASES}
    assert [name for name, text in texts.items() if "hull" in text] == ["softcap_window_padding", "documents_mean"]
    assert [name for name, text in texts.items() if "average(" in text] == ["documents_mean"]


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_same_specification_same_bytes_and_valid_python(name: str) -> None:
    spec = specification(name, SHAPES["packed"], torch.bfloat16)
    text = source(spec, 80, 80, torch.bfloat16, CONFIG)
    assert text == source(specification(name, SHAPES["packed"], torch.bfloat16), 80, 80, torch.bfloat16, CONFIG)
    tree = ast.parse(text)
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    hull = ["hull_kernel"] if possible_keys(spec) else []
    phases = ["phases_kernel"] if any(c.is_band for c in spec.captures) else []
    expected = ["attend", *hull, *phases, "attention_kernel", "launch", "reference", "main"]
    assert functions[-len(expected) :] == expected
    assert str(spec.score) in (ast.get_docstring(tree) or "")
    assert "fxopt" not in text.split('"""', 2)[2]
    assert max(map(len, text.splitlines())) <= 120


def test_source_is_the_same_in_another_process_with_another_hash_seed() -> None:
    code = (
        "from tests.codegen.test_source import *; import sys;"
        "sys.stdout.write(source(SPEC, 128, 128, torch.bfloat16, CONFIG))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout == source(SPEC, 128, 128, torch.bfloat16, CONFIG)


def test_full_blocks_evaluate_only_what_does_not_bound_the_keys() -> None:
    text = source(SPEC, 128, 128, torch.bfloat16, CONFIG)
    bounded, full = re.search(r"kept = j < Sk\n(.*?)else:\n(.*?)highest", text, re.S).groups()  # type: ignore[union-attr]
    assert "j <= i" in bounded and "j > (i - 1024)" in bounded and "c0" in bounded
    assert "c0" in full and "j " not in full
    assert text.count("acc, total, peak = attend(") == 3


@pytest.mark.parametrize(("mask", "expected"), [
    ("j <= i", [("upper", 1, "0")]),
    ("i >= j", [("upper", 1, "0")]),
    ("j < i + (Sk - Sq)", [("upper", 1, "((Sk - Sq) + -1)")]),
    ("(j - i) <= 3", [("upper", 1, "3")]),
    ("~(j > i)", [("upper", 1, "0")]),
    ("(i - j) < 128", [("lower", 1, "-127")]),
    ("j > i - 16", [("lower", 1, "-15")]),
    ("j < c0", [("upper", 0, "(c0 + -1)")]),
    ("j >= 4", [("lower", 0, "4")]),
    ("i + j < 5", []),
    ("(j <= i) | (j < 3)", []),
    ("j <= 2 * i", []),
    ("j != i", []),
])  # fmt: skip
def test_bounds_read_off_a_mask(mask: str, expected: list[tuple[str, int, str]]) -> None:
    spec = AttentionSpec(parse("s"), parse(mask), (Capture("b---", torch.int64),))
    found = key_range(spec)
    assert [(b.side, b.slope, str(b.offset)) for b in found.bounds] == expected
    assert len(found.rest) == (not expected)
    assert all(isinstance(b, Bound) for b in found.bounds)


def test_one_of_several_bounds_of_a_side_is_a_bound_where_that_is_understood() -> None:
    spec = AttentionSpec(parse("s"), parse("((j <= i) | (j < 3)) & ((j > i - 9) | (j < 5))"))
    assert key_range(spec).bounds == ()
    found = key_range(spec, further=True)
    assert [[(b.slope, str(b.offset)) for b in bound.all] for bound in found.bounds] == [[(1, "0"), (0, "2")]]
    assert found.bounds[0].follows_rows and len(found.rest) == 1


@pytest.mark.parametrize("term", ["(i // 32) == (j // 32)", "(j // 32) == (i // 32)"])
def test_chunks_bound_the_keys_from_both_sides(term: str) -> None:
    spec = AttentionSpec(parse("s"), parse(f"(j <= i) & ({term})"))
    assert len(key_range(spec).bounds) == 1
    found = key_range(spec, further=True)
    bounds = [(b.side, b.chunk, str(b.offset)) for b in found.bounds]
    assert bounds == [("upper", 1, "0"), ("lower", 32, "0"), ("upper", 32, "31")] and not found.rest
    text = source(spec, 16, 16, torch.float16, CONFIG)
    assert "start_block = tl.maximum(0, floor_divide(first, 32) * 32) // BLOCK_N * BLOCK_N" in text


@pytest.mark.parametrize(("term", "expected"), [
    ("(j // 32) <= (i // 32)", ("upper", 1, 32, "31")),
    ("(i // 32) >= (j // 32)", ("upper", 1, 32, "31")),
    ("(j // 32) < (i // 32)", ("upper", 1, 32, "-1")),
    ("~((j // 32) > (i // 32))", ("upper", 1, 32, "31")),
    ("((i // 32) - (j // 32)) < 3", ("lower", 1, 32, "-64")),
    ("(j // 32) >= (i // 32) + c0", ("lower", 1, 32, "(c0 * 32)")),
    ("(j // 32) <= 2", ("upper", 0, 1, "95")),
])  # fmt: skip
def test_comparisons_of_chunks_bound_the_keys(term: str, expected: tuple[str, int, int, str]) -> None:
    spec = AttentionSpec(parse("s"), parse(term), (Capture("b---", torch.int64),))
    assert key_range(spec).bounds == ()
    (bound,) = key_range(spec, further=True).bounds
    assert (bound.side, bound.slope, bound.chunk, str(bound.offset)) == expected
    assert not key_range(spec, further=True).rest


@pytest.mark.parametrize("term", [
    "(j // 32) <= (i // 16)", "(j // 32) <= i", "((j + 1) // 32) <= (i // 32)", "(j // 32) + j <= (i // 32)",
    "(j // 32) <= 2 * (i // 32)", "(j // c0) <= (i // c0)", "(j // -4) <= (i // -4)", "(j // 4) <= (h + (i // 4) % 2)",
])  # fmt: skip
def test_what_is_nearly_a_comparison_of_chunks_bounds_nothing(term: str) -> None:
    spec = AttentionSpec(parse("s"), parse(term), (Capture("b---", torch.int64),))
    assert key_range(spec, further=True).bounds == ()


@pytest.mark.parametrize("term", ["(i // 32) == (j // 16)", "(i // 32) == ((j + 1) // 32)", "(i // 32) != (j // 32)"])
def test_what_is_nearly_a_chunk_bounds_nothing(term: str) -> None:
    assert key_range(AttentionSpec(parse("s"), parse(term)), further=True).bounds == ()


def test_a_prefix_bounds_the_loops() -> None:
    text = source(specification("prefix", SHAPES["tails"], torch.bfloat16), 16, 16, torch.bfloat16, CONFIG)
    assert "stop = tl.minimum(Sk, tl.maximum(last + 1, 3))" in text
    assert "full_stop = tl.minimum(Sk, tl.maximum(first + 1, 3))" in text
    assert text.count("j < 3") == text.count("j <= i"), "evaluated where a block is bounded, and nowhere else"


def test_captures_that_vary_along_the_keys_bound_nothing() -> None:
    spec = AttentionSpec(parse("s"), parse("j < c0"), (Capture("b--j", torch.int64),))
    assert key_range(spec).bounds == ()


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [16, 40, 64, 80, 128, 192, 256])
def test_candidates(width: int, dtype: torch.dtype, capability: tuple[int, int]) -> None:
    found = candidates(Problem(SPEC, width, width, dtype, capability))
    assert 1 <= len(found) <= 4
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    "config", [Config(128, 64, 8, 3), Config(64, 64, 4, 3, 128), Config(64, 128, 4, 2, 168, "tma")]
)
def test_configurations_print_and_read_back(config: Config) -> None:
    assert read_config(str(config)) == config


def test_vectors_along_the_keys_get_blocks_that_do_not_spill() -> None:
    """128 keys at a time on four warps spill with one (sm_90, Triton 3.6)."""
    plain = AttentionSpec(parse("s"), out_dtype=torch.bfloat16)
    padded = AttentionSpec(parse("s"), parse("c0"), (Capture("b--j", torch.bool),), out_dtype=torch.bfloat16)
    wide = [[c.block_n for c in candidates(Problem(spec, 64, 64, torch.bfloat16, (9, 0)))] for spec in (plain, padded)]
    assert 128 in wide[0] and 128 not in wide[1]


def test_few_rows_get_small_blocks_first() -> None:
    assert candidates(Problem(SPEC, 64, 64, torch.bfloat16, (9, 0), rows=1))[0].block_m == 16
    assert candidates(Problem(SPEC, 64, 64, torch.bfloat16, (9, 0), rows=4096))[0].block_m >= 64


@pytest.mark.parametrize(("score", "expected"), [
    ("s + c0 * float(j - i)", "(c0 * n[None, :].to(tl.float32)) + (c0 * (start - i).to(tl.float32))"),
    ("s + float(i - j) * 0.5", "(0.5 * (-n[None, :].to(tl.float32))) + (0.5 * ((0 - start) + i).to(tl.float32))"),
    ("s + float(j - i) * float(i)", None),
    ("s + c0 * float((j - i) // 2)", None),
])  # fmt: skip
def test_products_with_the_distance_are_split(score: str, expected: str | None) -> None:
    spec = AttentionSpec(parse(score), None, (Capture("-h--", torch.float32),))
    text = source(spec, 64, 64, torch.bfloat16, CONFIG)
    assert (expected in text) if expected else ("n[None, :].to" not in text)
    assert "n[None, :].to" not in source(spec, 64, 64, torch.float32, CONFIG)


def test_long_strides_take_wide_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, object]] = []

    class Recorder:
        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda *_, **options: seen.append(options)

    spec = AttentionSpec(parse("s"), out_dtype=torch.bfloat16)
    module = import_source(KIND, source(spec, 64, 64, torch.bfloat16, CONFIG))
    monkeypatch.setattr(module, "attention_kernel", Recorder())
    near = torch.empty((1, 2, 96, 64), dtype=torch.bfloat16, device="meta")
    far = torch.empty_strided((1, 2, 96, 64), (64, 64, 2**24, 1), dtype=torch.bfloat16, device="meta")
    module.launch(near, near, near)
    module.launch(near, near, far)
    assert [options["WIDE"] for options in seen] == [False, True]
    assert [options["EVEN"] for options in seen] == [False, False]
    for text in ("128x64", "100x64w4s3", "128x8w4s3", "128x64w3s3", "128x64w4s0"):
        with pytest.raises(LoweringError, match="configuration"):
            read_config(text)


@pytest.mark.parametrize(("change", "reason"), [
    ({"dropout": 1.0}, "leaves nothing"), ({"dropout": 0.5, "empty_rows": "uniform"}, "share equally"),
    ({"out_dtype": torch.float64}, "float64"),
])  # fmt: skip
def test_refusals(change: dict[str, object], reason: str) -> None:
    spec = AttentionSpec(parse("s"), **change)  # type: ignore[arg-type]
    assert candidates(Problem(spec, 64, 64, torch.bfloat16, (9, 0))) == ()
    with pytest.raises(LoweringError, match=reason):
        source(spec, 64, 64, torch.bfloat16, CONFIG)
    with pytest.raises(LoweringError, match="256"):
        source(SPEC, 512, 64, torch.bfloat16, CONFIG)
