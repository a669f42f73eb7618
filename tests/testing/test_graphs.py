from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fxopt.ir.program import Program
from fxopt.testing import assert_operators, count_operators


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT, -1) @ v


@pytest.fixture
def graph() -> torch.fx.GraphModule:
    traced = make_fx(attention, pre_dispatch=True)(*(torch.ones(2, 3, 4) for _ in range(3)))
    assert isinstance(traced, torch.fx.GraphModule)
    return traced


def test_counts_overloads_and_packets(graph: torch.fx.GraphModule) -> None:
    assert_operators(graph, {"aten.softmax.int": 1, "aten.matmul.default": 2, "aten.matmul": 2, "aten.exp": 0})
    assert_operators(graph.graph, {"aten.softmax": 1})


def test_a_wrong_count_says_what_is_there(graph: torch.fx.GraphModule) -> None:
    with pytest.raises(
        AssertionError, match=r"(?s)aten\.exp: expected 1, found 0.*it holds .*aten\.matmul\.default ×2"
    ):
        assert_operators(graph, {"aten.exp": 1})


def test_a_prefix_of_a_name_is_not_the_name(graph: torch.fx.GraphModule) -> None:
    assert_operators(graph, {"aten.soft": 0, "aten": 0})


def test_counts_functions_methods_and_nested_graphs() -> None:
    inner = torch.fx.symbolic_trace(lambda x: torch.relu(x).view(-1))
    graph = torch.fx.Graph()
    graph.output(graph.call_module("inner", (graph.placeholder("x"),)))
    counts = count_operators(torch.fx.GraphModule({"inner": inner}, graph))
    assert counts["Tensor.view"] == 1
    assert sum(counts.values()) == 2


def test_counts_exported_programs() -> None:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.relu()

    assert_operators(torch.export.export(Module(), (torch.ones(2),)), {"aten.relu": 1})


def test_rejects_what_has_no_graph() -> None:
    with pytest.raises(TypeError, match="not int"):
        count_operators(3)


def test_counts_the_programs_of_fxopt(graph: torch.fx.GraphModule) -> None:
    assert_operators(Program(graph, "dynamo"), {"aten.softmax": 1, "aten.matmul": 2})
