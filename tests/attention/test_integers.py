"""Integers in masks and biases: what their dtypes hold, what they don't, and numbers that stand for no position."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fxopt
from fxopt.analysis.domain import Domain
from fxopt.analysis.width import is_counted, may_overflow
from fxopt.ir.expression import parse
from fxopt.testing import draw
from tests.attention.case import FunctionModule
from tests.attention.check import compiled

SMALL = torch.tensor([[100, 100, 120, 120, -100], [1, 1, 2, 127, 127]], dtype=torch.int8)
BYTES = torch.tensor([[1, 1, 0, 1, 200], [1, 0, 1, 1, 0]], dtype=torch.uint8)
IDS = torch.tensor([[50000, 50000, 7, 7, 60000], [1, 1, 2, 2, 3]], dtype=torch.int32)


def rows(x: Tensor) -> Tensor:
    return x[:, None, :, None]


def keys(x: Tensor) -> Tensor:
    return x[:, None, None, :]


def positions(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.arange(5, dtype=dtype)[:, None], torch.arange(5, dtype=dtype)


def hashed(dtype: torch.dtype) -> Callable[..., Tensor]:
    def bias(scores: Tensor) -> Tensor:
        i, j = positions(dtype)
        return scores.masked_fill((i * 1000000007 + j * 7) % 97 > 48, -5.0)

    return bias


def wrapped(change: Callable[[Tensor], Tensor], compare: Callable[..., Tensor]) -> Tensor:
    """Causal, as long as ``change`` of positions stays within 32 bits."""
    i, j = positions(torch.int64)
    result: Tensor = compare(change(j), change(i))
    return result


CASES: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "sum of widened": (lambda s, x: s.masked_fill(rows(x.long()) + keys(x.long()) > 130, -5.0), (SMALL,)),
    "product of widened": (lambda s, x: s + (rows(x.long()) * keys(x.long())) * 1e-3, (SMALL,)),
    "sum that wraps": (lambda s, x: s.masked_fill(rows(x) + keys(x) > 100, -5.0), (SMALL,)),
    "beyond its dtype": (lambda s, x: s.masked_fill(keys(x.long()) < 130, -5.0), (SMALL,)),
    "bytes below zero": (lambda s, x: s + rows(x.long() - 1) - keys(x.int() - 1), (BYTES,)),
    "product of ids": (lambda s, x: s.masked_fill(rows(x.long()) * keys(x.long()) > 100, -5.0), (IDS,)),
    "product of ids that wraps": (lambda s, x: s.masked_fill(rows(x) * keys(x) * 2 > 100, -5.0), (IDS,)),
    "hash of positions": (hashed(torch.int64), ()),
    "hash of positions that wraps": (hashed(torch.int32), ()),
    "positions that wrap": (lambda s: s.masked_fill(wrapped(lambda x: x.int() * 700000000, operator.gt), -5.0), ()),
    "positions that wrap when narrowed": (
        lambda s: s.masked_fill(wrapped(lambda x: (x * 700000000).int(), operator.gt), -5.0),
        (),
    ),
    "negative positions that wrap": (
        lambda s: s.masked_fill(wrapped(lambda x: -x.int() * 700000000, operator.lt), -5.0),
        (),
    ),
    "positions that nearly wrap": (
        lambda s: s.masked_fill(wrapped(lambda x: x.int() * 500000000, operator.gt), -5.0),
        (),
    ),
    "constant that wraps": (lambda s: s.masked_fill(torch.full((5, 5), 300).to(torch.uint8) > 100, -5.0), ()),
    "minus one as a byte": (lambda s: s + (torch.ones(5, 5).tril() - 1).long().to(torch.uint8), ()),
    "truth times truth": (lambda s, x: s.masked_fill(rows(x.bool()) * keys(x.bool()), -5.0), (BYTES,)),
    "truth plus truth": (lambda s, x: s.masked_fill(rows(x.bool()) + keys(x.bool()), -5.0), (BYTES,)),
}


def check(change: Callable[..., Tensor], data: tuple[Tensor, ...]) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, *data: Tensor) -> Tensor:
        return torch.softmax(change(q @ k.transpose(-2, -1), *data), -1) @ v

    torch._dynamo.reset()
    args: Any = (*(draw((2, 3, 5, 4), seed=seed) for seed in range(3)), *data)
    assert fxopt.explain(attention, *args).count("attention", "rewritten") == 1
    actual = compiled(FunctionModule(attention), dynamic=False)(*args)
    torch.testing.assert_close(actual, attention(*args), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_integers_are_computed_as_written(name: str) -> None:
    check(*CASES[name])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("compare", [operator.lt, operator.le, operator.gt, operator.ge])
@pytest.mark.parametrize("lowest", [False, True], ids=["largest", "lowest"])
def test_keys_at_no_position(dtype: torch.dtype, compare: Callable[..., Tensor], lowest: bool) -> None:
    nowhere = torch.iinfo(dtype).min if lowest else torch.iinfo(dtype).max
    at = torch.tensor([[0, 1, 2, nowhere, 3], [0, nowhere, 1, 2, 3]], dtype=dtype)
    queries = torch.arange(5, dtype=dtype).expand(2, 5)
    check(lambda s, x, y: s.masked_fill(~compare(rows(x), keys(y)), -9.0), (queries, at))
    check(lambda s, x, y: s.masked_fill(~compare(rows(x) - 3, keys(y)), -9.0), (queries, at))


@pytest.mark.parametrize(
    ("text", "dtypes", "expected"),
    [
        ("j <= (i + 1024)", (), False),
        ("((i * 4096) + j) >= 0", (), False),
        ("(i * 1000000) <= j", (), True),
        ("(i * 300) <= j", (), False),
        ("(c0 + c1) <= 5", (torch.int64, torch.int64), False),
        ("(c0 * c1) <= 5", (torch.int64, torch.int64), True),
        ("(c0 * c1) <= 5", (torch.int8, torch.int16), False),
        ("(c0 * 3) <= 5", (torch.int32,), True),
        ("(float(c0) * 3.0) <= 5.0", (torch.int32,), False),
        ("(j % 7) == 5000000000", (), True),
    ],
)
def test_what_may_leave_32_bits(text: str, dtypes: tuple[torch.dtype, ...], expected: bool) -> None:
    assert may_overflow(parse(text), Domain(2, 3, 4096, 4096), dtypes) is expected


@pytest.mark.parametrize(
    ("text", "dtypes", "expected"),
    [
        ("c0 == 0", (torch.uint8,), False),
        ("c0 == c1", (torch.int8, torch.int8), False),
        ("c0 == c1", (torch.int8, torch.uint8), True),
        ("c0 <= 130", (torch.int8,), True),
        ("(c0 - c1) <= 3", (torch.int8, torch.int8), True),
        ("(float(c0) * 2.0) <= 3.0", (torch.int8,), False),
        ("c0 & c1", (torch.bool, torch.bool), False),
    ],
)
def test_which_captures_are_widened(text: str, dtypes: tuple[torch.dtype, ...], expected: bool) -> None:
    assert is_counted(parse(text), 0, dtypes) is expected
