"""fold-constants: one number in a tensor becomes a literal, unless that changes the result's dtype or the number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fxopt.frontend.export import from_export
from fxopt.passes import FoldConstants
from fxopt.rewriter.pipeline import PipelineResult, run_pipeline


def fold(function: Any, *inputs: Tensor) -> PipelineResult:
    return run_pipeline(from_export(function, inputs), [FoldConstants()], strict=True)


ONES = torch.ones(1)


@pytest.mark.parametrize("function", [lambda x: torch.add(x * 2, ONES, alpha=3), lambda x: torch.sub(x * 2, ONES)])
def test_arguments_that_have_a_name_alone_keep_it(function: Any) -> None:
    x = torch.randn(3, 4)
    result = fold(function, x)
    assert [record.failure for record in result.records] == [""]
    torch.testing.assert_close(result.program.module(x)[0], function(x))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x / torch.sqrt(torch.tensor(64.0)),
        lambda x: x * torch.full((), 0.5),
        lambda x: x.masked_fill(x > 0, torch.tensor(float("-inf"))),
        lambda x: torch.where(x > 0, x, torch.tensor(-1.0)),
    ],
)
def test_one_number_becomes_a_literal(function: Any) -> None:
    x = torch.randn(3, 4)
    result = fold(function, x)
    assert len(result.replacements) == 1
    placeholders = result.program.graph.find_nodes(op="placeholder")
    assert len(placeholders) == 1, "nothing but the input is left to read"
    torch.testing.assert_close(result.program.module(x)[0], function(x))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * torch.tensor([0.5, 0.25, 1.0, 2.0]),
        lambda x: x.long() * torch.tensor([0.5]),
        lambda x: x * x.sum(),
    ],
)
def test_what_is_not_one_number_of_the_same_result_stays(function: Any) -> None:
    x = torch.randn(3, 4)
    result = fold(function, x)
    assert torch.equal(result.program.module(x)[0], function(x))
    assert result.program.module(x)[0].dtype == function(x).dtype
    if result.replacements:
        assert result.replacements[0].operator == "aten.mul"
