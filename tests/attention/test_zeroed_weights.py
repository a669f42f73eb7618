"""Weights set to 0 after the softmax: with the scores' own mask that is an attention with rows of zeros."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fxopt
from fxopt.ir.attention import AttentionSpec, read_spec
from fxopt.testing import assert_within_budget, oracle

INF = float("inf")
LOWEST = torch.finfo(torch.float32).min
SIZE = 12

Change = Callable[[Tensor, Tensor], Tensor]


def operands() -> tuple[Tensor, ...]:
    return tuple(torch.randn(2, 3, SIZE, 16) for _ in range(3))


def rows_without_keys() -> Tensor:
    keep = torch.rand(2, 1, SIZE, SIZE) < 0.6
    keep[0, 0, 2] = keep[1, 0, 5:] = False
    return keep


def padding() -> Tensor:
    keep = torch.arange(SIZE) < torch.tensor([SIZE - 4, 0])[:, None]
    return keep[:, None, None]


def attention(change: Change) -> Callable[..., Tensor]:
    return lambda q, k, v, keep: change(q @ k.mT * 0.25, keep) @ v


def hidden(scores: Tensor, keep: Tensor, fill: float = -INF) -> Tensor:
    return scores.masked_fill(~keep, fill).softmax(-1)


def spec_of(function: Callable[..., object], *inputs: Tensor) -> AttentionSpec:
    result = fxopt.rewrite(Module(function), inputs, strict=True)
    (site,) = [n for n in result.program().graph.nodes if str(n.target) == "fxopt.attention.default"]
    return read_spec(str(site.args[4]))


class Module(torch.nn.Module):
    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> object:
        return self.function(*inputs)


def reason_of(function: Callable[..., object], *inputs: Tensor) -> str:
    (site,) = [s for s in fxopt.explain(function, *inputs).sites if s.kind == "attention"]
    assert site.status == "kept"
    return site.reason


def by_hidden(scores: Tensor, hide: Tensor) -> Tensor:
    return scores.masked_fill(hide, -INF).softmax(-1).masked_fill(hide, 0)


def without_nan(weights: Tensor) -> Tensor:
    return weights.masked_fill(weights.isnan(), 0.0)


def numbers_of(weights: Tensor) -> Tensor:
    return torch.where(~weights.isnan(), weights, 0.0)


def causal() -> Tensor:
    return torch.ones(SIZE, SIZE, dtype=torch.bool).tril()


SPELLINGS: dict[str, Change] = {
    "masked_fill": lambda s, keep: hidden(s, keep).masked_fill(~keep, 0.0),
    "one negation": lambda s, keep: by_hidden(s, ~keep),
    "lowest": lambda s, keep: hidden(s, keep, LOWEST).masked_fill(~keep, 0.0),
    "where": lambda s, keep: torch.where(keep, torch.where(keep, s, -INF).softmax(-1), 0.0),
    "where of hidden": lambda s, keep: torch.where(~keep, 0.0, hidden(s, keep)),
    "rows with a key": lambda s, keep: torch.where(keep.any(-1, keepdim=True), hidden(s, keep), 0.0),
    "rows without": lambda s, keep: hidden(s, keep).masked_fill(~keep.any(-1, keepdim=True), 0.0),
    "rows all hidden": lambda s, keep: hidden(s, keep).masked_fill((~keep).all(-1, keepdim=True), 0.0),
    "added": lambda s, keep: (s + torch.zeros_like(s).masked_fill(~keep, -INF)).softmax(-1).masked_fill(~keep, 0.0),
    "a cast between": lambda s, keep: hidden(s.float(), keep).to(s.dtype).masked_fill(~keep, 0.0),
    "twice": lambda s, keep: hidden(s, keep).masked_fill(~keep, 0.0).masked_fill(~keep.any(-1, keepdim=True), 0.0),
}


@pytest.mark.parametrize("mask", [rows_without_keys, padding])
@pytest.mark.parametrize("name", SPELLINGS)
def test_rows_without_keys_give_zeros(name: str, mask: Callable[[], Tensor]) -> None:
    function, inputs = attention(SPELLINGS[name]), (*operands(), mask())
    with torch.no_grad():
        assert spec_of(function, *inputs).empty_rows == "zero"
        result = fxopt.rewrite(Module(function), inputs, verify="numeric", strict=True)(*inputs)
        assert_within_budget(result, function(*inputs), oracle(function, *inputs))
    assert not result.isnan().any() and bool((result[1, :, 5:] == 0).all())


@pytest.mark.parametrize("name", ["masked_fill", "lowest", "rows without"])
def test_gradients(name: str) -> None:
    function, inputs = attention(SPELLINGS[name]), (*operands(), rows_without_keys())
    flow = torch.randn(2, 3, SIZE, 16)

    def gradients(call: Callable[..., Tensor], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs[:3]]
        return torch.autograd.grad(call(*leaves, inputs[3]), leaves, flow.to(dtype))

    learning = [x.clone().requires_grad_() for x in inputs[:3]]
    rewritten = fxopt.rewrite(Module(function), (*learning, inputs[3]), strict=True)
    assert "rewritten" in {site.status for site in rewritten.report.sites}
    assert_within_budget(gradients(rewritten), gradients(function), gradients(function, torch.float64))


def test_a_causal_mask_by_proof() -> None:
    def change(scores: Tensor, keep: Tensor) -> Tensor:
        hide = torch.ones(SIZE, SIZE, dtype=torch.bool).triu(0)
        return scores.masked_fill(hide, -INF).softmax(-1).masked_fill(hide, 0.0)

    inputs = (*operands(), torch.empty(0))
    spec = spec_of(attention(change), *inputs)
    assert spec.empty_rows == "zero" and not spec.captures and str(spec.mask) == "(j <= (i + -1))"


def test_nothing_hidden_stays_as_it_is() -> None:
    def change(scores: Tensor, keep: Tensor) -> Tensor:
        return scores.softmax(-1).masked_fill(torch.zeros(SIZE, SIZE, dtype=torch.bool), 0.0)

    assert spec_of(attention(change), *operands(), torch.empty(0)).empty_rows == "nan"


@pytest.mark.parametrize("train", [False, True])
def test_dropout_and_weights_that_are_returned(train: bool) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        weights = hidden(q @ k.mT * 0.25, keep).masked_fill(~keep, 0.0)
        return F.dropout(weights, 0.5, train) @ v, weights

    inputs = (*operands(), rows_without_keys())
    with torch.no_grad():
        spec = spec_of(function, *inputs)
        assert spec.dropout == 0.5 * train and spec.empty_rows == "zero"
        result = fxopt.rewrite(Module(function), inputs, strict=True)(*inputs)
        assert_within_budget(result[1], function(*inputs)[1], oracle(function, *inputs)[1])


ANOTHER = "another mask than that of the scores"

#: Near misses, and what is said of them.
MISSES: dict[str, tuple[Change, str]] = {
    "what is kept": (lambda s, keep: hidden(s, keep).masked_fill(keep, 0.0), ANOTHER),
    "no mask before": (lambda s, keep: s.softmax(-1).masked_fill(~keep, 0.0), "which hides nothing for certain"),
    "a finite fill": (lambda s, keep: hidden(s, keep, -1e4).masked_fill(~keep, 0.0), "hides nothing for certain"),
    "another axis": (lambda s, keep: hidden(s, keep).masked_fill(~keep.mT, 0.0), ANOTHER),
    "less": (lambda s, keep: hidden(s, keep & causal()).masked_fill(~keep, 0.0), ANOTHER),
    "more": (lambda s, keep: hidden(s, keep).masked_fill(~keep | (torch.arange(SIZE) > 8), 0.0), ANOTHER),
    "columns with a row": (lambda s, keep: hidden(s, keep).masked_fill(~keep.any(-2, keepdim=True), 0.0), ANOTHER),
    "all": (lambda s, keep: torch.where(keep.all(-1, keepdim=True), hidden(s, keep), 0.0), ANOTHER),
    "ones": (lambda s, keep: hidden(s, keep).masked_fill(~keep, 1.0), "masked_fill stands between"),
    "nan_to_num": (lambda s, keep: hidden(s, keep).nan_to_num(0.0), "nan_to_num between the softmax and the values"),
    "isnan": (lambda s, keep: without_nan(hidden(s, keep)), "isnan between the softmax and the values"),
    "isnan, where": (lambda s, keep: numbers_of(hidden(s, keep)), "isnan between the softmax and the values"),
    "-inf in a bias": (lambda s, keep: hidden(s + torch.where(keep[:, :, :1], 0.5, -INF).log(), keep)
                       .masked_fill(~keep, 0.0), "may be -inf for every key"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISSES)
def test_near_misses_are_kept_with_the_reason(name: str) -> None:
    change, said = MISSES[name]
    inputs = (*operands(), rows_without_keys())
    assert said in reason_of(attention(change), *inputs)


def test_nan_of_queries_is_what_nan_to_num_hides() -> None:
    """Why it is none of the spellings: the same mask set to 0 keeps it, and so does the rewrite."""
    inputs = (*operands(), rows_without_keys())
    inputs[0][0, 0, 0, 0] = torch.nan
    with torch.no_grad():
        zeros = fxopt.rewrite(Module(attention(SPELLINGS["masked_fill"])), inputs, strict=True)(*inputs)
        assert attention(SPELLINGS["masked_fill"])(*inputs)[0, 0, 0].isnan().all() and zeros[0, 0, 0].isnan().all()
        assert not attention(MISSES["nan_to_num"][0])(*inputs).isnan().any()


def test_weights_read_before_they_are_set_to_zero() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        weights = hidden(q @ k.mT * 0.25, keep)
        return weights.masked_fill(~keep, 0.0) @ v, weights

    assert "before masked_fill" in reason_of(function, *operands(), rows_without_keys())


def test_a_gradient_through_an_added_mask_is_nan() -> None:
    inputs = (*(x.requires_grad_() for x in operands()), rows_without_keys())
    assert "gradients that are NaN" in reason_of(attention(SPELLINGS["added"]), *inputs)


@pytest.mark.parametrize(("change", "fill"), [
    (lambda s, keep: s.masked_fill(~keep, -1e9), "-1e+09"),
    (lambda s, keep: torch.where(keep, s, -65000.0), "-65000"),
    (lambda s, keep: s + (1 - keep.float()) * -10000.0, "-10000"),
    (lambda s, keep: s - (~keep).float() * 1e6, "-1e+06"),
    (lambda s, keep: s + torch.zeros_like(s[:1, :1]).masked_fill(~keep[:1], -1e4), "-10000"),
    (lambda s, keep: s.masked_fill(torch.ones(SIZE, SIZE, dtype=torch.bool).triu(1), -1e9), "-1e+09"),
], ids=["fill", "where", "added", "subtracted", "a plane", "causal"])  # fmt: skip
def test_finite_fills_are_said_to_hide_nothing_for_certain(change: Change, fill: str) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return change(q @ k.mT * 0.25, keep).softmax(-1) @ v

    inputs = (*operands(), rows_without_keys())
    (site,) = fxopt.explain(function, *inputs).sites
    assert site.status == "rewritten" and "mask:" not in site.reason
    assert f"; {fill} is added or filled in to hide keys, a finite number" in site.reason


def test_a_finite_fill_of_sdpa_s_mask_is_said() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=(1 - keep.float()) * -1e4)

    (site,) = fxopt.explain(function, *operands(), padding()).sites
    assert "; -10000 is added or filled in to hide keys" in site.reason


@pytest.mark.parametrize("change", [
    lambda s, keep: 50 * torch.tanh(s / 50), lambda s, keep: s + torch.randn(SIZE, SIZE).exp(),
    lambda s, keep: s.masked_fill(~keep, -INF), lambda s, keep: s.masked_fill(~keep, LOWEST),
    lambda s, keep: s - 0.5 * (torch.arange(SIZE)[:, None] - torch.arange(SIZE)).abs(),
    lambda s, keep: torch.where(keep, s, -9.0),
], ids=["softcap", "bias", "-inf", "lowest", "distance", "small"])  # fmt: skip
def test_nothing_is_said_of_what_hides_and_of_biases(change: Change) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return change(q @ k.mT * 0.25, keep).softmax(-1) @ v

    (site,) = fxopt.explain(function, *operands(), rows_without_keys()).sites
    assert site.status == "rewritten" and "to hide keys" not in site.reason
