"""Arithmetic in place becomes out of place where nobody can tell, and nowhere else."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from fxopt.errors import FxoptWarning
from fxopt.frontend.out_of_place import out_of_place

IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv}
Function = Callable[[Tensor, Tensor], Any]


def captured(function: Function, *inputs: Tensor) -> fx.GraphModule:
    """Dynamo's graph of ``function``."""
    found: list[fx.GraphModule] = []

    def keep(module: fx.GraphModule, _: object) -> Callable[..., Any]:
        found.append(module)
        return module.forward

    torch.compile(function, backend=keep, fullgraph=True)(*inputs)
    return found[0]


def edits(module: fx.GraphModule) -> int:
    return sum(node.target in IN_PLACE for node in module.graph.nodes)


def operands(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(4, 4, generator=generator) for _ in range(2))
    return x, y.to(dtype)


def sums(x: Tensor, y: Tensor) -> Tensor:
    scores = x @ y
    scores += y
    scores -= 2
    scores *= y
    scores /= 3.0
    return scores.softmax(-1)


def seen_by_a_view(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    scores = x @ y
    first = scores[0]
    scores += y
    return scores * 1, first * 1


def read_before(x: Tensor, y: Tensor) -> Tensor:
    scores = x @ y
    before = scores.exp()
    scores += y
    return before + scores


def view_of_an_input(x: Tensor, y: Tensor) -> Tensor:
    rows = x.view(2, 8)
    rows += 1
    return rows.view(4, 4) @ y


def the_input(x: Tensor, y: Tensor) -> Tensor:
    x += y
    return x * 2


def of_a_view(x: Tensor, y: Tensor) -> Tensor:
    scores = x @ y
    turned = scores.t()
    turned += y
    return scores * 1


def without_gradients(x: Tensor, y: Tensor) -> Tensor:
    scores = x @ y
    with torch.no_grad():
        scores += y
    return scores * 1


def already_out_of_place(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y + y).softmax(-1)


EDITS = [seen_by_a_view, read_before, view_of_an_input, the_input, of_a_view, without_gradients]


def test_edits_that_nobody_sees_are_gone() -> None:
    module = captured(sums, *operands())
    assert edits(module) == 4
    changed = out_of_place(module)
    assert edits(changed) == 0
    assert edits(module) == 4, "Dynamo's own graph is as it was"
    assert torch.equal(changed(*operands())[0], sums(*operands()))


def test_what_has_no_edits_is_not_copied() -> None:
    module = captured(already_out_of_place, *operands())
    assert out_of_place(module) is module


@pytest.mark.parametrize("function", EDITS)
def test_edits_that_somebody_may_see_stay(function: Function) -> None:
    module = captured(function, *operands())
    assert edits(module) == 1
    assert edits(out_of_place(module)) == 1


def test_edits_whose_result_would_be_wider_stay() -> None:
    def narrow(x: Tensor, y: Tensor) -> Tensor:
        scores = x.bfloat16() @ x.bfloat16()
        scores += y
        return scores

    module = captured(narrow, *operands())
    assert edits(out_of_place(module)) == 1
    assert torch.equal(torch.compile(narrow, backend="fxopt")(*operands()), narrow(*operands()))


@pytest.mark.parametrize("function", [sums, *EDITS])
def test_results_and_edits_of_inputs_are_those_of_the_model(function: Function) -> None:
    torch._dynamo.reset()
    given, own = operands(), operands()
    compiled = torch.compile(function, backend="fxopt", fullgraph=True, options={"strict": True, "base": "eager"})
    torch.testing.assert_close(compiled(*own), function(*given), rtol=0, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(given, own, strict=True))


def test_edits_without_gradients_leave_the_gradient_of_what_they_edit() -> None:
    """A functional form has none, so the graph is left alone."""
    (x, y), (own, _) = operands(), operands()
    torch._dynamo.reset()
    without_gradients(x.requires_grad_(), y).sum().backward()
    with pytest.warns(FxoptWarning, match="inside no_grad"):
        out = torch.compile(without_gradients, backend="fxopt", options={"base": "aot_eager"})(own.requires_grad_(), y)
    out.sum().backward()
    torch.testing.assert_close(own.grad, x.grad)
