"""Lowering of attention weights and statistics: candidates with reasons, and outputs from weights that are there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import Node

import fxopt.codegen.meanings  # noqa: F401 - canonical operators get their meaning
from fxopt import driver
from fxopt.errors import FxoptWarning
from fxopt.frontend.export import from_export
from fxopt.ir.decision import Decision
from fxopt.ir.operators import overload
from fxopt.ir.program import Program
from fxopt.lowering.attention import candidates
from fxopt.lowering.lower import lower
from fxopt.lowering.options import Options
from fxopt.testing import assert_within_budget, evaluate, oracle_gradients
from tests.attention.weight_readers import column_sums, grouped_and_returned, row_and_whole, row_without_gradient

OPERANDS = tuple(torch.randn(2, heads, 12, 16, requires_grad=True) for heads in (4, 2, 2))


def rewritten(function: Callable[..., object], operands: tuple[Tensor, ...] = OPERANDS) -> Program:
    return driver.rewrite(from_export(function, operands), Options(strict=True)).program


def site(program: Program, name: str) -> Node:
    found: list[Node] = list(program.graph.find_nodes(op="call_function", target=overload(name)))
    (node,) = found
    return node


def test_whole_weights_offer_themselves_for_the_output() -> None:
    program = rewritten(grouped_and_returned)
    found, _ = candidates(site(program, "attention"), training=False)
    assert [c.name for c in found][-2:] == ["weights", "aten"]
    found, refused = candidates(site(program, "attention_weights"), training=False)
    assert [c.name for c in found] == ["aten"]
    assert "CUDA" in refused["triton"] and "returns no weights" in refused["sdpa"]


@pytest.mark.parametrize("function", [column_sums, row_without_gradient])
def test_parts_of_the_weights_do_not(function: Callable[..., object]) -> None:
    operands = tuple(torch.randn(2, 4, 12, 16) for _ in range(3))
    found, _ = candidates(site(rewritten(function, operands), "attention"), training=False)
    assert "weights" not in [c.name for c in found]


def test_dropout_keeps_the_output_from_known_weights() -> None:
    def dropped(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        p = (q @ k.mT).softmax(-1)
        return torch.dropout(p, 0.5, True) @ v, p

    operands = tuple(torch.randn(2, 4, 12, 16) for _ in range(3))
    found, _ = candidates(site(rewritten(dropped, operands), "attention"), training=True)
    assert [c.name for c in found] == ["aten"]


@pytest.mark.parametrize("training", [False, True])
def test_output_from_known_weights_is_within_the_budget(training: bool) -> None:
    program = rewritten(grouped_and_returned)
    lowered, decisions = lower(program, training=training, option="aten")
    assert [d.chosen for d in decisions] == ["weights", "aten"]
    assert lowered.operators()["fxopt.attention_values"] == 1
    found = evaluate(lowered.module, *OPERANDS)
    assert_within_budget(
        found, evaluate(grouped_and_returned, *OPERANDS), oracle_gradients(grouped_and_returned, *OPERANDS)
    )


@pytest.mark.parametrize("training", [False, True])
def test_every_part_of_a_site_is_decided(training: bool) -> None:
    operands = tuple(x.detach().repeat_interleave(4 // x.shape[1], 1).requires_grad_() for x in OPERANDS)
    lowered, decisions = lower(rewritten(row_and_whole, operands), training=training)
    names: list[Decision] = list(decisions)
    assert [d.nodes[0].removesuffix("_default") for d in names] == ["attention", "attention_weights"]
    assert set(names[0].seconds) >= {"weights", "aten"}, "measured, the original's own way among the candidates"
    assert_within_budget(
        evaluate(lowered.module, *operands),
        evaluate(row_and_whole, *operands),
        oracle_gradients(row_and_whole, *operands),
    )


def test_a_forced_lowering_that_cannot_serve_weights_says_why() -> None:
    with pytest.warns(FxoptWarning, match="returns no weights"):
        lower(rewritten(grouped_and_returned), training=False, option="sdpa")
