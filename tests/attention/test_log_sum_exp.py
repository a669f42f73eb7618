"""The log-sum-exp of the same scores comes with the attention: who reads it, what it holds, and who can't be served."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

import fxopt
from fxopt import driver
from fxopt.frontend.export import from_export
from fxopt.ir.attention import AttentionSpec, read_spec
from fxopt.lowering.options import Options
from fxopt.testing import assert_within_budget, draw, evaluate, oracle_gradients

Function = Callable[..., Any]
SIZE = 11


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT * 0.25


def causal(x: Tensor) -> Tensor:
    return torch.arange(x.shape[-1]) <= torch.arange(x.shape[-2])[:, None]


def beside(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Any:
    x = scores(q, k)
    return x.softmax(-1) @ v, x.logsumexp(-1)


def computed_on(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Any:
    """A loss that stands before the result."""
    x = scores(q, k)
    loss = x.logsumexp(-1).square().mean() * 0.1
    return x.softmax(-1) @ v, loss


def with_axis_kept(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Any:
    x = scores(q, k)
    return x.softmax(-1) @ v, torch.special.logsumexp(x, (3,), keepdim=True)


def in_float32(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Any:
    x = scores(q, k)
    return torch.softmax(x, -1, dtype=torch.float32).to(v.dtype) @ v, x.float().logsumexp(-1), x.logsumexp(-1)


def of_merged_heads(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Any:
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    x = torch.bmm(q, k.mT) * 0.25
    return torch.bmm(x.softmax(-1), v), x.logsumexp(-1)


def masked(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Any:
    x = scores(q, k)
    x = x.masked_fill(~causal(x), -torch.inf)
    return x.softmax(-1) @ v, x.logsumexp(-1)


def filled(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Any:
    x = scores(q, k)
    x = x.masked_fill(~causal(x), torch.finfo(x.dtype).min)
    return x.softmax(-1) @ v, x.logsumexp(-1)


def with_row_terms(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Any:
    """Softmax doesn't see them, the log-sum-exp does."""
    x = scores(q, k)
    x = x + 3.0 + 0.5 * torch.arange(x.shape[-2])[:, None]
    return x.softmax(-1) @ v, x.logsumexp(-1)


