"""``fxopt::attention_and_weights_forward`` on the CPU: registration, results, gradients, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxopt.codegen.attention import reference
from fxopt.codegen.attention.weights.reference import exact_weights
from fxopt.codegen.attention.weights.together import attention_and_weights_forward
from fxopt.codegen.attention.weights.wants import Want, of_want, printed, read_wants
from fxopt.errors import LoweringError
from fxopt.ir.attention import AttentionSpec
from tests.codegen.cases import EXPRESSIONS, SHAPES, Shape, captured, operands, specification

CONFIG = "64x32w4s2|64x32w4s2,64x32w4s2,64x32w4s2,64x32w4s2"
WIDE = torch.float64
#: Whole weights and sums of them; and of some rows, for shapes that have so many.
WANTS = (Want("weights", WIDE), Want("column_sum", WIDE), Want("diagonal", WIDE), Want("weights", WIDE, (0, 1, 1)))
CASES = [("swin", "fewer-keys"), ("causal-padding", "packed"), ("plain", "one-row"), ("row-scale", "grouped")]


def leaves(name: str, sizes: Shape) -> tuple[AttentionSpec, list[Tensor], list[Tensor]]:
    """A specification, ``[q, k, v]`` and its captures in float64, all that can requiring a gradient."""
    torch.manual_seed(2)
    spec = specification(name, sizes, WIDE, empty_rows="zero")
    inputs = [x.detach().clone().requires_grad_() for x in operands(sizes, WIDE)]
    captures = captured(name, sizes, spec)
    return spec, inputs, [c.detach().clone().requires_grad_(c.is_floating_point()) for c in captures]


@pytest.mark.parametrize(("name", "shape", "with_lse"), [("swin", "fewer-keys", True), ("plain", "one-row", False)])
def test_opcheck(name: str, shape: str, with_lse: bool) -> None:
    spec, inputs, captures = leaves(name, SHAPES[shape])
    arguments = (*inputs, captures, str(spec), printed(WANTS), CONFIG, with_lse)
    results = torch.library.opcheck(attention_and_weights_forward, arguments)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_results_and_gradients_agree_with_the_meaning_under_autograd(name: str, shape: str) -> None:
    spec, inputs, captures = leaves(name, SHAPES[shape])
    q, k, v = inputs
    changing = [*inputs, *(c for c in captures if c.requires_grad)]
    out, lse, *found = attention_and_weights_forward(*inputs, captures, str(spec), printed(WANTS), CONFIG, False)
    weights = exact_weights(spec, q, k, captures)
    expected = [reference.attention(q, k, v, captures, str(spec)), *(want.of(weights) for want in WANTS)]
    assert lse.numel() == 0
    torch.testing.assert_close([out, *found], expected)
    cotangents = [torch.randn_like(x) for x in expected]
    gradients = torch.autograd.grad([out, *found], changing, cotangents)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, changing, cotangents))


def test_only_what_is_read_has_a_gradient() -> None:
    spec, inputs, captures = leaves("plain", SHAPES["tails"])
    found = attention_and_weights_forward(*inputs, captures, str(spec), printed(WANTS), CONFIG, True)
    q, k, v = torch.autograd.grad(found[4].square().sum(), inputs, materialize_grads=True)
    assert not v.any() and q.any() and k.any()


@pytest.mark.parametrize("name", [name for name in EXPRESSIONS if "band" not in name])
def test_rows_are_those_of_the_whole_weights(name: str) -> None:
    """What a walk is given for some rows: queries, captured tensors and expressions that count as before."""
    spec, (q, k, _), captures = leaves(name, SHAPES["fewer-keys"])
    whole = exact_weights(spec, q, k, captures)
    for rows in ((0, 1, 1), (33, 34, 1), (2, 20, 7)):
        want = Want("weights", WIDE, rows)
        given = q[:, :, want.cut], k, want.captures(spec, captures)
        torch.testing.assert_close(exact_weights(of_want(spec, want, 34), *given), whole[:, :, slice(*rows)])


@pytest.mark.parametrize("wants", [(WANTS[0],), WANTS, (Want("weights", torch.bfloat16, (3, 9, 2)), WANTS[1])])
def test_what_is_wanted_is_read_as_it_is_printed(wants: tuple[Want, ...]) -> None:
    assert read_wants(printed(wants)) == wants


@pytest.mark.parametrize(
    "text", ["", "row_sum:f32", "weights", "weights:f31", "weights[1:1:1]:f32", "diagonal[0:1:1]:f32"]
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(LoweringError, match=r"wanted.*an example is"):
        read_wants(text)
