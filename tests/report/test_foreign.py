"""An operator of a library's own hides no attention from the report."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import fxopt
from fxopt.testing import draw

Function = Callable[[Tensor, Tensor, Tensor], Tensor]


@pytest.fixture
def library() -> Iterator[None]:
    with torch.library._scoped_library("fxopt_foreign", "DEF") as library:
        library.define("shift(Tensor x) -> Tensor")
        library.impl("shift", lambda x: x + 1, "CompositeExplicitAutograd")
        torch.library.register_fake("fxopt_foreign::shift", torch.empty_like, lib=library)
        yield


def shifted_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(torch.ops.fxopt_foreign.shift(q @ k.transpose(-2, -1)), -1) @ v


def shifted_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights: Tensor = torch.ops.fxopt_foreign.shift(torch.softmax(q @ k.transpose(-2, -1), -1))
    return weights @ v


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (shifted_scores, "it stops at fxopt_foreign::shift"),
        (shifted_weights, "shift between the softmax and the values"),
    ],
)
def test_attention_around_a_foreign_operator_is_listed(function: Function, reason: str) -> None:
    (site,) = fxopt.explain(function, *(draw((2, 3, 5, 4), seed=seed) for seed in range(3))).sites
    assert site.status == "kept" and reason in site.reason