def with_a_bias(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Any:
    x = scores(q, k) + t[:, : k.shape[2]]
    return x.softmax(-1) @ v, x.logsumexp(-1)


def with_column_sums(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Any:
    x = scores(q, k)
    p = x.softmax(-1)
    return p @ v, p.sum(2), x.logsumexp(-1)


def merged(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Any:
    """Attentions over two parts of the keys, each weighted by its share."""
    found = [beside(q, k[:, :, part], v[:, :, part], t) for part in (slice(None, 3), slice(3, None))]
    whole = torch.logaddexp(found[0][1], found[1][1])
    return sum(out * (lse - whole).exp()[..., None] for out, lse in found)


#: A program, the attentions that it has, and what the specification or the report holds.
SERVED: dict[str, tuple[Function, int, str]] = {
    "beside": (beside, 1, ""),
    "a loss before the result": (computed_on, 1, ""),
    "with its axis kept": (with_axis_kept, 1, ""),
    "in float32": (in_float32, 1, ""),
    "of merged heads": (of_merged_heads, 1, ""),
    "masked": (masked, 1, "mask=(j <= i)"),
    "filled, each row with a key": (filled, 1, "mask=(j <= i)"),
    "with terms of rows": (with_row_terms, 1, "(((s * 0.25) + 3.0) + (float(i) * 0.5))"),
    "with a bias that learns": (with_a_bias, 1, "c0"),
    "with column sums": (with_column_sums, 1, ""),
    "of parts that are merged": (merged, 2, ""),
}


def operands(size: int = SIZE, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    q, k, v = (draw((2, 3, size, 8), dtype=dtype, seed=seed) for seed in range(3))
    return tuple(x.requires_grad_() for x in (q, k, v, draw((1, 64), dtype=dtype, seed=4)))


def rewritten(function: Function, *inputs: Tensor, shapes: Any = None) -> tuple[list[AttentionSpec], str, nn.Module]:
    """The specifications of the attentions with a log-sum-exp, what is reported, and the rewritten program."""
    program = from_export(function, inputs, None, shapes)
    result = driver.rewrite(program, Options(strict=True, verify="numeric"))
    sites = result.program.graph.find_nodes(op="call_function", target=torch.ops.fxopt.attention_with_lse.default)
    reasons = [r.site.reason for r in result.replacements if r.site.kind == "attention"]
    return [read_spec(str(site.args[4])) for site in sites], "; ".join(reasons), result.program.module


def check(function: Function, program: Function, inputs: tuple[Tensor, ...]) -> None:
    assert_within_budget(evaluate(program, *inputs), evaluate(function, *inputs), oracle_gradients(function, *inputs))


@pytest.mark.parametrize("name", SERVED)
def test_comes_with_the_attention(name: str) -> None:
    function, count, text = SERVED[name]
    specs, reason, _ = rewritten(function, *operands())
    assert len(specs) == count and reason.count("log-sum-exp") == count and "dropped" not in reason
    assert all(text in str(spec) for spec in specs)


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("dynamic", [False, True])
def test_computes_the_same(name: str, dynamic: bool) -> None:
    function, _, _ = SERVED[name]
    torch._dynamo.reset()
    program = torch.compile(function, backend="fxopt", dynamic=dynamic, options={"base": "eager", "strict": True})
    for size in (SIZE, 7) if dynamic else (SIZE,):
        check(function, program, operands(size))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("function", [beside, in_float32, masked])
def test_computes_the_same_in_other_dtypes(function: Function, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    check(function, torch.compile(function, backend="fxopt", options={"base": "eager"}), operands(dtype=dtype))


def test_lengths_may_be_dynamic_in_an_exported_program() -> None:
    axes = ({2: Dim("length", min=4, max=64)},) * 3
    _, _, module = rewritten(masked, *operands(), shapes=((*axes, None),))
    out, lse = module(*operands(7))
    torch.testing.assert_close((out, lse), masked(*operands(7)))


def without_keys(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Any:
    x = scores(q, k)
    x = x.masked_fill(torch.arange(x.shape[-2])[:, None] < 3, -torch.inf)
    return x.softmax(-1) @ v, x.logsumexp(-1)


def test_a_row_without_keys_has_minus_infinity() -> None:
    specs, _, module = rewritten(without_keys, *(x.detach() for x in operands()))
    out, lse = module(*operands())
    assert specs and bool((lse[:, :, :3] == -torch.inf).all() and out[:, :, :3].isnan().all())
    torch.testing.assert_close((out, lse), without_keys(*operands()), equal_nan=True)


def test_dropout_leaves_it_alone() -> None:
    def dropping(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Any:
        x = scores(q, k)
        return F.dropout(x.softmax(-1), 0.5) @ v, x.logsumexp(-1)

    (spec,), _, module = rewritten(dropping, *operands())
    assert spec.dropout == 0.5
    torch.testing.assert_close(module(*operands())[1], scores(*operands()[:2]).logsumexp(-1))


def over(*axes: int) -> Function:
    """The log-sum-exp over other axes."""

    def function(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Any:
        x = scores(q, k)
        return x.softmax(-1) @ v, x.logsumexp(axes)

    return function


def before_the_mask(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Any:
    x = scores(q, k)
    return x.masked_fill(~causal(x), -torch.inf).softmax(-1) @ v, x.logsumexp(-1)


def of_other_scores(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Any:
    x = scores(q, k)
    return x.softmax(-1) @ v, (x * 2).logsumexp(-1)


def of_returned_scores(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Any:
    x = scores(q, k)
    return x.softmax(-1) @ v, x.logsumexp(-1), x


def of_rows_that_may_lack_keys(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Any:
    x = scores(q, k)
    x = x.masked_fill(t[:, : k.shape[2]] > 0, torch.finfo(x.dtype).min)
    return x.softmax(-1) @ v, x.logsumexp(-1)


def with_all_weights(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Any:
    x = scores(q, k)
    p = x.softmax(-1)
    return p @ v, p, x.logsumexp(-1)


def in_the_values(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Any:
    x = scores(q, k)
    return x.softmax(-1) @ (v * x.logsumexp(-1, keepdim=True))


def drawn_upon(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Any:
    x = scores(q, k)
    lse = F.dropout(x.logsumexp(-1), 0.5)
    return x.softmax(-1) @ v, lse


#: Programs that keep their attention, and what the reason must say.
KEPT: dict[str, tuple[Function, str]] = {
    "over queries": (over(-2), "the scores escape"),
    "over keys and queries": (over(-2, -1), "the scores escape"),
    "of the scores before the mask": (before_the_mask, "the scores escape"),
    "of other scores": (of_other_scores, "the scores escape"),
    "of scores that are returned": (of_returned_scores, "the scores escape"),
    "of rows that may lack keys": (of_rows_that_may_lack_keys, "in a row without keys"),
    "with all weights": (with_all_weights, "and all weights are read"),
    "read by the values": (in_the_values, "is computed from the log-sum-exp of its own scores"),
    "read by a random draw": (drawn_upon, "has to stand before the attention's result"),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_cannot_be_served_is_kept_with_the_reason(name: str) -> None:
    function, text = KEPT[name]
    torch._dynamo.reset()
    (site,) = [site for site in fxopt.explain(function, *operands()).sites if site.kind == "attention"]
    assert site.status == "kept" and text in site.reason, site.reason
    if function is not drawn_upon:
        check(function, torch.compile(function, backend="fxopt", options={"base": "eager"}), operands())
