"""Biases of the distance of key and row: captured as bands, or left as planes where they are only nearly so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim
from torch.nn import functional as F

from fxopt.codegen.attention import operator  # noqa: F401 - registers the operator that gradients are taken of
from fxopt.ir.attention import AttentionSpec
from fxopt.testing import assert_within_budget, evaluate, oracle_gradients
from tests.attention.test_masks_by_proof import HEADS, operands, rewritten

Bias = Callable[[Tensor, Tensor, Tensor], Tensor]


def distance(q: Tensor, k: Tensor) -> Tensor:
    return torch.arange(k.shape[2])[None] - torch.arange(q.shape[2])[:, None]


def buckets(d: Tensor, both: bool) -> Tensor:
    """T5's, 32 of them: exact for small distances, logarithmic beyond."""
    count, result = (16, (d > 0).to(torch.long) * 16) if both else (32, torch.zeros_like(d))
    d = d.abs() if both else -torch.min(d, torch.zeros_like(d))
    large = count // 2 + (torch.log(d.float() / (count // 2)) / 2.0 * (count // 2)).to(torch.long)
    large = torch.min(large, torch.full_like(large, count - 1))
    return result + torch.where(d < count // 2, d, large)


def t5(q: Tensor, k: Tensor, table: Tensor) -> Tensor:
    return F.embedding(buckets(distance(q, k), True), table).permute(2, 0, 1)[None]


def t5_causal(q: Tensor, k: Tensor, table: Tensor) -> Tensor:
    bias = F.embedding(buckets(distance(q, k), False), table).permute(2, 0, 1)[None]
    return bias + torch.where(distance(q, k) <= 0, 0.0, torch.finfo(table.dtype).min)


def clipped(q: Tensor, k: Tensor, table: Tensor) -> Tensor:
    return table[distance(q, k).clamp(-9, 9) + 9].permute(2, 0, 1)


def scaled(q: Tensor, k: Tensor, table: Tensor) -> Tensor:
    return 16 * torch.sigmoid(table[(-distance(q, k)).abs().clamp(max=20)]).permute(2, 0, 1)


BANDS: dict[str, Bias] = {"t5": t5, "t5-causal": t5_causal, "clipped": clipped, "scaled": scaled}


def with_bias(bias: Bias) -> Callable[..., Tensor]:
    def attention(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1) + bias(q, k, table)).softmax(-1) @ v

    return attention


def table() -> Tensor:
    return torch.randn(32, HEADS, generator=torch.Generator().manual_seed(3))


def shapes(same: bool) -> Any:
    rows = Dim("rows", min=4, max=64)
    keys = rows if same else Dim("keys", min=4, max=64)
    return ({2: rows}, {2: keys}, {2: keys}, None)


def dims(spec: AttentionSpec) -> list[str]:
    return [c.dims for c in spec.captures]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", BANDS)
def test_bias_of_the_distance_is_a_band_with_its_gradient(name: str, dynamic: bool) -> None:
    attention = with_bias(BANDS[name])
    square = name == "t5-causal"
    sizes = [(7, 7 if square else 11), (23, 23 if square else 5), (4, 4 if square else 50)]
    result, spec = rewritten(attention, (*operands(*sizes[0]), table()), shapes(square) if dynamic else None)
    assert dims(spec) == ["-h-d"]
    for size in sizes if dynamic else sizes[:1]:
        inputs = tuple(x.requires_grad_() for x in (*operands(*size), table()))
        actual = evaluate(lambda *args: result.program.module(*args)[0], *inputs)
        assert_within_budget(actual, evaluate(attention, *inputs), oracle_gradients(attention, *inputs))


def transposed(q: Tensor, k: Tensor, table: Tensor) -> Tensor:
    total = torch.arange(k.shape[2])[None] + torch.arange(q.shape[2])[:, None]
    return table[total.clamp(max=31)].permute(2, 0, 1)


def faster(q: Tensor, k: Tensor, table: Tensor) -> Tensor:
    d = torch.arange(k.shape[2])[None] - 2 * torch.arange(q.shape[2])[:, None]
    return table[d.clamp(-9, 9) + 9].permute(2, 0, 1)


def one_row_apart(q: Tensor, k: Tensor, table: Tensor) -> Tensor:
    rows = torch.arange(q.shape[2])[:, None]
    d = torch.arange(k.shape[2])[None] - torch.where(rows == 2, rows + 1, rows)
    return table[d.clamp(-9, 9) + 9].permute(2, 0, 1)


@pytest.mark.parametrize("bias", [transposed, faster, one_row_apart])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_what_is_only_nearly_of_the_distance_stays_a_plane(bias: Bias, dynamic: bool) -> None:
    attention = with_bias(bias)
    result, spec = rewritten(attention, (*operands(7, 11), table()), shapes(False) if dynamic else None)
    assert dims(spec) == ["-hij"]
    inputs = (*operands(7, 11), table())
    torch.testing.assert_close(result.program.module(*inputs)[0], attention(*inputs))


@pytest.mark.parametrize("spoil", [False, True])
def test_constant_indices_are_compared_along_their_diagonals(spoil: bool) -> None:
    index = (torch.arange(11)[None] - torch.arange(7)[:, None]).clamp(-3, 3) + 3
    index[5, 5] += int(spoil)

    def bias(q: Tensor, k: Tensor, table: Tensor) -> Tensor:
        return table[index].permute(2, 0, 1)

    attention = with_bias(bias)
    result, spec = rewritten(attention, (*operands(7, 11), table()), None)
    assert dims(spec) == (["-hij"] if spoil else ["-h-d"])
    inputs = (*operands(7, 11), table())
    torch.testing.assert_close(result.program.module(*inputs)[0], attention(*inputs))
