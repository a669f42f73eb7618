"""A tiny BERT trained with active dropout through the backend: step by step what eager does with the same draws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

from fxopt import backend
from tests.zoo.models import ZOO

STEPS = 4


def losses(model: nn.Module, run: Any, inputs: dict[str, Tensor]) -> list[float]:
    """The losses of a few steps of training from a fixed state of the generator."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    torch.manual_seed(1)
    found = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = run(**inputs).last_hidden_state[..., 0].square().mean()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize("zoo", [z for z in ZOO if z.name in ("bert", "bert_padded")], ids=str)
def test_training_with_dropout_is_what_eager_does(zoo: Any) -> None:
    model, inputs = zoo.build()
    eager, _ = zoo.build()
    expected = losses(eager.train(), eager, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(model.train(), backend="fxopt", options={"base": "eager", "strict": True})
    with backend.collecting() as (outcomes, failures):
        found = losses(model, compiled, inputs)
    assert not failures
    specs = [str(n.args[4]) for n in outcomes[0].result.program.graph.nodes if "fxopt.attention" in str(n.target)]
    assert len(specs) == 2 and all("dropout=0.1" in spec for spec in specs)
    assert {d.chosen for d in outcomes[0].decisions} == {"aten"}
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert found[-1] < found[0]


def test_training_with_dropout_through_inductor() -> None:
    """Other numbers are drawn there, by the same generator: the same for the same seed, and training goes on."""
    zoo = next(z for z in ZOO if z.name == "bert")
    torch._dynamo.reset()
    runs = []
    for _ in range(2):
        model, inputs = zoo.build()
        torch._dynamo.reset()
        runs.append(losses(model, torch.compile(model.train(), backend="fxopt", options={"strict": True}), inputs))
    assert runs[0] == runs[1] and runs[0][-1] < runs[0][0]
