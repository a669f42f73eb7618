"""Every model of the zoo: what was rewritten and what was kept, and its outputs against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

from fxopt.testing import assert_within_budget, evaluate, oracle, together
from tests.golden import GoldenTable
from tests.watched import Watched
from tests.zoo.models import ZOO, Zoo

DRAWS = 4  # inputs of each model: some results are four numbers


def reasons(sites: list[Any]) -> str:
    """The reasons of what was kept, each once with how often it was given."""
    kept = [site.reason for site in sites if site.status == "kept"]
    return "; ".join(f"{kept.count(reason)}× {reason}" for reason in dict.fromkeys(kept))


# Dynamo itself instantiates the `torch.autograd.Function` of bloom's GELU.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("zoo", ZOO, ids=str)
@torch.no_grad()
def test_model_is_rewritten_as_expected_and_computes_the_same(zoo: Zoo, expected: GoldenTable) -> None:
    model, _ = zoo.build()
    torch._dynamo.reset()
    counters.clear()
    compiled = Watched(torch.compile(model, backend="fxopt", options={"base": "eager"}))
    draws = [zoo.inputs(draw) for draw in range(DRAWS)]
    # Eager first: transformers installs hooks in a model's first call that is asked for weights, under a lock.
    eager, actual, exact = (together([run(f, **x) for x in draws]) for run, f in (
        (evaluate, model), (evaluate, compiled), (oracle, model),
    ))  # fmt: skip
    report, breaks = compiled.report, sum(counters["graph_break"].values())
    assert report is not None
    sites = [site for site in report.sites if site.kind == "attention"]
    errors = assert_within_budget(actual.outputs, eager.outputs, exact)

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
