"""Public test utilities: a float64 oracle, error budgets, graph assertions and adversarial inputs.

Users test their own passes and kernels with what fxopt tests its own with:

    eager, rewritten = evaluate(model, x), evaluate(fast, x)
    assert_within_budget(rewritten, eager, oracle_gradients(model, x))
    assert_operators(fxopt.capture(fast, (x,)), {"fxopt.attention": 2})
"""

from __future__ import annotations

from fxopt.testing.budget import UNIT_ROUNDOFF, ErrorReport, assert_within_budget, compare
from fxopt.testing.evaluation import Evaluation, evaluate, together
from fxopt.testing.graphs import assert_operators, count_operators
from fxopt.testing.inputs import DISTINCT, DISTRIBUTIONS, SIZE_COLLISIONS, Sizes, draw, padding_mask, row_mask
from fxopt.testing.oracle import DoublePrecision, double_precision, oracle, oracle_gradients, upcast

__all__ = [
    "DISTINCT",
    "DISTRIBUTIONS",
    "SIZE_COLLISIONS",
    "UNIT_ROUNDOFF",
    "DoublePrecision",
    "ErrorReport",
    "Evaluation",
    "Sizes",
    "assert_operators",
    "assert_within_budget",
    "compare",
    "count_operators",
    "double_precision",
    "draw",
    "evaluate",
    "oracle",
    "oracle_gradients",
    "padding_mask",
    "row_mask",
    "together",
    "upcast",
]
