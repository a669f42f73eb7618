"""``fxopt::attention_weights_forward`` on the CPU: registration, gradients, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fxopt.codegen.attention.weights.kernel import candidates, source
from fxopt.codegen.attention.weights.operator import attention_weights_forward
from fxopt.codegen.attention.weights.reference import attention_statistics, attention_weights
from fxopt.errors import LoweringError
from fxopt.ir.attention import AttentionSpec, Capture
from fxopt.ir.expression import parse
from tests.codegen.cases import EXPRESSIONS, SHAPES, captured, operands, specification

CONFIG = "64x32w4s2"
KINDS = ("weights", "column_sum", "diagonal")


def leaves(name: str, shape: str) -> tuple[AttentionSpec, list[Tensor], list[Tensor]]:
    """A specification, ``[q, k]`` and its captures in float64, all that can requiring a gradient."""
    torch.manual_seed(2)
    sizes = SHAPES[shape]
    spec = specification(name, sizes, torch.float64, empty_rows="zero")
    inputs = [x.detach().clone().requires_grad_() for x in operands(sizes, torch.float64)[:2]]
    captures = captured(name, sizes, spec)
    return spec, inputs, [c.detach().clone().requires_grad_(c.is_floating_point()) for c in captures]


def meaning(kind: str, q: Tensor, k: Tensor, captures: list[Tensor], spec: str) -> Tensor:
    if kind == "weights":
        return attention_weights(q, k, captures, spec)
    return attention_statistics(q, k, captures, spec, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "shape"), [("swin", "fewer-keys"), ("causal-padding", "packed"), ("plain", "one-row")]
)
def test_opcheck(name: str, shape: str, kind: str) -> None:
    spec, inputs, captures = leaves(name, shape)
    results = torch.library.opcheck(attention_weights_forward, (*inputs, captures, str(spec), kind, CONFIG))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", ["tails", "one-row", "fewer-keys", "grouped"])
@pytest.mark.parametrize("name", EXPRESSIONS)
def test_gradients_agree_with_the_meaning_under_autograd(name: str, shape: str, kind: str) -> None:
    spec, inputs, captures = leaves(name, shape)
    wanted = [*inputs, *(c for c in captures if c.requires_grad)]
    out = attention_weights_forward(*inputs, captures, str(spec), kind, CONFIG)
    expected = meaning(kind, inputs[0], inputs[1], captures, str(spec))
    cotangent = torch.randn_like(out)
    found = torch.autograd.grad(out, wanted, cotangent)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(found, torch.autograd.grad(expected, wanted, cotangent))


def test_half_precision_gradients_keep_their_dtypes() -> None:
    spec = AttentionSpec(parse("s * 0.125 + c0"), None, (Capture("-h--", torch.float32),), out_dtype=torch.bfloat16)
    inputs = [torch.randn(1, 2, 8, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]
    bias = torch.randn(1, 2, 1, 1, requires_grad=True)
    out = attention_weights_forward(*inputs, [bias], str(spec), "weights", CONFIG)
    gradients = torch.autograd.grad(out.float().square().sum(), [*inputs, bias])
    assert [g.dtype for g in gradients] == [torch.bfloat16] * 2 + [torch.float32]


@pytest.mark.parametrize("change", [{"kind": "row_sum"}, {"k": torch.randn(1, 1, 4, 16).half()}])
def test_refusals_of_the_operator(change: dict[str, Any]) -> None:
    q = torch.randn(1, 1, 4, 16)
    given = {"k": q, "kind": "weights", **change}
    with pytest.raises(LoweringError, match=r"row_sum|share dtype and device"):
        attention_weights_forward(q, given["k"], [], str(AttentionSpec(parse("s"))), given["kind"], CONFIG)


def test_refusals_of_the_generator_say_why() -> None:
    spec = AttentionSpec(parse("s"))
    with pytest.raises(LoweringError, match="float64"):
        source(spec, 64, torch.float64, "weights", CONFIG)
    with pytest.raises(LoweringError, match="'row_sum' is none of weights, column_sum, diagonal"):
        source(spec, 64, torch.float32, "row_sum", CONFIG)
    assert candidates(spec, 300, torch.float32) == ()
    assert candidates(spec, 64, torch.bfloat16, rows=1)[0].block_m == 16
