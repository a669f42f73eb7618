"""The pass `synonyms`: second names of operators, and moves of axes in other words."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fxopt
from fxopt.passes.canonical.synonyms import Synonyms
from tests.canonical.support import assert_fires, capture, random, rewrite

Function = Callable[[Tensor, Tensor], Tensor]

SPELLINGS: dict[str, tuple[Function, str]] = {
    "multiply": (torch.multiply, "aten.mul"),
    "divide": (torch.divide, "aten.div"),
    "true_divide": (torch.true_divide, "aten.div"),
    "subtract": (lambda x, y: torch.subtract(x, y, alpha=2), "aten.sub"),
    "negative": (lambda x, y: torch.negative(x), "aten.neg"),
    "absolute": (lambda x, y: torch.absolute(x), "aten.abs"),
    "clip": (lambda x, y: torch.clip(x, -1, 1), "aten.clamp"),
    "clip by tensors": (lambda x, y: torch.clip(x, y, y + 1), "aten.clamp"),
    "clamp_min": (lambda x, y: torch.clamp_min(x, 0.5), "aten.clamp"),
    "clamp_max": (lambda x, y: torch.clamp_max(x, 0.5), "aten.clamp"),
    "max": (torch.max, "aten.maximum"),
    "min": (torch.min, "aten.minimum"),
    "expit": (lambda x, y: torch.special.expit(x), "aten.sigmoid"),
    "concat": (lambda x, y: torch.concat([x, y], -1), "aten.cat"),
    "concatenate": (lambda x, y: torch.concatenate([x, y], 1), "aten.cat"),
    "linalg.matmul": (lambda x, y: torch.linalg.matmul(x, y.transpose(-2, -1)), "aten.matmul"),
    "swapaxes": (lambda x, y: x.swapaxes(-1, -2) * 2, "aten.transpose"),
    "swapdims": (lambda x, y: x.swapdims(0, 2) * 2, "aten.transpose"),
    "movedim": (lambda x, y: x.movedim(0, -1) * 2, "aten.permute"),
    "movedim of two": (lambda x, y: x.movedim((0, 1), (2, 0)) * 2, "aten.permute"),
    "moveaxis": (lambda x, y: x.moveaxis(-1, 0) * 2, "aten.permute"),
    "mH": (lambda x, y: x.mH * 2, "aten.transpose"),
    "adjoint": (lambda x, y: x.adjoint() * 2, "aten.transpose"),
    "T": (lambda x, y: x[0].T * 2, "aten.permute"),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_synonyms_fire(name: str) -> None:
    function, operator = SPELLINGS[name]
    assert_fires(function, (random(2, 3, 4), random(2, 3, 4, seed=1)), Synonyms(), {operator: 1})


@pytest.mark.parametrize("name", ["greater", "greater_equal", "less", "less_equal", "not_equal"])
def test_comparisons_have_one_name(name: str) -> None:
    x, y = random(3, 4), random(3, 4, seed=1)
    result = rewrite(getattr(torch, name), (x, y), Synonyms())
    assert len(result.replacements) == 1
    assert torch.equal(result.program.module(x, y)[0], getattr(torch, name)(x, y))


def test_a_conjugate_stays() -> None:
    program = capture(lambda x: x.mH * 2, (torch.randn(3, 4, dtype=torch.complex64),))
    assert not Synonyms().run(program).modified


def test_attention_in_other_words_is_attention() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keep = torch.greater_equal(torch.arange(5)[:, None], torch.arange(5))
        scores = torch.divide(q @ k.swapaxes(-1, -2), 2.0)
        return torch.softmax(torch.where(keep, scores, -torch.inf), -1) @ v

    (site,) = fxopt.explain(attention, *(random(2, 3, 5, 4, seed=seed) for seed in range(3))).sites
    assert site.status == "rewritten" and site.reason.endswith("mask: j <= i")


def test_an_einsum_with_keys_first_is_attention() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.softmax(torch.einsum("bhjd,bhid->bhij", k, q), -1)
        return torch.einsum("bhjd,bhij->bhid", v, weights)

    report = fxopt.explain(attention, *(random(2, 3, 5, 4, seed=seed) for seed in range(3)))
    assert report.count("attention", "rewritten") == 1
