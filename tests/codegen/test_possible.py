"""Conditions on keys that masks put through captured vectors: what they are, and that no kept key is missed."""

from __future__ import annotations

import pytest
import torch

from fxopt.codegen.attention.possible import possible_keys
from fxopt.codegen.attention.reference import environment, kept, read_captures
from fxopt.codegen.expression import evaluate
from fxopt.ir.attention import AttentionSpec, Capture
from fxopt.ir.expression import parse
from tests.codegen.cases import Shape
from tests.codegen.vectors import VECTORS

ROW, KEY, LENGTH = (Capture(dims, torch.int64) for dims in ("b-i-", "b--j", "b---"))
FLAG = Capture("b--j", torch.bool)
ROW_FLAG = Capture("b-i-", torch.bool)


@pytest.mark.parametrize(("mask", "captures", "condition", "rows"), [
    ("c0", (FLAG,), "c0", ()),
    ("(j <= i) & c0", (FLAG,), "c0", ()),
    ("c0 != 0", (KEY,), "c0 != 0", ()),
    ("c0 == c1", (ROW, KEY), "(c2 <= c1) & (c3 >= c1)", ("c0",)),
    ("c1 == c0", (ROW, KEY), "(c2 <= c1) & (c3 >= c1)", ("c0",)),
    ("c0 != c1", (ROW, KEY), "(c2 != c1) | (c3 != c1)", ("c0",)),
    ("~(c0 != c1)", (ROW, KEY), "(c2 <= c1) & (c3 >= c1)", ("c0",)),
    ("c0 < c1", (ROW, KEY), "c2 < c1", ("c0",)),
    ("c1 < c0", (ROW, KEY), "c3 > c1", ("c0",)),
    ("(j <= i) | (j < c0)", (LENGTH,), "(c3 >= j) | (j < c0)", ("i",)),
    ("(c0 == c1) | (j < 3)", (ROW, KEY), "((c2 <= c1) & (c3 >= c1)) | (j < 3)", ("c0",)),
])  # fmt: skip
def test_conditions(mask: str, captures: tuple[Capture, ...], condition: str, rows: tuple[str, ...]) -> None:
    captures = (*captures, *(Capture("----", torch.int64),) * (2 - len(captures)))
    found = possible_keys(AttentionSpec(parse("s"), parse(mask), captures))
    assert found is not None
    assert found.condition == parse(condition) and tuple(map(str, found.rows)) == rows


@pytest.mark.parametrize(("mask", "captures"), [
    ("j <= i", ()),
    ("(j <= i) & (j > i - 16)", ()),
    ("(j <= i) | (j < 3)", ()),
    ("j < c0", (LENGTH,)),
    ("c0", (Capture("b-ij", torch.bool),)),
    ("c0", (Capture("bh-j", torch.bool),)),
    ("c0 == h", (KEY,)),
    ("c0 + j == c0 + i", (ROW,)),
    ("c0 == c1", (Capture("b-i-", torch.float32), Capture("b--j", torch.float32))),
    ("(c0 == c1) | c2", (ROW, KEY, Capture("b-ij", torch.bool))),
    ("~((c0 == c1) & (j < 3))", (ROW, KEY)),
])  # fmt: skip
def test_masks_that_say_nothing_of_blocks(mask: str, captures: tuple[Capture, ...]) -> None:
    assert possible_keys(AttentionSpec(parse("s"), parse(mask), captures)) is None


@pytest.mark.parametrize("name", VECTORS)
@pytest.mark.parametrize("rows", [1, 7, 24])
def test_every_kept_key_is_possible(name: str, rows: int) -> None:
    torch.manual_seed(rows)
    shape = Shape(8, 8, rows, 31, batch=4)
    spec = VECTORS[name].specification(torch.float32)
    s = torch.zeros(shape.batch, 1, shape.rows, shape.keys)
    readings = read_captures(spec, VECTORS[name].draw(shape), s)
    env = environment(spec, s) | {"b": torch.arange(shape.batch)[:, None, None, None]}
    env |= {"i": torch.arange(rows)[:, None], "j": torch.arange(shape.keys)}
    found = possible_keys(spec)
    assert found is not None and spec.mask is not None
    values = [evaluate(row, env, readings).expand(shape.batch, 1, rows, 1) for row in found.rows]
    extremes = [side(value, 2, keepdim=True) for value in values for side in (torch.amin, torch.amax)]
    possible = evaluate(found.condition, env, (*readings, *extremes))
    assert (kept(spec.mask, env, readings, s).expand_as(s).any(2, keepdim=True) <= possible).all()


@pytest.mark.parametrize(("mask", "captures", "sure"), [
    ("c0", (FLAG,), "c0"),
    ("~c0", (FLAG,), "~c0"),
    ("(j <= i) & c0", (FLAG,), "c0"),
    ("c0 == c1", (ROW, KEY), "~((c2 != c1) | (c3 != c1))"),
    ("c0 != c1", (ROW, KEY), "~((c2 <= c1) & (c3 >= c1))"),
    ("c0 < c1", (ROW, KEY), "~(c3 >= c1)"),
    ("(c0 == c1) & ((i + j) % 3 == 0)", (ROW, KEY), None),
    ("c0 & c1", (FLAG, Capture("-h-j", torch.bool)), None),
    ("(c0 == c1) | (j < 3)", (ROW, KEY), None),
])  # fmt: skip
def test_sure_conditions(mask: str, captures: tuple[Capture, ...], sure: str | None) -> None:
    captures = (*captures, *(Capture("----", torch.int64),) * (2 - len(captures)))
    found = possible_keys(AttentionSpec(parse("s"), parse(mask), captures), sure=True)
    assert found is not None and found.sure == (None if sure is None else parse(sure))


@pytest.mark.parametrize(("mask", "captures", "sure", "whole"), [
    ("c0 & c1", (FLAG, ROW_FLAG), "c0", "~(c5 != 0)"),
    ("c0 & (c1 > 2)", (FLAG, ROW), "c0", "~(c2 <= 2)"),
    ("(j <= i) & c1 & (c0 != 0)", (KEY, ROW_FLAG), "c0 != 0", "~(c5 != 0)"),
    # Documents of which a block holds two keep keys by both.
    ("c0 == c1", (ROW, KEY), "~((c2 != c1) | (c3 != c1))", None),
    # What is the same for all rows leaves out none alone.
    ("c0 & c1", (FLAG, Capture("b---", torch.bool)), "c0 & c1", None),
    # Without others the rows are all there is.
    ("c0", (ROW_FLAG, FLAG), "~(c5 != 0)", None),
])  # fmt: skip
def test_conjuncts_that_leave_out_rows_stand_apart(
    mask: str, captures: tuple[Capture, ...], sure: str, whole: str | None
) -> None:
    found = possible_keys(AttentionSpec(parse("s"), parse(mask), captures), sure=True)
    assert found is not None and found.sure == parse(sure)
    assert found.whole == (None if whole is None else parse(whole))


def test_bounds_need_no_hull() -> None:
    assert possible_keys(AttentionSpec(parse("s"), parse("(j <= i) | (j < c0)"), (LENGTH,)), sure=True) is None
