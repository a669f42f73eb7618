"""The pass `silu`: SiLU in every order of its factors, and functions that are not SiLU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fxopt.passes.canonical.silu import Silu
from tests.canonical.support import DTYPES, assert_fires, assert_kept, random, rewrite

SPELLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "x first": lambda x: x * torch.sigmoid(x),
    "x last": lambda x: x.sigmoid() * x,
    "expit": lambda x: x * torch.special.expit(x),
    "quotient": lambda x: x / (1 + torch.exp(-x)),
    "reciprocal": lambda x: x * (1 / (torch.exp(-x) + 1.0)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SPELLINGS)
def test_silu_fires(name: str, dtype: torch.dtype) -> None:
    args = (random(3, 50, dtype=dtype, scale=3),)
    counts = {"aten.silu": 1, "aten.sigmoid": 0, "aten.exp": 0, "aten.mul": 0}
    # The derivative σ·(1 + x·(1 - σ)) has terms as large as x, up to about 9, that a quotient's does not have.
    assert_fires(SPELLINGS[name], args, Silu(), counts, terms=9)


def test_silu_fires_where_x_is_itself_a_product() -> None:
    def of_product(x: Tensor, y: Tensor) -> Tensor:
        z = x * y
        return z * z.sigmoid()

    assert_fires(of_product, (random(3, 5), random(3, 5, seed=1)), Silu(), {"aten.silu": 1, "aten.mul": 1})


def test_silu_fires_on_dynamic_shapes() -> None:
    result = rewrite(SPELLINGS["quotient"], (random(3, 5),), Silu(), ({0: torch.export.Dim("rows", min=2)},))
    assert len(result.replacements) == 1
    x = random(7, 5, seed=1)
    torch.testing.assert_close(result.program.module(x)[0], SPELLINGS["quotient"](x))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x * torch.sigmoid(1.702 * x), "that of 1.702 * x"),
        (lambda x: 2 * x * torch.sigmoid(x), "multiplied by 2.0"),
        (lambda x: x / (2 + torch.exp(-x)), "the denominator is 2.0 + exp(-x)"),
        (lambda x: x / (1 + torch.exp(x)), "that of -1.0 * x"),
    ],
)
def test_silu_rejects(function: Callable[[Tensor], Tensor], reason: str) -> None:
    assert_kept(function, (random(3, 50),), Silu(), reason)


def test_silu_does_not_match_a_gate() -> None:
    assert not rewrite(lambda x: x * torch.sigmoid(x.flip(0)), (random(3, 5),), Silu()).replacements
