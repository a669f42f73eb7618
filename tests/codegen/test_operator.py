"""``fxopt::attention_forward`` on the CPU: registration, gradients, refusals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._functorch.aot_autograd import aot_function

from fxopt.codegen.attention import reference
from fxopt.codegen.attention.operator import attention_forward
from fxopt.codegen.launching import DECOMPOSITIONS
from fxopt.errors import LoweringError
from fxopt.ir.attention import AttentionSpec, Capture
from fxopt.ir.expression import parse
from tests.codegen.cases import EXPRESSIONS, SHAPES, Shape, captured, operands, specification
from tests.codegen.vectors import VECTORS

CONFIG = "64x32w4s2"
attention_launch = torch.ops.fxopt.attention_forward_launch.default


def leaves(name: str, shape: str) -> tuple[AttentionSpec, list[Tensor], list[Tensor]]:
    """A specification, ``[q, k, v]`` and its captures in float64, all that can requiring a gradient."""
    torch.manual_seed(2)
    sizes = SHAPES[shape]
    spec = specification(name, sizes, torch.float64, empty_rows="zero")
    inputs = [x.detach().clone().requires_grad_() for x in operands(sizes, torch.float64)]
    captures = captured(name, sizes, spec)
    return spec, inputs, [c.detach().clone().requires_grad_(c.is_floating_point()) for c in captures]


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize(
    ("name", "shape"), [("swin", "fewer-keys"), ("causal-padding", "packed"), ("plain", "one-row")]
)
def test_opcheck(name: str, shape: str, with_lse: bool) -> None:
    spec, inputs, captures = leaves(name, shape)
    results = torch.library.opcheck(attention_forward, (*inputs, captures, str(spec), CONFIG, with_lse))
    assert set(results.values()) == {"SUCCESS"}


def test_opcheck_of_the_launch_without_autograd() -> None:
    spec, inputs, captures = leaves("swin", "fewer-keys")
    arguments = ([x.detach() for x in captures], str(spec), CONFIG, True)
    results = torch.library.opcheck(attention_launch, (*(x.detach() for x in inputs), *arguments))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("trained", [False, True])
def test_base_compilers_launch_without_layers_for_autograd(trained: bool) -> None:
    spec, inputs, captures = leaves("tile-bias", "tails")
    operands = [x.detach().requires_grad_(trained) for x in (*inputs, *captures)]
    called: list[object] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        out: Tensor = attention_forward(q, k, v, [bias], str(spec), CONFIG, True)[0]
        return out

    def base(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        called.extend(node.target for node in gm.graph.nodes)
        return make_boxed_func(gm.forward)

    compiled = aot_function(attend, fw_compiler=base, bw_compiler=base, decompositions=DECOMPOSITIONS)
    out = compiled(*operands)
    torch.testing.assert_close(out, attend(*operands))
    assert attention_launch in called and torch.ops.fxopt.attention_forward.default not in called
    if trained:
        cotangent = torch.randn_like(out)
        found = torch.autograd.grad(out, operands, cotangent)
        torch.testing.assert_close(found, torch.autograd.grad(attend(*operands), operands, cotangent))
    gradients = torch.ops.fxopt.attention_backward, torch.ops.fxopt.attention_backward_launch
    assert [op.default in called for op in gradients] == [False, trained]


@pytest.mark.parametrize("shape", ["tails", "one-row", "fewer-keys", "grouped"])
@pytest.mark.parametrize("name", EXPRESSIONS)
def test_gradients_agree_with_the_reference_under_autograd(name: str, shape: str) -> None:
    spec, inputs, captures = leaves(name, shape)
    q, k, v = inputs
    wanted = [*inputs, *(c for c in captures if c.requires_grad)]
    out, _ = attention_forward(*inputs, captures, str(spec), CONFIG, False)
    expected = reference.attention(q, k, v, captures, str(spec))
    cotangent = torch.randn_like(out)
    found = torch.autograd.grad(out, wanted, cotangent)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(found, torch.autograd.grad(expected, wanted, cotangent))


@pytest.mark.parametrize("name", VECTORS)
def test_gradients_of_rows_that_give_the_mean(name: str) -> None:
    torch.manual_seed(3)
    sizes = Shape(8, 8, 21, 23, 1, batch=4)
    spec = VECTORS[name].specification(torch.float64, "uniform")
    inputs = [x.detach().clone().requires_grad_() for x in operands(sizes, torch.float64)]
    captures = VECTORS[name].draw(sizes)
    q, k, v = inputs
    out, _ = attention_forward(q, k, v, captures, str(spec), CONFIG, False)
    expected = reference.attention(q, k, v, captures, str(spec))
    cotangent = torch.randn_like(out)
    torch.testing.assert_close(out, expected)
    found = torch.autograd.grad(out, inputs, cotangent)
    torch.testing.assert_close(found, torch.autograd.grad(expected, inputs, cotangent))


def test_gradient_of_the_log_sum_exp() -> None:
    spec, inputs, captures = leaves("softcap", "tails")
    q, k = inputs[:2]
    wide = attention_forward(*inputs, captures, str(spec), CONFIG, True)[1]
    found = torch.autograd.grad(wide.sum(), inputs[:2])
    expected = torch.autograd.grad(torch.logsumexp(reference.logits(spec, q, k, captures), -1).sum(), inputs[:2])
    torch.testing.assert_close(found, expected)


def test_half_precision_gradients_keep_their_dtypes() -> None:
    spec = AttentionSpec(parse("s * 0.125 + c0"), None, (Capture("-h--", torch.float32),), out_dtype=torch.bfloat16)
    inputs = [torch.randn(1, 2, 8, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    bias = torch.randn(1, 2, 1, 1, requires_grad=True)
    out, _ = attention_forward(*inputs, [bias], str(spec), CONFIG, False)
    gradients = torch.autograd.grad(out.float().sum(), [*inputs, bias])
    assert [g.dtype for g in gradients] == [torch.bfloat16] * 3 + [torch.float32]


@pytest.mark.parametrize(("change", "reason"), [
    ({"dropout": 0.1}, "needs a seed"),
    ({"seed": torch.tensor([1])}, "has no seed"),
    ({"dtype": torch.float16}, "share dtype and device"),
])  # fmt: skip
def test_refusals_say_why(change: dict[str, object], reason: str) -> None:
    spec = AttentionSpec(parse("s"), dropout=float(change.get("dropout", 0.0)))  # type: ignore[arg-type]
    q = torch.randn(1, 1, 4, 16).to(change.get("dtype", torch.float32))  # type: ignore[call-overload]
    k = torch.randn(1, 1, 4, 16)
    with pytest.raises(LoweringError, match=reason):
        attention_forward(q, k, k, [], str(spec), CONFIG, False, change.get("seed"))
