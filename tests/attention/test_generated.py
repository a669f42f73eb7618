"""Composed spellings nobody wrote down: always one attention, always the same numbers."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, example, given, settings

import fxopt
from fxopt.testing import Sizes, assert_within_budget, evaluate, oracle_gradients
from tests.attention.check import compiled
from tests.attention.generated import RECIPES, SIZES, Composed, Recipe, inputs

EXAMPLES = 40
AS_SEEN = Recipe("matmul", "twice", "both", "bias and causal", "log", "expand", "sbhd", "transpose", torch.float32)
MERGED = Recipe("bmm", "mT", "after", "bias", "float", "expand", "bshd", "contiguous", torch.float32)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(recipe=RECIPES, sizes=SIZES)
@example(recipe=AS_SEEN, sizes=Sizes(B=2, H=2, G=2, S=2, T=2, D=2, E=2))
@example(recipe=MERGED, sizes=Sizes(B=2, H=6, G=3, S=4, T=4, D=4, E=4))
def test_a_composed_spelling_is_one_attention_with_the_same_numbers(recipe: Recipe, sizes: Sizes) -> None:
    torch._dynamo.reset()
    module, args = Composed(recipe), inputs(recipe, sizes)
    for position in range(3):
        args[position].requires_grad_()
    report = fxopt.explain(module, *args)
    assert report.count("attention") == 1, [site.reason for site in report.sites]
    assert report.count("attention", "kept") == 0
    actual = evaluate(compiled(module, dynamic=False), *args)
    assert_within_budget(actual, evaluate(module, *args), oracle_gradients(module, *args), floor=1.0)
