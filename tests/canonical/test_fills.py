"""The pass `fills`: tensors of one number made of sizes, whatever they were made after the likeness of."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import fxopt
from fxopt.passes.canonical.fills import Fills
from fxopt.testing import assert_operators
from tests.canonical.support import assert_same, capture, random, rewrite

FILLED: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros_like": torch.zeros_like,
    "ones_like": lambda x: torch.ones_like(x, dtype=torch.float64).float(),
    "full_like": lambda x: torch.full_like(x, 2.5),
    "new_zeros": lambda x: x.new_zeros(x.shape[-2:]),
    "new_ones": lambda x: x.new_ones((1, x.shape[-1])),
    "new_full": lambda x: x.new_full(x.shape, -3),
    "fill": lambda x: torch.fill(x, 4.0),
}


@pytest.mark.parametrize("name", FILLED)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_fills_fire(name: str, dynamic: bool) -> None:
    def function(x: Tensor) -> Tensor:
        y = x * 2
        return y + FILLED[name](y)

    shapes = ({0: Dim("a", min=2, max=64), 1: Dim("b", min=2, max=64)},) if dynamic else None
    result = rewrite(function, (random(3, 5),), Fills(), shapes)
    assert_operators(result.program.module, {"aten.full": 1, f"aten.{name}": 0})
    for args in ((random(3, 5),), (random(7, 4, seed=1),)) if dynamic else ((random(3, 5),),):
        assert_same(lambda x: result.program.module(x)[0], function, args)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.zeros_like(x) + x,
        lambda x: torch.zeros_like((x * 2).transpose(0, 1)) + 1,
        lambda x: torch.rand_like(x * 2),
        lambda x: torch.empty_like(x * 2).sin(),
        lambda x: torch.zeros_like((x * 2)[..., None].expand(3, 5, 2**21)),
    ],
    ids=["of an input", "in another memory order", "random numbers", "no number", "large"],
)
def test_others_stay(function: Callable[[Tensor], Tensor]) -> None:
    assert not Fills().run(capture(function, (random(3, 5),))).modified


def test_a_frozen_program_keeps_what_moves_with_it() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            return torch.where(y > 0, y, torch.zeros_like(y))

    rewritten = fxopt.rewrite(Halves().eval(), (random(3, 5),)).freeze().double()
    assert rewritten(random(3, 5).double()).dtype is torch.float64


def test_sizes_that_are_no_sizes_of_inputs_stay() -> None:
    def function(x: Tensor) -> Tensor:
        return torch.zeros_like(torch.cat([x, x]))

    assert not Fills().run(capture(function, (random(3, 5),), ({0: Dim("a", min=2, max=64)},))).modified


MASKED: dict[str, Callable[[Tensor], Tensor]] = {
    "ones_like": lambda s: s.masked_fill(torch.ones_like(s).tril() == 0, -torch.inf),
    "truth": lambda s: s.masked_fill(torch.ones_like(s, dtype=torch.bool).triu(1), -torch.inf),
    "full_like": lambda s: s + torch.full_like(s, -torch.inf).triu(1),
    "where": lambda s: torch.where(torch.ones(s.shape[-2:]).tril() > 0, s, torch.full_like(s, -torch.inf)),
}


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_mask_made_after_the_likeness_of_scores_is_proved(name: str, dynamic: bool) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(MASKED[name](q @ k.transpose(-2, -1)), -1) @ v

    with torch._dynamo.config.patch(assume_static_by_default=not dynamic):
        (site,) = fxopt.explain(attention, *(random(2, 3, 5, 4, seed=seed) for seed in range(3))).sites
    assert site.status == "rewritten" and site.reason.endswith("mask: j <= i")
