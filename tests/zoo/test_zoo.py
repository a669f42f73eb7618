"""Every model of the zoo: what was rewritten and what was kept, and its outputs against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

import fxopt
from fxopt.testing import assert_within_budget, evaluate, oracle
from tests.golden import GoldenTable
from tests.zoo.models import ZOO, Zoo


def reasons(sites: list[Any]) -> str:
    """The reasons of what was kept, each once with how often it was given."""
    kept = [site.reason for site in sites if site.status == "kept"]
    return "; ".join(f"{kept.count(reason)}× {reason}" for reason in dict.fromkeys(kept))


# Dynamo itself instantiates the `torch.autograd.Function` of bloom's GELU.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("zoo", ZOO, ids=str)
@torch.no_grad()
def test_model_is_rewritten_as_expected_and_computes_the_same(zoo: Zoo, expected: GoldenTable) -> None:
    model, inputs = zoo.build()
    torch._dynamo.reset()
    report = fxopt.explain(model, **inputs)
    sites = [site for site in report.sites if site.kind == "attention"]

    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, backend="fxopt", options={"base": "eager"})
    eager, actual = evaluate(model, **inputs), evaluate(compiled, **inputs)
    breaks = sum(counters["graph_break"].values())
    errors = assert_within_budget(actual.outputs, eager.outputs, oracle(model, **inputs))

    observed = {
        "sites": str(len(sites)),
        "rewritten": str(report.count("attention")),
        "kept": str(report.count("attention", "kept")),
        "reasons": reasons(sites),
        "graph_breaks": str(breaks),
    }
    measured = {"max_error_ratio": f"{max(error.ratio for error in errors):.2f}"}
    expected.check((zoo.name, zoo.implementation), observed, measured)


def test_table_has_a_row_for_each_model_and_no_other(expected: GoldenTable) -> None:
    assert not expected.unplanned([(zoo.name, zoo.implementation) for zoo in ZOO])
