"""The meaning of linear attention against its formula, its operator, and what can't be generated."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor

import fxopt.codegen.meanings  # noqa: F401 - canonical operators get their meaning
from fxopt.codegen.linear_attention import reference
from fxopt.codegen.linear_attention.config import LinearConfig, read_linear_config
from fxopt.codegen.linear_attention.kernel import candidates, objection, source
from fxopt.codegen.linear_attention.operands import Operands, read_operands
from fxopt.codegen.linear_attention.operator import linear_attention_forward
from fxopt.errors import ExpressionError, LoweringError
from fxopt.ir.linear_attention import LinearSpec, read_linear_spec
from fxopt.ir.operators import overload, quick_result
from tests.codegen.linear_cases import CASES, LinearCase, leaves, widened

DOUBLE, HALF = torch.float64, torch.bfloat16
CONFIG = "linear-32x16w4g1"
each = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def formula(case: LinearCase, given: tuple[Tensor | None, ...]) -> Tensor:
    """All weights written out, and the convolution tap by tap."""
    q, k, v, positions, keep, weight, bias = given
    assert q is not None and k is not None and v is not None
    key = torch.relu(k if positions is None else k + positions)
    weights = torch.relu(q) @ key.mT
    weights = weights if keep is None else weights * keep[:, None, None, :]
    weights = weights.tril() if case.causal else weights
    out = weights @ v / (weights.sum(-1, keepdim=True) + 1e-6)
    if weight is None or bias is None:
        return out
    margin, grid = weight.shape[-1] // 2, v[:, :, case.first :].unflatten(2, (case.side, case.side))
    framed = torch.nn.functional.pad(grid, (0, 0, margin, margin, margin, margin))
    near = bias + sum(
        framed[:, :, y : y + case.side, x : x + case.side] * weight[:, y, x]
        for y in range(weight.shape[-1])
        for x in range(weight.shape[-1])
    )
    return torch.cat((out[:, :, : case.first], out[:, :, case.first :] + near.flatten(2, 3)), 2)


@each
def test_meaning_is_the_formula_in_float64(case: LinearCase) -> None:
    given = widened(case.draw(DOUBLE))
    out = overload("linear_attention")(*given, str(case.spec(DOUBLE)))
    expected = formula(case, given)
    assert float((out - expected).detach().abs().max()) <= 1e-12 * float(expected.detach().abs().max())
    cotangent = torch.randn_like(out)
    found = torch.autograd.grad(out, leaves(given), cotangent)
    for actual, wanted in zip(found, torch.autograd.grad(expected, leaves(given), cotangent), strict=True):
        assert float((actual - wanted).abs().max()) <= 1e-11 * max(float(wanted.abs().max()), 1.0)


def test_both_associations_are_the_same() -> None:
    q, k, v = (torch.rand(2, 2, 9, 64, dtype=DOUBLE) for _ in range(3))
    assert not reference.is_linear(9, 9, 64, 64) and reference.is_linear(49, 49, 32, 32)
    torch.testing.assert_close(reference._whole(q, k, v), q @ (k.mT @ v), rtol=1e-13, atol=1e-13)


def test_a_query_without_any_key_gives_zero_and_finite_gradients() -> None:
    q = torch.full((1, 1, 3, 16), -1.0, requires_grad=True)
    k, v = (torch.randn(1, 1, 3, 16, requires_grad=True) for _ in range(2))
    out = overload("linear_attention")(q, k, v, None, None, None, None, str(LinearSpec()))
    assert torch.equal(out, torch.zeros_like(out))
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("name", ["padded", "causal"])
def test_sums_are_wide_under_autocast(name: str) -> None:
    given, spec = CASES[name].draw(HALF), str(CASES[name].spec(HALF))
    expected = overload("linear_attention")(*given, spec)
    with torch.autocast("cpu", HALF):
        assert torch.equal(overload("linear_attention")(*given, spec), expected)


def test_padding_is_seen_by_nobody() -> None:
    case = CASES["padded"]
    q, k, v, *rest = case.draw(DOUBLE)
    keep = rest[1]
    assert k is not None and v is not None and keep is not None
    spec = str(case.spec(DOUBLE))
    out = overload("linear_attention")(q, k, v, None, keep, None, None, spec)
    poisoned = [torch.where(keep[:, None, :, None], x, torch.nan if x is k else 1e6) for x in (k, v)]
    torch.testing.assert_close(overload("linear_attention")(q, *poisoned, None, keep, None, None, spec), out)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@each
def test_fake_result_is_like_the_real_one(case: LinearCase, layout: str) -> None:
    given, spec = case.draw(torch.float32), str(case.spec(HALF, layout))
    real = overload("linear_attention")(*given, spec)
    make = quick_result(overload("linear_attention"))
    assert make is not None
    empty = make(*given, spec)
    assert (real.shape, real.dtype, real.stride()) == (empty.shape, empty.dtype, empty.stride())


@pytest.mark.parametrize("name", ["class-token", "cross", "causal-padded"])
def test_operator_has_right_gradients_twice(name: str) -> None:
    small = {"class-token": (3, 3, 5), "cross": (3, 4, 0), "causal-padded": (4, 3, 0)}[name]
    case = CASES[name]
    side = 2 if case.side else 0
    tokens = 5 if side else 6
    case = LinearCase(
        small[0], small[1], tokens, tokens, case.operands.replace("c5", "c3"), case.causal, side, case.first
    )
    given, spec = widened(case.draw(DOUBLE)), str(case.spec(DOUBLE))

    def run(*operands: Tensor | None) -> Tensor:
        out: Tensor = linear_attention_forward(*operands, spec, CONFIG, True)[0]
        return out

    assert torch.autograd.gradcheck(run, given)  # type: ignore[arg-type]  # None is an operand like any other
    assert torch.autograd.gradgradcheck(run, given)  # type: ignore[arg-type]
    torch.library.opcheck(linear_attention_forward, (*given, spec, CONFIG, True))


def test_printed_forms_are_read_back() -> None:
    spec = LinearSpec(side=7, first=1, out_dtype=HALF, out_layout="bshd")
    assert read_linear_spec(str(spec)) == spec
    assert read_linear_config(CONFIG) == LinearConfig("linear", 32, 16, 4, 1)
    assert [str(read_operands(text)) for text in ("", "pkc5", "k")] == ["", "pkc5", "k"]


@pytest.mark.parametrize("text", ["", "causal=maybe; grid=None; eps=1e-06; out=f32:bhsd",
                                  "causal=False; grid=0+7x6; eps=1e-06; out=f32:bhsd",
                                  "causal=True; grid=0+7x7; eps=1e-06; out=f32:bhsd",
                                  "causal=False; grid=None; eps=0.0; out=f32:bhsd"])  # fmt: skip
def test_nonsense_is_no_specification(text: str) -> None:
    with pytest.raises(ExpressionError):
        read_linear_spec(text)


@pytest.mark.parametrize("text", ["linear-32", "other-32x32w4g1", "linear-8x32w4g1", "linear-48x32w4g1"])
def test_nonsense_is_no_configuration(text: str) -> None:
    with pytest.raises(LoweringError):
        read_linear_config(text)


@pytest.mark.parametrize(("spec", "dims", "dtype", "operands", "reason"), [
    (LinearSpec(), (300, 64), HALF, "", "1 to 256"),
    (LinearSpec(causal=True), (64, 200), HALF, "", "1 to 128"),
    (LinearSpec(causal=True), (128, 64), torch.float32, "", "1 to 64"),
    (LinearSpec(), (64, 64), DOUBLE, "", "float32, not torch.float64"),
    (LinearSpec(out_dtype=DOUBLE), (64, 64), HALF, "", "float64 arithmetic"),
    (LinearSpec(), (64, 64), HALF, "c5", "don't fit a grid of side 0"),
    (LinearSpec(side=7), (64, 64), HALF, "c4", "filters of side 4"),
])  # fmt: skip
def test_what_can_not_be_generated_is_said(
    spec: LinearSpec, dims: tuple[int, int], dtype: torch.dtype, operands: str, reason: str
) -> None:
    told = objection(spec, *dims, dtype, read_operands(operands))
    assert told is not None and reason in told
    assert candidates(spec, (None, None), dims, dtype, read_operands(operands)) == ()
    with pytest.raises(LoweringError, match="lower it to ATen"):
        source(spec, *dims, dtype, read_operands(operands), CONFIG)


def test_association_is_chosen_by_products() -> None:
    few = candidates(LinearSpec(), (9, 9), (64, 64), HALF, Operands())
    assert {config.association for config in few} == {"quadratic"}
    for sizes in ((49, 49), (196, 196), (None, 9)):
        many = candidates(LinearSpec(), sizes, (32, 32), HALF, Operands())
        assert {config.association for config in many} == {"linear"}
    windows = candidates(LinearSpec(), (49, 49), (32, 32), HALF, Operands())
    assert {config.group for config in windows} == {1, 4}


def test_source_is_deterministic_and_readable() -> None:
    spec = LinearSpec(side=7, out_dtype=HALF)
    texts = {source(spec, 32, 32, HALF, Operands(True, False, 5), CONFIG) for _ in range(2)}
    (text,) = texts
    assert "grid=0+7x7" in text.splitlines()[9] or "grid=0+7x7" in text
    assert max(map(len, text.splitlines())) <= 160
    assert "def launch(" in text and 'if __name__ == "__main__":' in text


@pytest.mark.parametrize(("side", "first", "config", "serves"), [
    (7, 0, "quadratic-64x16w4g1", True), (4, 0, "quadratic-32x16w4g1", True),
    (5, 0, "quadratic-32x16w4g1", False), (4, 0, "quadratic-16x16w4g1", False),
    (5, 1, "quadratic-64x16w4g1", False),
])  # fmt: skip
def test_tokens_that_all_meet_lie_in_one_block(side: int, first: int, config: str, serves: bool) -> None:
    spec, operands = LinearSpec(side=side, first=first), read_operands("pc3")
    with contextlib.nullcontext() if serves else pytest.raises(LoweringError, match="in one block"):
        source(spec, 16, 16, torch.float32, operands, config)


def test_tokens_before_a_grid_read_nothing_of_it() -> None:
    case = CASES["class-token before tiles"]
    text = source(case.spec(HALF), 16, 16, HALF, case.optional, "linear-64x16w4g1")
    assert text.count("inside = ((tile >= 0) & (y >= 0)") == 2


@pytest.mark.parametrize("tokens", [20, 30])
def test_tokens_that_are_no_grid_are_refused(tokens: int) -> None:
    case = LinearCase(16, 16, tokens, tokens, "pc3", side=5)
    with torch._subclasses.FakeTensorMode(), pytest.raises(LoweringError, match="are not the 25 tokens of the grid"):
        given = [None if x is None else torch.empty(x.shape, dtype=x.dtype) for x in case.draw(HALF)]
        linear_attention_forward(*given, str(case.spec(HALF)), "linear-32x16w4g1", False)
