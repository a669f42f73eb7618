"""Calls that repeat are traced once; the graph is the one that tracing every call gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxopt.errors import CaptureError
from fxopt.frontend import retrace as frontend
from fxopt.frontend.dynamo import from_dynamo
from fxopt.frontend.repeated import RepeatedCalls
from fxopt.frontend.switches import Switching

Function = Callable[..., Any]


def _graph(function: Function, *inputs: Tensor, dynamic: bool = False) -> tuple[list[Any], int]:
    """The dialect's graph of ``function`` as data, and how many calls of Dynamo's graph were run for it."""
    found: list[list[Any]] = []

    def backend(module: fx.GraphModule, given: list[Any]) -> Function:
        found.append([_described(node) for node in from_dynamo(module, given).graph.nodes])
        return module.forward

    runs: list[fx.Node] = []
    plain = fx.Interpreter.run_node

    def counted(self: fx.Interpreter, n: fx.Node) -> Any:
        runs.append(n)
        return plain(self, n)

    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fx.Interpreter, "run_node", counted)
        torch.compile(function, backend=backend, dynamic=dynamic)(*inputs)
    assert len(found) == 1
    return found[0], sum(node.op in ("call_function", "call_method") for node in runs)


def _described(node: fx.Node) -> Any:
    values: list[Any] = []
    torch.utils._pytree.tree_map_(values.append, node.meta.get("val"))
    facts = [(x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else type(x) for x in values]
    origin = (node.meta.get("stack_trace"), str(node.meta.get("nn_module_stack"))) if node.op == "call_function" else ()
    return node.name, str(node.target), str(node.args), str(node.kwargs), str(facts), origin


def _both(function: Function, *inputs: Tensor, dynamic: bool = False) -> tuple[int, int]:
    """The calls run with and without repeating; the graphs must not differ in anything."""
    graph, runs = _graph(function, *inputs, dynamic=dynamic)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frontend, "RepeatedCalls", Switching)
        expected, all_runs = _graph(function, *inputs, dynamic=dynamic)
    assert graph == expected
    return runs, all_runs


class _Layers(nn.Module):
    """Layers alike, with results in tuples, tensors given back as they were, and dropout."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(count))
        self.up = nn.ModuleList(nn.Linear(16, 32) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for layer, up in zip(self.layers, self.up, strict=True):
            gate, value = up(layer(x).contiguous()).chunk(2, dim=-1)
            x = x + gate.sigmoid() * value.to(torch.float32)
        return x


@pytest.mark.parametrize("training", [False, True])
def test_a_model_of_six_layers_runs_the_calls_of_two(training: bool) -> None:
    model, x = _Layers(6).train(training), torch.randn(2, 5, 16)
    with torch.set_grad_enabled(training):
        runs, all_runs = _both(model, x)
        of_two = _both(_Layers(2).train(training), x)[1]
    # With gradients the first layer differs from the others: its input needs none.
    assert runs <= of_two < all_runs


def test_operands_that_differ_in_anything_a_call_may_ask_are_run_each() -> None:
    def function(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        views = (x, x[:, :3], x.t(), x.double(), x.unsqueeze(0), y)
        return tuple(v.sum(-1) for v in views)

    x = torch.randn(4, 4)
    runs, all_runs = _both(function, x, torch.randn(4, 4, requires_grad=True))
    assert runs == all_runs


def test_constants_are_told_apart_by_type_and_sign() -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        return x + 0.0, x + -0.0, x + 0, x + False, x * 1, x * True, x * 1.0

    runs, all_runs = _both(function, torch.randn(3, 3))
    assert runs == all_runs


def test_one_operand_twice_is_not_two_operands() -> None:
    def function(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return torch.mul(x, y), torch.mul(x, x), torch.mul(y, x), torch.mul(y, y)

    runs, all_runs = _both(function, torch.randn(3), torch.randn(3))
    assert (runs, all_runs) == (2, 4)


def test_a_switch_of_gradients_or_autocast_ends_what_is_known() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        first = F.linear(x, w)
        with torch.no_grad():
            second = F.linear(x, w)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            third = F.linear(x, w)
        return first + second + third + F.linear(x, w)

    _both(function, torch.randn(3, 4), torch.randn(4, 4, requires_grad=True))


def test_random_draws_are_written_each() -> None:
    def function(x: Tensor) -> Tensor:
        return F.dropout(x) + F.dropout(x) + torch.rand(3) + torch.rand(3)

    graph, _ = _graph(function, torch.randn(3))
    targets = [target for _, target, *_ in graph]
    assert (targets.count("aten.dropout.default"), targets.count("aten.rand.default")) == (2, 2)
    _both(function, torch.randn(3))


def test_gradients_computed_inside_of_a_graph_leave_it_alone() -> None:
    def function(x: Tensor) -> Tensor:
        (first,) = torch.autograd.grad((x * x).sum(), x, retain_graph=True)
        (second,) = torch.autograd.grad(x.exp().sum(), x, retain_graph=True)
        return first + second

    graph = fx.Graph()
    x = graph.placeholder("x")
    total = graph.call_function(torch.sum, (x,))
    graph.output(graph.call_function(torch.autograd.grad, (total, x)))
    module, given = fx.GraphModule(nn.Module(), graph), torch.randn(3, requires_grad=True)
    with pytest.raises(CaptureError, match="computes gradients inside"):
        frontend.retrace(module, (given,), None)
    torch._dynamo.reset()
    found = torch.compile(function, backend="fxopt", options={"base": "aot_eager"})(given)
    torch.testing.assert_close(found, function(given))


def test_symbolic_sizes_are_run() -> None:
    def function(x: Tensor) -> Tensor:
        for _ in range(3):
            x = x.reshape(x.shape[0] * x.shape[1]).view(x.shape).exp()
        return x

    runs, all_runs = _both(function, torch.randn(5, 7), dynamic=True)
    assert runs == all_runs


def test_a_hidden_edit_in_place_is_made_functional() -> None:
    def function(x: Tensor) -> Tensor:
        y, z = x.exp(), (x + 1).exp()
        return F.relu(y, inplace=True) + F.relu(z, inplace=True) + y + z

    graph, _ = _graph(function, torch.randn(3))
    assert not any(target.rpartition(".")[0].endswith("_") for _, target, *_ in graph)
    _both(function, torch.randn(3))


def test_a_constant_made_in_the_graph_is_no_edit(monkeypatch: pytest.MonkeyPatch) -> None:
    """As masks are made: ``torch.where(mask, torch.tensor(0.0), lowest)``."""

    def function(x: Tensor) -> Tensor:
        return torch.where(x > 0, torch.tensor(0.0), x) + torch.tensor([1.0, 2.0, 3.0])

    monkeypatch.setattr(frontend, "_functionalised", lambda _: pytest.fail("traced twice"))
    graph, _ = _graph(function, torch.randn(3))
    assert not any("detach" in target for _, target, *_ in graph)
    _agrees(function)


def test_an_edit_of_a_constant_made_in_the_graph_is_made_functional() -> None:
    def function(x: Tensor) -> Tensor:
        constant = torch.tensor([-1.0, 2.0, 3.0])
        return F.relu(constant, inplace=True) + constant + x.exp()

    graph, _ = _graph(function, torch.randn(3))
    assert not any(target.rpartition(".")[0].endswith("_") for _, target, *_ in graph)
    _agrees(function)


def test_detaching_in_place_what_has_a_gradient_stays() -> None:
    def function(x: Tensor) -> Tensor:
        return x.exp().detach_() * x

    _agrees(function)


def _agrees(function: Function) -> None:
    """Values, and gradients, are the function's own, call after call."""
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="fxopt", options={"base": "aot_eager", "strict": True})
    for _ in range(2):
        x = torch.randn(3, requires_grad=True)
        expected, found = function(x), compiled(x)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(*(torch.autograd.grad(result.sum(), x) for result in (found, expected)))


def test_outside_of_a_trace_there_is_nothing_to_repeat() -> None:
    module = fx.symbolic_trace(nn.Linear(2, 2))
    with pytest.raises(AssertionError, match="outside of a trace"):
        RepeatedCalls(module)
