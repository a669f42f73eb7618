"""Keys and values whose heads serve unequally many queries' heads: they are copied, and the numbers are right."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fxopt import driver
from fxopt.frontend.export import from_export
from fxopt.ir.attention import read_spec
from fxopt.ir.program import Program
from fxopt.lowering.lower import lower
from fxopt.lowering.options import Options
from fxopt.testing import assert_within_budget, oracle

#: Which of two heads of keys serves each of six heads of queries.
MAPS = {"uneven": [0, 0, 0, 0, 1, 1], "mixed": [0, 1, 1, 0, 0, 0], "one of two": [1, 1, 1, 1, 1, 1]}
Attention = Callable[..., Tensor]


def eager(heads: list[int]) -> Attention:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keep = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        k, v = k[:, heads], v[:, heads]
        return (q @ k.mT * 0.25).masked_fill(~keep, -torch.inf).softmax(-1) @ v

    return attention


def fused(heads: list[int]) -> Attention:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k[:, heads], v[:, heads], is_causal=True)


def apart(heads: list[int]) -> Attention:
    """Each head repeated as often as it serves."""
    counts = torch.bincount(torch.tensor(heads), minlength=2)

    def repeated(x: Tensor) -> Tensor:
        return x.repeat_interleave(counts, 1, output_size=len(heads))

    return lambda q, k, v: (q @ repeated(k).mT * 0.25).softmax(-1) @ repeated(v)


def rewritten(attention: Attention, inputs: tuple[Tensor, ...]) -> Program:
    return driver.rewrite(from_export(attention, inputs), Options(strict=True)).program


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spelling", [eager, fused, apart])
@pytest.mark.parametrize("name", MAPS)
def test_heads_are_copied_and_numbers_are_right(
    name: str, spelling: Callable[[list[int]], Attention], dtype: torch.dtype
) -> None:
    attention = spelling(sorted(MAPS[name]) if spelling is apart else MAPS[name])
    inputs = tuple(torch.randn(2, heads, 13, 16).to(dtype) for heads in (6, 2, 2))
    program = rewritten(attention, inputs)
    (site,) = [n for n in program.graph.nodes if str(n.target) == "fxopt.attention.default"]
    heads = [operand.meta["val"].shape[1] for operand in site.args[:3]]
    # No map of the specification's has an unequal share: what a kernel reads is one head for each head of queries.
    assert heads == [6, 6, 6] and read_spec(str(site.args[4])).kv_map == "group"
    expected = attention(*inputs), oracle(attention, *inputs)
    assert_within_budget(program.module(*inputs)[0], *expected)
    for option in ("aten", "auto"):
        lowered, _ = lower(program, training=False, option=option)
        assert_within_budget(lowered.module(*inputs)[0], *expected)
