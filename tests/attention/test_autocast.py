"""Autocast switched inside of a graph: results have the dtype that it gives them, and attention is found."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fxopt
from fxopt.errors import FxoptWarning
from fxopt.testing import assert_within_budget, draw
from tests.attention.case import FunctionModule
from tests.attention.check import compiled

Program = Callable[..., Tensor]


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-2, -1) * 0.5, -1) @ v


def einsums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax(torch.einsum("bhid,bhjd->bhij", q, k), -1)
    return torch.einsum("bhij,bhjd->bhid", weights, v)


def mixed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.bfloat16().transpose(-2, -1), -1) @ v.bfloat16()


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k.bfloat16(), v, is_causal=True)


def inside(program: Program) -> Program:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return program(q, k, v)

    return run


def left_before_the_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = q @ k.bfloat16().transpose(-2, -1)
    return torch.softmax(scores, -1).float() @ v


def switched_off(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        return attention(q, k, v)


PROGRAMS = {
    "attention": inside(attention), "einsums": inside(einsums), "mixed": inside(mixed), "sdpa": inside(sdpa),
    "left before the softmax": left_before_the_softmax, "switched off": switched_off,
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_results_are_those_of_autocast(name: str) -> None:
    torch._dynamo.reset()
    program, args = PROGRAMS[name], tuple(draw((2, 3, 6, 4), seed=seed) for seed in range(3))
    assert fxopt.explain(program, *args).count("attention", "rewritten") == 1
    actual, expected = compiled(FunctionModule(program), dynamic=False)(*args), program(*args)
    assert actual.dtype == expected.dtype
    wide = tuple(x.double() for x in args)
    oracle = sdpa_oracle(*wide) if name == "sdpa" else attention_oracle(name, *wide)
    assert_within_budget(actual, expected, oracle)


def attention_oracle(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q * (1 if name in ("attention", "switched off") else 2), k, v)


def sdpa_oracle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def test_a_graph_that_can_not_be_traced_leaves_autocast_as_it_was() -> None:
    torch._dynamo.reset()
    args = tuple(draw((2, 3, 6, 4), seed=seed) for seed in range(3))
    program = inside(torch.vmap(attention))
    with pytest.warns(FxoptWarning, match="functional transform"):
        compiled(FunctionModule(program), dynamic=False)(*args)
    assert not torch.is_autocast_enabled("cpu")
