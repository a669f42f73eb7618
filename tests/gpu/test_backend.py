"""The backend on the GPU: forced and measured lowerings, training, and what the report says of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

import fxopt
from fxopt import backend
from fxopt.testing import assert_within_budget, evaluate, oracle, oracle_gradients

pytestmark = pytest.mark.gpu


class SelfAttention(nn.Module):
    """Causal self-attention with a relative bias, written out."""

    def __init__(self, width: int = 256, heads: int = 4, length: int = 192) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.bias = nn.Parameter(0.1 * torch.randn(heads, length, length))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        mask = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        scores = q @ k.transpose(-2, -1) * (width // self.heads) ** -0.5 + self.bias
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        result: Tensor = self.out((weights @ v).transpose(1, 2).reshape(batch, length, width))
        return result


def build(dtype: torch.dtype) -> tuple[SelfAttention, Tensor]:
    torch.manual_seed(0)
    return SelfAttention().to("cuda", dtype), torch.randn(2, 192, 256, device="cuda", dtype=dtype)


@pytest.mark.parametrize("lower", ["auto", "triton", "aten"])
@torch.no_grad()
def test_inference_within_budget_with_each_lowering(lower: str) -> None:
    model, x = build(torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="fxopt", options={"lower": lower, "strict": True})
    with backend.collecting() as (outcomes, failures):
        actual = compiled(x)
    assert not failures
    (decision,) = outcomes[0].decisions
    if lower != "auto":
        assert decision.chosen.startswith(lower)
    assert_within_budget(actual, model(x), oracle(model, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_within_budget(dtype: torch.dtype) -> None:
    model, x = build(dtype)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="fxopt", options={"lower": "triton", "strict": True})
    results = evaluate(compiled, x), evaluate(model, x), oracle_gradients(model, x)
    assert_within_budget(*results, floor=1.0)


class Windowed(nn.Module):
    """Self-attention of any length: causal, within a window, with capped scores."""

    def __init__(self, width: int = 256, heads: int = 4, window: int = 100) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        places = torch.arange(length, device=x.device)
        distance = places[:, None] - places
        scores = 5.0 * torch.tanh(q @ k.transpose(-2, -1) * 0.025)
        scores = scores.masked_fill((distance < 0) | (distance >= self.window), float("-inf"))
        result: Tensor = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, -1)
        return result


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("lower", ["auto", "triton"])
def test_one_graph_serves_lengths_that_change(lower: str, training: bool) -> None:
    torch.manual_seed(0)
    model = Windowed().to("cuda", torch.bfloat16)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="fxopt", dynamic=True, options={"lower": lower, "strict": True})
    with backend.collecting() as (outcomes, failures):
        for length in (192, 65, 700):
            x = torch.randn(2, length, 256, device="cuda", dtype=torch.bfloat16)
            if training:
                results = evaluate(compiled, x), evaluate(model, x), oracle_gradients(model, x)
                assert_within_budget(*results, floor=1.0)
                continue
            with torch.no_grad():
                assert_within_budget(compiled(x), model(x), oracle(model, x))
    assert not failures
    assert len(outcomes) == 1, "lengths must not be compiled for one by one"
    (decision,) = outcomes[0].decisions
    assert lower == "auto" or decision.chosen.startswith("triton")
    assert outcomes[0].report.sites[0].reason.endswith("mask: 0 <= i - j < 100")


def test_explain_names_the_kernel() -> None:
    model, x = build(torch.bfloat16)
    with torch.no_grad():
        report = fxopt.explain(model, x)
    assert report.count("attention") == 1
    assert any(name.startswith("triton") for decision in report.decisions for name in decision.seconds)
