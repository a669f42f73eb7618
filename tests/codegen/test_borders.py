"""What the borders of a block tell of a mask: never wrong, exact where it can be, nothing where it can't."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxopt.codegen.attention.borders import decision
from fxopt.codegen.expression import evaluate
from fxopt.ir.attention import Capture
from fxopt.ir.expression import Expr, parse

CAPTURES = (
    Capture("b---", torch.int64),
    Capture("-h--", torch.bool),
    Capture("b--j", torch.int64),
    Capture("----", torch.float32),
)
Block = tuple[int, int, int, int]


def told(mask: Expr, block: Block, uniform: tuple[int, bool] = (5, True)) -> tuple[bool, bool]:
    """Whether some of a block can be kept, and whether all is: from first and last row, first and last key."""
    found = decision(mask, CAPTURES)
    captures = [torch.tensor(x) for x in (*uniform, 0, 0.0, *block)]
    some, every = (evaluate(x, {"Sq": 40, "Sk": 50, "b": 1, "h": 2}, captures) for x in (found.some, found.every))
    return bool(some), bool(every)


def kept(mask: Expr, block: Block, uniform: tuple[int, bool] = (5, True)) -> Tensor:
    first, last, start, end = block
    i, j = torch.arange(first, last + 1)[:, None], torch.arange(start, end + 1)[None, :]
    captures = [torch.tensor(x) for x in (*uniform, 0, 0.0)]
    env = {"i": i, "j": j, "Sq": 40, "Sk": 50, "b": 1, "h": 2}
    return torch.as_tensor(evaluate(mask, env, captures)).expand(len(i), j.shape[1])


NUMBERS = st.integers(-6, 12).map(str)
POSITIVE = st.integers(1, 9).map(str)
INTEGERS = st.recursive(
    st.sampled_from(["i", "j", "i", "j", "Sk", "h", "c0"]) | NUMBERS,
    lambda parts: (
        st.tuples(parts, st.sampled_from(["+", "-"]), parts).map(lambda x: f"({x[0]} {x[1]} {x[2]})")
        | st.tuples(parts, st.sampled_from(["//", "%"]), POSITIVE).map(lambda x: f"({x[0]} {x[1]} {x[2]})")
        | st.tuples(parts, NUMBERS).map(lambda x: f"({x[0]} * {x[1]})")
        | st.tuples(st.sampled_from(["minimum", "maximum"]), parts, parts).map(lambda x: f"{x[0]}({x[1]}, {x[2]})")
        | parts.map(lambda x: f"abs({x})")
        | parts.map(lambda x: f"(-{x})")
    ),
    max_leaves=5,
)
COMPARISONS = st.tuples(INTEGERS, st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), INTEGERS).map(
    lambda x: f"({x[0]} {x[1]} {x[2]})"
)
MASKS = st.recursive(
    COMPARISONS | st.just("c1"),
    lambda parts: (
        st.tuples(parts, st.sampled_from(["&", "|"]), parts).map(lambda x: f"({x[0]} {x[1]} {x[2]})")
        | parts.map(lambda x: f"(~{x})")
    ),
    max_leaves=4,
)
BLOCKS = st.tuples(st.integers(0, 30), st.integers(0, 12), st.integers(0, 30), st.integers(0, 12)).map(
    lambda x: (x[0], x[0] + x[1], x[2], x[2] + x[3])
)


@settings(max_examples=400, deadline=None)
@given(text=MASKS, block=BLOCKS, uniform=st.tuples(st.integers(-3, 40), st.booleans()))
def test_borders_are_never_wrong(text: str, block: Block, uniform: tuple[int, bool]) -> None:
    mask = parse(text)
    some, every = told(mask, block, uniform)
    found = kept(mask, block, uniform)
    assert some or not found.any()
    assert not every or found.all()


@pytest.mark.parametrize("text", [
    "abs(i - j) <= 6", "j <= i", "(j % 16) >= 13", "(i // 5) == (j // 5)", "(i // 8) != (j // 8)",
    "~((j // 4) > (i // 4))", "(j < c0) & c1", "minimum(i, 7) >= maximum(3, j)", "(2 * j) >= (4 - i)", "(i % 8) != 3",
])  # fmt: skip
def test_blocks_that_keep_nothing_or_all_are_found(text: str) -> None:
    mask = parse(text)
    for first in range(0, 32, 4):
        for start in range(0, 32, 4):
            block = (first, first + 3, start, start + 3)
            found = kept(mask, block)
            assert told(mask, block) == (bool(found.any()), bool(found.all())), block


@pytest.mark.parametrize("text", ["((abs(i - j) <= 6) | (j < 3)) | (i < 3)", "(j == i) | ((j % 8) >= 6)"])
def test_blocks_that_no_alternative_keeps_are_found(text: str) -> None:
    mask = parse(text)
    blocks = [(first, first + 3, start, start + 3) for first in range(0, 32, 4) for start in range(0, 32, 4)]
    found = [bool(kept(mask, block).any()) for block in blocks]
    assert [told(mask, block)[0] for block in blocks] == found and not all(found)


@pytest.mark.parametrize("text", [
    "c2 == i", "float(i) < c3", "(i * j) < 9", "(i // c0) == 3", "(i % -4) == 0", "i ** 2 > j", "where(c1, i, j) < 3",
    "c2 > 0",
])  # fmt: skip
def test_what_borders_do_not_tell_is_left_undecided(text: str) -> None:
    found = decision(parse(text), CAPTURES)
    assert not found.decides and (found.some, found.every) == (parse("True"), parse("False"))


def test_what_is_told_of_a_part_holds_for_the_whole() -> None:
    assert str(decision(parse("(c2 == 1) & (j < 4)"), CAPTURES).some) == "(c6 < 4)"
    assert not decision(parse("(c2 == 1) & (j < 4)"), CAPTURES).every.args
    assert str(decision(parse("(c2 == 1) | (j < 4)"), CAPTURES).every) == "(c7 < 4)"
