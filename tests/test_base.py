"""The base compiler below fxopt: Inductor, without the attention patterns that accept other functions."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._inductor.compile_fx
from torch import Tensor, nn

from fxopt.driver import garbage_waits
from fxopt.lowering.base import _decompositions, without_attention_patterns

pytestmark = pytest.mark.filterwarnings("ignore")


def softmax_over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) / 4.0).softmax(-2) @ v


def test_a_kept_site_stays_what_it_is_under_inductor() -> None:
    """Inductor 2.13 rewrites a softmax over queries to attention and returns other numbers."""
    q, k, v = (torch.randn(2, 2, 16, 16) for _ in range(3))
    torch._dynamo.reset()
    actual = torch.compile(softmax_over_queries, backend="fxopt")(q, k, v)
    torch.testing.assert_close(actual, softmax_over_queries(q, k, v))


def test_the_patterns_are_back_afterwards() -> None:
    from torch._inductor.fx_passes import joint_graph

    joint_graph.lazy_init()
    before = {key: list(entries) for key, entries in joint_graph.patterns.patterns.items()}
    with without_attention_patterns() as take_away:
        take_away()
        take_away()
        fewer = sum(map(len, joint_graph.patterns.patterns.values()))
    assert fewer < sum(map(len, before.values()))
    assert {key: list(entries) for key, entries in joint_graph.patterns.patterns.items()} == before


def test_one_table_of_decompositions_serves_all_compilations() -> None:
    """PyTorch keeps what it traces by a table as long as it lives."""
    assert _decompositions(False) is _decompositions(False)


_LAUNCHED = """
import fxopt.lowering.lower
from fxopt.lowering.base import _decompositions
print(*(operator for operator, by in _decompositions(False).items() if str(by).startswith("fxopt.")))
"""


def test_every_operator_with_a_launch_is_replaced_after_autograd() -> None:
    """In a process that lowers its first graph: the table is made once, so all must be there by then."""
    command = [sys.executable, "-W", "ignore", "-c", _LAUNCHED]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    kinds = (
        "attention_and_weights_forward", "attention_backward", "attention_forward", "attention_packed_backward",
        "linear_attention_forward", "mlp_forward", "residual_norm_backward", "residual_norm_forward",
    )  # fmt: skip
    assert sorted(found) == [f"fxopt.{kind}.default" for kind in kinds]


def test_pauses_of_the_collector_in_two_threads_leave_it_as_it_was() -> None:
    both, either = threading.Barrier(2), threading.Event()

    def pause(first: bool) -> None:
        with garbage_waits():
            both.wait(10)
            assert not gc.isenabled()
            if not first:
                either.wait(10)
        if first:
            either.set()

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(pause, (True, False)))
    assert gc.isenabled()


class Masked(nn.Module):
    """Attention with a mask that depends on no input, a parameter that is used twice, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(16, 16), nn.LayerNorm(16)
        self.last = nn.Linear(16, 16)
        self.last.weight = self.first.weight
        self.register_buffer("shift", torch.randn(16))

    def forward(self, x_BSC: Tensor) -> Tensor:
        x_BSC = self.norm(self.first(x_BSC)) + self.shift
        scores_BST = x_BSC @ x_BSC.transpose(1, 2) / 4.0
        hidden_ST = torch.tensor([[0.0, -torch.inf, 0.0], [0.0, 0.0, 0.0], [-torch.inf, 0.0, 0.0]])
        output_BSC: Tensor = self.last((scores_BST + hidden_ST).softmax(-1) @ x_BSC)
        return output_BSC


@pytest.mark.parametrize("trained", [False, True])
def test_parameters_are_known_to_stay_where_they_are(monkeypatch: pytest.MonkeyPatch, trained: bool) -> None:
    """CUDA graphs copy every other input at every call."""
    compile_inner = torch._inductor.compile_fx._compile_fx_inner
    moving: list[int] = []

    def inner(graph: Any, inputs: Any, **options: Any) -> Any:
        moving.append(len(inputs) - len(options["static_input_idxs"]))
        return compile_inner(graph, inputs, **options)

    monkeypatch.setattr(torch._inductor.compile_fx, "_compile_fx_inner", inner)
    torch._dynamo.reset()
    model, x = Masked().train(trained), torch.randn(2, 3, 16)
    with torch._inductor.config.patch(force_disable_caches=True), torch.set_grad_enabled(trained):
        actual = torch.compile(model, backend="fxopt", options={"strict": True})(x)
    torch.testing.assert_close(actual, model(x))
    assert moving[0] == 1, "x alone"
