"""The meaning of attention against maths written by hand, under autograd, fake tensors and symbolic sizes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import scaled_dot_product_attention

from fxopt.codegen.attention.reference import attention
from fxopt.ir.attention import AttentionSpec, Capture
from fxopt.ir.expression import parse
from fxopt.ir.operators import overload
from tests.codegen.cases import EXPRESSIONS, SHAPES, captured, operands, specification


@dataclass(frozen=True)
class Scores:
    """Raw scores with their indices; ``d`` is the key on the diagonal that ends at the last key."""

    s: Tensor
    c: list[Tensor]
    i: Tensor
    j: Tensor
    d: Tensor

    @property
    def x(self) -> Tensor:
        return self.s * 0.125


#: The cases of `EXPRESSIONS` in PyTorch: logits, and which keys are kept.
BY_HAND: dict[str, Callable[[Scores], tuple[Tensor, Tensor | bool]]] = {
    "plain": lambda t: (t.x, True),
    "causal": lambda t: (t.x, t.j <= t.d),
    "window": lambda t: (t.x, (t.j <= t.d) & (t.j > t.d - 7)),
    "both-sides": lambda t: (t.x, (t.i - t.j < 5) & (t.j - t.i <= 3)),
    "padding": lambda t: (t.x, t.c[0]),
    "causal-padding": lambda t: (t.x, (t.j <= t.i) & (t.c[0] != 0)),
    "lengths": lambda t: (t.x, (t.j < t.c[0]) & (t.j >= 2)),
    "softcap": lambda t: (20 * torch.tanh(t.x / 20), True),
    "alibi": lambda t: (t.x + t.c[0].double() * (t.j - t.i), t.j <= t.i),
    "tile-bias": lambda t: (t.x + t.c[0], True),
    "band": lambda t: (t.x + t.c[0][:, :, 0, t.j - t.i + t.s.shape[2] - 1], True),
    "causal-band": lambda t: (t.x + t.c[0][:, :, 0, t.j - t.i + t.s.shape[2] - 1], t.j <= t.i),
    "swin": lambda t: (t.x + t.c[0] + t.c[1], True),
    "row-scale": lambda t: (t.s * t.c[0] + t.c[1], True),
    "finite-fill": lambda t: (torch.where(t.c[0], t.x, -3.3895313892515355e38), True),
    "additive-mask": lambda t: (t.x + t.c[0], True),
    "documents": lambda t: (t.x, t.c[0] == t.c[1]),
    "prefix": lambda t: (t.x, (t.j <= t.i) | (t.j < 3)),
    "chunked": lambda t: (t.x, (t.j <= t.i) & (t.j >= t.i - t.i % 5) & (t.j < t.i - t.i % 5 + 5)),
    "block-diagonal": lambda t: (t.x, (t.j >= t.i - t.i % 24) & (t.j < t.i - t.i % 24 + 24)),
    "dilated": lambda t: (t.x, (t.j <= t.i) & (t.j % 3 == t.i % 3)),
}


def by_hand(name: str, q: Tensor, k: Tensor, v: Tensor, c: list[Tensor], kv_map: str) -> Tensor:
    """The case with repeated heads and a dense mask."""
    repeats = q.shape[1] // k.shape[1]
    if kv_map == "group":
        k, v = (x.repeat_interleave(repeats, 1) for x in (k, v))
    else:
        k, v = (x.repeat(1, repeats, 1, 1) for x in (k, v))
    s = q @ k.transpose(-2, -1)
    i, j = torch.arange(s.shape[2])[:, None], torch.arange(s.shape[3])
    x, kept = BY_HAND[name](Scores(s, c, i, j, i + s.shape[3] - s.shape[2]))
    return torch.softmax(torch.where(torch.as_tensor(kept), x, -math.inf), -1) @ v


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", EXPRESSIONS)
def test_reference_is_the_maths_by_hand(name: str, shape: str) -> None:
    torch.manual_seed(1)
    sizes = SHAPES[shape]
    spec = specification(name, sizes, torch.float64)
    q, k, v = operands(sizes, torch.float64)
    captures = captured(name, sizes, spec)
    expected = by_hand(name, q, k, v, captures, sizes.kv_map)
    out = overload("attention")(q, k, v, captures, str(spec))
    torch.testing.assert_close(out, expected, equal_nan=True, rtol=1e-9, atol=1e-9)
    contiguous = out if sizes.layout == "bhsd" else out.transpose(1, 2)
    assert contiguous.is_contiguous()


def test_periodic_captures_repeat_along_the_batch() -> None:
    spec = AttentionSpec(parse("s + c0"), None, (Capture("p-ij", torch.float64),), out_dtype=torch.float64)
    q, bias = torch.randn(6, 1, 3, 4, dtype=torch.float64), torch.randn(2, 1, 3, 3, dtype=torch.float64)
    expected = torch.softmax(q @ q.mT + bias.repeat(3, 1, 1, 1), -1) @ q
    torch.testing.assert_close(attention(q, q, q, [bias], str(spec)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_softmax_is_at_least_float32_and_the_result_as_specified(dtype: torch.dtype) -> None:
    spec = AttentionSpec(parse("s * 0.25"), out_dtype=dtype, softmax_dtype=dtype)
    q, k, v = (torch.randn(1, 2, 300, 16).to(dtype) for _ in range(3))
    out = attention(q, k, v, [], str(spec))
    weights = torch.softmax((q @ k.mT).float() * 0.25, -1).to(dtype)
    assert out.dtype is dtype
    torch.testing.assert_close(out, weights @ v)


def test_empty_rows_are_zero_with_zero_gradients_where_sdpa_says_so() -> None:
    spec = AttentionSpec(parse("s"), parse("c0"), (Capture("--ij", torch.bool),), empty_rows="zero")
    q, k, v = (torch.randn(1, 1, 3, 4, requires_grad=True) for _ in range(3))
    kept = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])
    out = attention(q, k, v, [kept[None, None]], str(spec))
    torch.testing.assert_close(out, scaled_dot_product_attention(q, k, v, kept, scale=1.0))
    for gradient in torch.autograd.grad(out.sum(), (q, k, v)):
        assert gradient.isfinite().all()


def test_empty_rows_give_the_mean_with_the_gradients_of_a_filled_row() -> None:
    spec = AttentionSpec(parse("s"), parse("c0"), (Capture("--ij", torch.bool),), empty_rows="uniform")
    q, k, v = (torch.randn(1, 1, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    kept = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])
    out = attention(q, k, v, [kept[None, None]], str(dataclasses.replace(spec, out_dtype=torch.float64)))
    filled = torch.softmax((q @ k.mT).masked_fill(~kept, torch.finfo(torch.float64).min), -1) @ v
    torch.testing.assert_close(out, filled)
    torch.testing.assert_close(out[0, 0, 1], v[0, 0].mean(0))
    cotangent = torch.randn_like(out)
    gradients, expected = (torch.autograd.grad(x, (q, k, v), cotangent) for x in (out, filled))
    torch.testing.assert_close(gradients, expected)


def test_dropout_drops_weights_and_keeps_their_mean() -> None:
    spec = AttentionSpec(parse("s * 0.0"), dropout=0.25)
    q, v = torch.randn(1, 1, 4, 8), torch.eye(64)[None, None]
    k = torch.randn(1, 1, 64, 8)
    torch.manual_seed(0)
    weights = attention(q, k, v, [], str(spec)) * 64
    torch.testing.assert_close(weights.unique(), torch.tensor([0.0, 4 / 3]))
    assert 0.6 < (weights > 0).float().mean() < 0.9


@pytest.mark.parametrize("name", ["causal", "swin", "documents", "alibi", "band"])
def test_sizes_stay_symbolic(name: str) -> None:
    sizes = SHAPES["tails"]
    spec = specification(name, sizes, torch.float32)

    text = str(spec)

    def run(q: Tensor, k: Tensor, v: Tensor, *captures: Tensor) -> Tensor:
        return attention(q, k, v, captures, text)

    graph = make_fx(run, tracing_mode="symbolic")(*operands(sizes, torch.float32), *captured(name, sizes, spec))
    longer = dataclasses.replace(sizes, rows=41, keys=41, batch=4)
    inputs = (*operands(longer, torch.float32), *captured(name, longer, spec))
    torch.testing.assert_close(graph(*inputs), run(*inputs), equal_nan=True)
