"""Attentions whose log-sum-exp is read, by generated kernels: results and gradients of both."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch._dynamo
from torch import Tensor

from fxopt import backend
from fxopt.testing import assert_within_budget, draw, evaluate, oracle_gradients

pytestmark = pytest.mark.gpu

Function = Callable[..., tuple[Tensor, Tensor]]


def both(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return torch.softmax(x, -1, dtype=torch.float32).to(v.dtype) @ v, x.float().logsumexp(-1)


def plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return both(q @ k.mT * 0.125, v)


def causal(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    x = q @ k.mT * 0.125
    keep = torch.ones(x.shape[-2:], dtype=torch.bool, device=q.device).tril()
    return both(x.masked_fill(~keep, float("-inf")), v)


def biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return both(q @ k.mT * 0.125 + bias + 2.0, v)


def loss(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of the log-sum-exp is one number for all rows, broadcast."""
    out, lse = plain(q, k, v, bias)
    return out, lse.sum() * 0.01


def operands(queries: int, keys: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    sizes = ((2, 4, queries, 64), (2, 4, keys, 64), (2, 4, keys, 64), (4, 1, keys))
    made = (draw(size, dtype=dtype, device="cuda", seed=seed) for seed, size in enumerate(sizes))
    return tuple(x.requires_grad_() for x in made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lower", ["auto", "triton", "aten"])
@pytest.mark.parametrize("function", [plain, causal, biased, loss])
def test_training_within_budget(function: Function, lower: str, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    inputs = operands(192, 192, dtype)
    compiled = torch.compile(function, backend="fxopt", options={"lower": lower, "strict": True})
    with backend.collecting() as (outcomes, failures):
        actual = [evaluate(compiled, *inputs) for _ in range(2)]
    (decision,) = outcomes[0].decisions
    assert not failures and (lower == "auto" or decision.chosen.startswith(lower))
    for run in actual:
        assert_within_budget(run, evaluate(function, *inputs), oracle_gradients(function, *inputs), floor=1.0)


@pytest.mark.parametrize(("queries", "keys"), [(1, 4096), (49, 49), (197, 197), (1024, 1024), (300, 2100)])
@pytest.mark.parametrize("lower", ["auto", "triton"])
@torch.no_grad()
def test_inference_within_budget(lower: str, queries: int, keys: int) -> None:
    torch._dynamo.reset()
    inputs = tuple(x.detach() for x in operands(queries, keys, torch.bfloat16))
    compiled = torch.compile(plain, backend="fxopt", options={"lower": lower, "strict": True})
    assert_within_budget(evaluate(compiled, *inputs), evaluate(plain, *inputs), oracle_gradients(plain, *inputs))
