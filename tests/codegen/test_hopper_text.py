"""The text of Hopper kernels: what is generated of which attention, what is refused and why."""

from __future__ import annotations

import ast
import dataclasses
import re
from typing import Any

import pytest
import torch

from fxopt.codegen.attention import kernels
from fxopt.codegen.attention.hopper.config import read_config
from fxopt.codegen.attention.hopper.kernel import candidates, objection, source
from fxopt.codegen.attention.hopper.tile import beneath, is_tile
from fxopt.errors import LoweringError
from fxopt.ir.attention import AttentionSpec, Capture
from fxopt.ir.expression import parse
from tests.codegen.cases import EXPRESSIONS, SHAPES, specification
from tests.codegen.test_hopper import HALF, SPECS, problem


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
                                  "hopper:128x128s2q1a0", "hopper:128x128s2q2a1",
                                  "hopper:128x128s2q2b", "hopper:64x128s2q2a0b",
                                  "hopper:128x128s2q2a0b0"])  # fmt: skip
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
    for text in ("hopper:192x128s3q2", "hopper:192x128s3q2a0", "hopper:128x64s4q3a1", "hopper:192x128s3q2a0b"):
        assert str(read_config(text)) == text


def test_three_groups_pass_a_baton_and_two_where_scores_have_slopes() -> None:
    found = {name: [config[-1] == "b" for config in candidates(problem(SPECS[name], 64))] for name in SPECS}
    assert all(found[name] == [True, True] for name in ("alibi", "relative"))
    assert all(found[name] == [True, False] for name in ("plain", "causal", "prefix", "softcap-window", "band", "tile"))
    assert not any(any(found[name]) for name in ("padding", "documents", "causal-tile"))
    assert not any("b" in config.partition(":")[2] for config in candidates(problem(SPECS["plain"], 128)))
