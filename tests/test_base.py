"""The base compiler below fxopt: Inductor, without the attention patterns that accept other functions."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
from torch import Tensor

from fxopt.lowering.base import without_attention_patterns

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
    with without_attention_patterns():
        fewer = sum(map(len, joint_graph.patterns.patterns.values()))
    assert fewer < sum(map(len, before.values()))
    assert {key: list(entries) for key, entries in joint_graph.patterns.patterns.items()} == before
