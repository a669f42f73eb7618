"""Masks by proof, both ways: what is causal is proved, what is almost causal is not."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fxopt.analysis.masks import as_additive, every_row_keeps_a_key, prove_structure
from fxopt.analysis.simplify import simplify
from fxopt.codegen.expression import evaluate
from fxopt.ir.expression import parse


def ones(rows: int, columns: int) -> Tensor:
    return torch.ones(rows, columns, dtype=torch.bool)


@pytest.mark.parametrize(
    ("keep", "form"),
    [
        (ones(4, 6), "True"),
        (ones(5, 5).tril(), "j <= i"),
        (ones(5, 5).tril(-1), "j <= i + -1"),
        (ones(3, 5).tril(2), "j <= i + 2"),
        (ones(6, 6).tril() & ones(6, 6).triu(-2), "(j <= i) & (j >= i + -2)"),
        (ones(5, 5).triu(), "j >= i"),
        (ones(6, 6).tril(1) & ones(6, 6).triu(-1), "(j <= i + 1) & (j >= i + -1)"),
    ],
)
def test_structured_masks_are_proved(keep: Tensor, form: str) -> None:
    found = prove_structure(keep)
    assert found is not None and found == parse(form)
    env = {"i": torch.arange(keep.shape[0])[:, None], "j": torch.arange(keep.shape[1])[None]}
    assert torch.equal(torch.as_tensor(evaluate(found, env)).expand_as(keep), keep)


def flipped(keep: Tensor, row: int, column: int) -> Tensor:
    keep = keep.clone()
    keep[row, column] = ~keep[row, column]
    return keep


@pytest.mark.parametrize("row", range(5))
@pytest.mark.parametrize("column", range(5))
def test_one_flipped_element_is_not_causal(row: int, column: int) -> None:
    keep = flipped(ones(5, 5).tril(), row, column)
    found = prove_structure(keep)
    if found is not None:
        env = {"i": torch.arange(5)[:, None], "j": torch.arange(5)[None]}
        assert torch.equal(torch.as_tensor(evaluate(found, env)).expand_as(keep), keep)
    assert found != parse("j <= i")


def test_what_has_no_closed_form_is_refused() -> None:
    assert prove_structure(~ones(4, 4)) is None
    assert prove_structure(torch.eye(8, dtype=torch.bool).roll(3, 1)) is None
    assert (
        prove_structure(
            ones(
                2,
                3,
            ).unsqueeze(0)
        )
        is None
    )


def test_additive_masks() -> None:
    lowest = torch.finfo(torch.bfloat16).min
    read = as_additive(torch.tensor([[0.0, -math.inf]]))
    assert read is not None and read[0].tolist() == [[True, False]] and not read[1]
    read = as_additive(torch.tensor([[0.0, lowest]]))
    assert read is not None and read[1]
    assert as_additive(torch.tensor([[0.0, -10000.0]])) is None
    assert as_additive(torch.tensor([[0.5, -math.inf]])) is None


def test_rows_without_keys_are_seen() -> None:
    assert every_row_keeps_a_key(ones(4, 4).tril())
    assert not every_row_keeps_a_key(ones(4, 4).tril(-1))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("s * 2.0 * 4.0", "s * 8.0"),
        ("s / 8.0", "s * 0.125"),
        ("s + 0.0", "s"),
        ("where(True, s, 1.0)", "s"),
        ("where(~c0, 1.0, s)", "where(c0, s, 1.0)"),
        ("~(j > i)", "j <= i"),
        ("(1 + 2) * s", "s * 3"),
        ("(j <= i) & True", "j <= i"),
    ],
)
def test_simplification(before: str, after: str) -> None:
    assert simplify(parse(before)) == parse(after)
