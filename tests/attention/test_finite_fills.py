"""Masks that fill with, or add, the lowest finite number: when they become masks, and when they must stay scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from fxopt import driver
from fxopt.frontend.export import from_export
from fxopt.ir.attention import AttentionSpec, read_spec
from fxopt.ir.expression import parse
from fxopt.lowering.options import Options
from fxopt.testing import assert_within_budget, draw, evaluate, oracle, oracle_gradients

Program = Callable[..., Tensor]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def lowest(x: Tensor) -> float:
    return torch.finfo(x.dtype).min


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1) * 0.5


def attend(x: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(x, -1, dtype=F32).to(v.dtype) @ v


def filled(q: Tensor, k: Tensor, v: Tensor, m: Tensor, n: Tensor) -> Tensor:
    return attend(scores(q, k).masked_fill(~m, lowest(q)), v)


def filled_twice(q: Tensor, k: Tensor, v: Tensor, m: Tensor, n: Tensor) -> Tensor:
    x = torch.where(m, scores(q, k), lowest(q))
    return attend(torch.where(n, x, lowest(q)), v)


def zero_or_lowest(m: Tensor, like: Tensor) -> Tensor:
    return torch.where(m, torch.zeros((), dtype=like.dtype), lowest(like))


def added(q: Tensor, k: Tensor, v: Tensor, m: Tensor, n: Tensor) -> Tensor:
    return attend(scores(q, k) + zero_or_lowest(m, q), v)


def added_then_filled(q: Tensor, k: Tensor, v: Tensor, m: Tensor, n: Tensor) -> Tensor:
    return attend((scores(q, k) + zero_or_lowest(m, q)).masked_fill(~n, lowest(q)), v)


def added_to_sdpa(q: Tensor, k: Tensor, v: Tensor, m: Tensor, n: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, attn_mask=zero_or_lowest(m, q), scale=0.5)


def filled_then_added(q: Tensor, k: Tensor, v: Tensor, m: Tensor, n: Tensor) -> Tensor:
    return attend(scores(q, k).masked_fill(~n, lowest(q)) + zero_or_lowest(m, q), v)


def added_twice(q: Tensor, k: Tensor, v: Tensor, m: Tensor, n: Tensor) -> Tensor:
    return attend(scores(q, k) + zero_or_lowest(m, q) + zero_or_lowest(n, q), v)


def infinity_outside(q: Tensor, k: Tensor, v: Tensor, m: Tensor, n: Tensor) -> Tensor:
    return attend(scores(q, k).masked_fill(~m, lowest(q)).masked_fill(~n, -torch.inf), v)


def infinity_inside(q: Tensor, k: Tensor, v: Tensor, m: Tensor, n: Tensor) -> Tensor:
    return attend(scores(q, k).masked_fill(~m, -torch.inf).masked_fill(~n, lowest(q)), v)


def two_numbers(q: Tensor, k: Tensor, v: Tensor, m: Tensor, n: Tensor) -> Tensor:
    x = scores(q, k).float().masked_fill(~m, torch.finfo(BF16).min)
    return attend(x.masked_fill(~n, torch.finfo(F32).min), v)


def nearly_lowest(q: Tensor, k: Tensor, v: Tensor, m: Tensor, n: Tensor) -> Tensor:
    return attend(scores(q, k).masked_fill(~m, torch.finfo(F32).min / 2), v)


def beside_a_huge_number(q: Tensor, k: Tensor, v: Tensor, m: Tensor, n: Tensor) -> Tensor:
    x = scores(q, k).masked_fill(~n, -3e38)
    return attend(x + zero_or_lowest(m, q), v)


def too_low_for_its_dtype(q: Tensor, k: Tensor, v: Tensor, m: Tensor, n: Tensor) -> Tensor:
    x = torch.where(m, scores(q, k).to(BF16), torch.finfo(F32).min)
    return attend(x, v)


def computed(q: Tensor, k: Tensor, v: Tensor, m: Tensor, n: Tensor) -> Tensor:
    return attend(scores(q, k) + (1.0 - m.to(q.dtype)) * lowest(q), v)


def computed_from_integers(q: Tensor, k: Tensor, v: Tensor, m: Tensor, n: Tensor) -> Tensor:
    return attend(scores(q, k) + (1.0 - n.to(q.dtype)) * lowest(q), v)


def compared(q: Tensor, k: Tensor, v: Tensor, m: Tensor, n: Tensor) -> Tensor:
    hidden = 1.0 - (n.to(q.dtype) > 0).to(q.dtype)
    return attend(scores(q, k) + hidden.masked_fill(hidden.bool(), lowest(q)), v)


def computed_from_two(q: Tensor, k: Tensor, v: Tensor, m: Tensor, n: Tensor) -> Tensor:
    return attend(scores(q, k) + (1.0 - m.to(q.dtype) * n.to(q.dtype)) * lowest(q), v)


def times_a_larger_number(q: Tensor, k: Tensor, v: Tensor, m: Tensor, n: Tensor) -> Tensor:
    return attend(scores(q, k) + (1.0 - m.to(q.dtype)) * -1e4, v)


def scaled_after(q: Tensor, k: Tensor, v: Tensor, m: Tensor, n: Tensor) -> Tensor:
    return attend(torch.where(m, q @ k.transpose(-2, -1), lowest(q)) * 0.5, v)


def inputs(dtype: torch.dtype = F32, whole: bool = False) -> tuple[Tensor, ...]:
    """Queries, keys, values, and two masks of the keys; the second batch element keeps none under either.

    ``whole`` makes the second mask one of integers.
    """
    q, k, v = (draw((3, 2, 7, 8), dtype=dtype, seed=seed) for seed in range(3))
    m, n = (draw((3, 1, 1, 7), seed=seed) > -0.3 for seed in (3, 4))
    m[1], n[1], n[2] = False, False, ~m[2]
    return q, k, v, m, n.long() if whole else n


def spec_of(program: Program, *given: Any, numbers: bool = True) -> AttentionSpec:
    """The specification that a program is rewritten to; its ``numbers`` are checked too."""
    with torch.no_grad():
        result = driver.rewrite(from_export(program, given), Options(strict=True))
        (site,) = [n for n in result.program.graph.nodes if "fxopt.attention" in str(n.target)]
        if numbers:
            actual = result.program.module(*given)[0]
            assert_within_budget(actual, program(*given), oracle(program, *given))
    return read_spec(str(site.args[4]))


@pytest.mark.parametrize(("program", "dtype", "mask"), [
    (filled, F32, "~c0"), (filled, BF16, "~c0"), (filled, F16, "~c0"),
    (filled_twice, F32, "c1 & c0"), (filled_twice, F16, "c1 & c0"),
    (added, F32, "c0"), (added, BF16, "c0"), (added_to_sdpa, F32, "c0"),
    (added_then_filled, BF16, "~c1 & c0"), (computed, F32, "c0"), (computed, BF16, "c0"), (compared, F32, "c0"),
])  # fmt: skip
def test_becomes_a_mask_whose_empty_rows_give_the_mean(program: Program, dtype: torch.dtype, mask: str) -> None:
    spec = spec_of(program, *inputs(dtype))
    assert spec.mask == parse(mask) and spec.score == parse("s * 0.5") and spec.empty_rows == "uniform"
    assert all(str(how) == "b--j:bool" for how in spec.captures)


@pytest.mark.parametrize(("program", "dtype"), [
    (filled_then_added, F32), (added_twice, F32), (infinity_inside, F32), (two_numbers, F32), (nearly_lowest, F32),
    (beside_a_huge_number, F32), (scaled_after, F32), (added, F16), (added_to_sdpa, F16), (too_low_for_its_dtype, F32),
])  # fmt: skip
def test_stays_a_score(program: Program, dtype: torch.dtype) -> None:
    # A score is computed in float32, where float16's lowest number absorbs nothing and float32's is not infinite.
    spec = spec_of(program, *inputs(dtype), numbers=dtype is F32 and program is not too_low_for_its_dtype)
    assert spec.empty_rows != "uniform" and spec.mask is None


@pytest.mark.parametrize("program", [computed_from_integers, computed_from_two, times_a_larger_number])
def test_arithmetic_that_is_no_mask_for_certain_stays_a_bias(program: Program) -> None:
    spec = spec_of(program, *inputs(whole=program is computed_from_integers))
    number = program is times_a_larger_number
    assert spec.mask is None
    assert spec.score == parse("s * 0.5 + where(c0, 0.0, -10000.0)" if number else "s * 0.5 + c0")
    assert str(spec.captures[0]) == ("b--j:bool" if number else "b--j:f32")


def test_an_infinite_mask_around_a_finite_one_is_taken_alone() -> None:
    spec = spec_of(infinity_outside, *inputs())
    assert spec.empty_rows == "nan" and str(spec.mask) == "(~c1)" and "where(c0, -3.4" in str(spec.score)


class Biased(nn.Module):
    """A bias for each pair of positions, from a learned table or as it is given, and a finite padding mask."""

    def __init__(self, learned: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(13, 2).requires_grad_(False) if learned else None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, m: Tensor, bias: Tensor) -> Tensor:
        if self.table is not None:
            position = torch.arange(7)
            bias = self.table(position[:, None] - position[None, :] + 6).permute(2, 0, 1)[None]
        return attend(scores(q, k) + bias + zero_or_lowest(m, q), v)


@pytest.mark.parametrize("learned", [True, False])
def test_a_bias_beside_it_must_not_be_able_to_hide_keys_as_well(learned: bool) -> None:
    q, k, v, m, _ = inputs()
    hiding = torch.zeros(1, 2, 7, 7).masked_fill(torch.rand(1, 2, 7, 7) < 0.5, torch.finfo(F32).min)
    program = Biased(learned)
    result = driver.rewrite(from_export(program, (q, k, v, m, hiding)), Options(strict=True))
    (site,) = [n for n in result.program.graph.nodes if "fxopt.attention" in str(n.target)]
    spec = read_spec(str(site.args[4]))
    assert (spec.empty_rows == "uniform") == learned and (spec.mask is not None) == learned


@pytest.mark.parametrize("program", [filled, filled_twice, added, added_then_filled])
def test_gradients_of_rows_without_keys(program: Program) -> None:
    """Fills pass no gradient into a masked row; an absorbed addition does, and stays a score where one may flow."""
    torch._dynamo.reset()
    q, k, v, m, n = inputs()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    compiled = torch.compile(program, backend="fxopt", options={"base": "eager"})
    results = (evaluate(compiled, *leaves, m, n), evaluate(program, *leaves, m, n))
    assert_within_budget(*results, oracle_gradients(program, *leaves, m, n))
    assert results[0].gradients["args[2]"][1].abs().min() > 0
