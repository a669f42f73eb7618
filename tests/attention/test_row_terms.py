"""Terms that are the same for all keys of a row: dropped where they are surely finite, kept where they may not be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.functional import scaled_dot_product_attention

from fxopt import driver
from fxopt.frontend.export import from_export
from fxopt.ir.attention import AttentionSpec, read_spec
from fxopt.lowering.options import Options
from fxopt.testing import assert_within_budget, draw, evaluate, oracle, oracle_gradients

Change = Callable[..., Tensor]
SIZE = 11
DROPPED = "dropped, the same for all keys: "


class Spelling(nn.Module):
    """Scores, a ``change`` of them that may read one more tensor, softmax, values."""

    def __init__(self, change: Change) -> None:
        super().__init__()
        self.change = change

    def forward(self, q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
        return self.change(q @ k.mT * 0.25, given).softmax(-1) @ v


class Sdpa(Spelling):
    """The same by the operator, whose bias ``change`` makes of zeros."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
        zeros = torch.zeros(q.shape[2], k.shape[2], dtype=q.dtype)
        return scaled_dot_product_attention(q, k, v, attn_mask=self.change(zeros, given))


def operands(given: Tensor | None = None, size: int = SIZE, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    q, k, v = (draw((2, 3, size, 8), dtype=dtype, seed=seed) for seed in range(3))
    inputs = (q, k, v, torch.zeros(1, dtype=dtype) if given is None else given.detach())
    return tuple(x.requires_grad_() for x in inputs)


def rewritten(model: nn.Module, *inputs: Tensor, shapes: Any = None) -> tuple[AttentionSpec, str, nn.Module]:
    """The specification of the one attention, the reason that is reported, and the rewritten program."""
    result = driver.rewrite(from_export(model, inputs, None, shapes), Options(strict=True))
    (site,) = [n for n in result.program.graph.nodes if str(n.target) == "fxopt.attention.default"]
    (reason,) = [r.site.reason for r in result.replacements if r.site.kind == "attention"]
    return read_spec(str(site.args[4])), reason, result.program.module


def check(model: nn.Module, module: nn.Module, *inputs: Tensor) -> None:
    """Compare outputs, and gradients of all that is given."""
    actual = evaluate(module, *inputs)
    actual = type(actual)(actual.outputs[0], actual.gradients)
    assert_within_budget(actual, evaluate(model, *inputs), oracle_gradients(model, *inputs), floor=1.0)


def rows(x: Tensor) -> Tensor:
    """The number of each row, as a column."""
    return torch.arange(x.shape[-2])[:, None]


def keys(x: Tensor) -> Tensor:
    return torch.arange(x.shape[-1])


def causal(x: Tensor) -> Tensor:
    return keys(x) <= rows(x)


def slopes() -> Tensor:
    return torch.tensor([0.5, 0.25, 0.125])[:, None, None]


#: What is done to the scores, the score that is left, and what is said to be dropped.
GONE: dict[str, tuple[Change, str, str]] = {
    "a number": (lambda x, t: x - 5.0, "(s * 0.25)", "5.0"),
    "from a number": (lambda x, t: 5.0 - x, "(-(s * 0.25))", "5.0"),
    "the row": (lambda x, t: x + 0.5 * rows(x), "(s * 0.25)", "(float(i) * 0.5)"),
    "a wave over rows": (lambda x, t: x + torch.where(rows(x) % 2 == 0, 1.5, -2.0), "(s * 0.25)",
                         "where(((i % 2) == 0), 1.5, -2.0)"),
    "before the scale": (lambda x, t: (x + 3) * 0.5, "(s * 0.125)", "3"),
    "two of them": (lambda x, t: (x + 3 - 0.5 * rows(x)) * 0.5, "(s * 0.125)", "3, (float(i) * 0.5)"),
    "a constant of each head": (lambda x, t: x + slopes() * 2, "(s * 0.25)", "mul"),
    "integers of rows": (lambda x, t: x + t.long()[:, :1], "(s * 0.25)", "slice"),
    "under a mask": (lambda x, t: (x + 1.5).masked_fill(~causal(x), -torch.inf), "(s * 0.25)", "1.5; mask: j <= i"),
    "in rows without keys": (lambda x, t: (x + 1.5).masked_fill(rows(x) < keys(x) + 2, -torch.inf), "(s * 0.25)",
                             "1.5; mask: j <= (i + -2)"),
    "beside a filled mask": (lambda x, t: x.masked_fill(~causal(x), -1e9) + 1.5,
                             "where((j >= (i + 1)), -1000000000.0, (s * 0.25))", "1.5"),
    "beside a bias of keys": (lambda x, t: x + 1.5 + 0.5 * keys(x), "((s * 0.25) + (float(j) * 0.5))", "1.5"),
    "after slopes over keys": (lambda x, t: x + slopes() * keys(x) - slopes() * rows(x),
                               "((s * 0.25) + (c0 * float(j)))", "float(i))"),
}  # fmt: skip
#: A vector that is added, and factors whose dtype is told only where lengths are known.
STATIC = ("integers of rows", "after slopes over keys")


@pytest.mark.parametrize(("name", "dynamic"), [(n, d) for n in GONE for d in (False, True) if not (d and n in STATIC)])
def test_drops(name: str, dynamic: bool) -> None:
    change, score, said = GONE[name]
    model, inputs = Spelling(change), operands(draw((SIZE, SIZE), seed=5) * 3)
    axes = ({2: Dim("length", min=2, max=100)},) * 3
    spec, reason, module = rewritten(model, *inputs, shapes=(*axes, None) if dynamic else None)
    assert str(spec.score) == score
    assert said in reason.partition(DROPPED)[2], reason
    check(model, module, *inputs)
    if dynamic:
        check(model, module, *operands(inputs[3], size=7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_drops_in_narrow_dtypes(dtype: torch.dtype) -> None:
    model, inputs = Spelling(lambda x, t: x + 0.5 * rows(x).to(dtype)), operands(dtype=dtype)
    spec, _, module = rewritten(model, *inputs)
    assert str(spec.score) == "(s * 0.25)"
    check(model, module, *inputs)


def test_drops_from_the_bias_of_the_operator() -> None:
    model, inputs = Sdpa(lambda x, t: x + 0.5 * rows(x)), operands()
    spec, reason, module = rewritten(model, *inputs)
    assert not spec.captures and spec.score.op == "mul" and f"{DROPPED}(float(i) * 0.5)" in reason
    check(model, module, *inputs)


def infinite(x: Tensor, t: Tensor) -> Tensor:
    return x + torch.where(rows(x) < 3, 0.0, -torch.inf)


def lowest(x: Tensor, t: Tensor) -> Tensor:
    return x + torch.where(rows(x) < 3, 0.0, torch.finfo(x.dtype).min)


#: What is done to the scores, and what must still stand in the score or the mask.
KEPT: dict[str, tuple[Change, str]] = {
    "inside a soft-cap": (lambda x, t: 4 * torch.tanh((x + 1.5) / 4), "+ 1.5"),
    "under a filled mask": (lambda x, t: (x + 1.5).masked_fill(~causal(x), -2.0), "+ 1.5"),
    "a choice by row": (lambda x, t: torch.where(rows(x) < 5, x + 1.5, 0.5 * keys(x)), "+ 1.5"),
    "at least a number": (lambda x, t: torch.maximum(x + 1.5, torch.tensor(1.0)), "+ 1.5"),
    "times a number of each key": (lambda x, t: (x + 1.5) * (keys(x) + 1), "+ 1.5"),
    "a number of each key": (lambda x, t: x + 0.5 * keys(x), "float(j)"),
    "a distance": (lambda x, t: x + slopes() * (keys(x) - rows(x)), "float((j - i))"),
    "the logarithm of the row": (lambda x, t: x + (rows(x) * 1.0).log(), "c0"),
    "minus infinity in some rows": (infinite, "mask=(i <= 2)"),
    "the lowest number in some rows": (lowest, ""),
    "-1e4 in some rows": (lambda x, t: x + torch.where(rows(x) < 3, 0.0, -1e4), "-10000.0"),
    "NaN": (lambda x, t: x + torch.where(rows(x) < 3, 0.0, torch.nan), "nan"),
    "run-time numbers of rows": (lambda x, t: x + t[:, :1], "c0"),
    "a run-time number": (lambda x, t: x + t[0, 0], "c0"),
    "a run-time factor": (lambda x, t: (x + 1.5) * t[:, :1], "+ 1.5"),
    "the square of scores": (lambda x, t: (x + 1.5) * (x + 1.5), "+ 1.5"),
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_keeps(name: str) -> None:
    change, text = KEPT[name]
    model, inputs = Spelling(change), operands(draw((SIZE, SIZE), seed=5))
    spec, reason, module = rewritten(model, *inputs)
    assert text in str(spec) and DROPPED not in reason
    if name == "minus infinity in some rows":
        # As a mask it passes no gradient where eager's is NaN.
        assert_within_budget(module(*inputs)[0], model(*inputs), oracle(model, *inputs))
    else:
        check(model, module, *inputs)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, torch.finfo(torch.float32).min])
def test_what_a_row_is_given_at_run_time_shows(value: float) -> None:
    model, inputs = Spelling(lambda x, t: x + t), operands(draw((SIZE, 1), seed=5))
    module = rewritten(model, *inputs)[2]
    with torch.no_grad():
        inputs[3][4] = value
    assert_within_budget(module(*inputs)[0], model(*inputs), oracle(model, *inputs))


class LearnedRows(Spelling):
    """A learned number for each row."""

    def __init__(self) -> None:
        super().__init__(lambda x, t: x + t)
        self.bias = nn.Parameter(draw((SIZE, 1), seed=5))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
        return super().forward(q, k, v, self.bias)


def test_a_learned_number_of_each_row_has_a_gradient() -> None:
    model, inputs = LearnedRows(), operands()
    compiled = torch.compile(model, backend="fxopt")
    compiled(*inputs).sum().backward()
    assert model.bias.grad is not None and float(model.bias.grad.abs().max()) < 1e-5


def test_a_distance_without_its_row_would_be_rounded_as_the_position_is() -> None:
    """Why ``slope·(j - i)`` stays: to a softmax the slope over keys alone is the same, but for its rounding."""

    def sloped(x: Tensor, t: Tensor) -> Tensor:
        return (x + 0.5 * (keys(x) - rows(x))).masked_fill(~causal(x), -torch.inf)

    def without_row(x: Tensor, t: Tensor) -> Tensor:
        return (x + 0.5 * keys(x)).masked_fill(~causal(x), -torch.inf)

    inputs = (*(x[:1, :1].detach() for x in operands(size=1024)[:3]), torch.zeros(1))
    exact = oracle(Spelling(sloped), *inputs)
    errors = [float((Spelling(change)(*inputs) - exact).abs().max()) for change in (sloped, without_row)]
    assert errors[1] > 10 * errors[0]
    spec, _, module = rewritten(Spelling(sloped), *inputs)
    assert "(j - i)" in str(spec.score)
    assert_within_budget(module(*inputs)[0], Spelling(sloped)(*inputs), exact)
