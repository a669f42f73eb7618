"""The expression table: evaluation against torch, gradients against autograd, emitted text against evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fxopt.codegen.expression import RULES, evaluate, gradient, simplify
from fxopt.codegen.printing import HELPERS, emit, helpers, print_torch
from fxopt.errors import ExpressionError
from fxopt.ir.expression import ARITY, S, call, capture, const, parse

OPERANDS = torch.tensor([[0.3, 1.7, 2.5, 0.9], [0.8, 1.1, 2.5, 3.2], [1.2, 0.4, 0.7, 2.1]], dtype=torch.float64)
EXPECTED: dict[str, Callable[..., Any]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "pow": torch.pow,
    "floordiv": torch.floor_divide, "mod": torch.remainder, "minimum": torch.minimum, "maximum": torch.maximum,
    "neg": torch.neg, "abs": torch.abs, "exp": torch.exp, "log": torch.log, "tanh": torch.tanh,
    "sigmoid": torch.sigmoid, "sqrt": torch.sqrt, "rsqrt": torch.rsqrt, "float": lambda x: x,
    "lt": torch.lt, "le": torch.le, "gt": torch.gt, "ge": torch.ge, "eq": torch.eq, "ne": torch.ne,
    "and": torch.logical_and, "or": torch.logical_or, "not": torch.logical_not, "where": torch.where,
}  # fmt: skip
LOGIC = ("and", "or", "not")
SMOOTH = [op for op in ARITY if op not in ("lt", "le", "gt", "ge", "eq", "ne", *LOGIC, "floordiv", "where")]


def operands_of(op: str) -> list[Tensor]:
    values = [OPERANDS[n].clone() for n in range(ARITY[op])]
    if op in LOGIC:
        return [v > 1 for v in values]
    return [values[0] > 1, *values[1:]] if op == "where" else values


@pytest.mark.parametrize("op", ARITY)
def test_evaluate_agrees_with_torch(op: str) -> None:
    values = operands_of(op)
    found = evaluate(call(op, *map(capture, range(len(values)))), {}, values)
    torch.testing.assert_close(found, EXPECTED[op](*values), rtol=0, atol=0)


@pytest.mark.parametrize(("op", "position"), [
    (op, n) for op in ARITY if op not in LOGIC for n in range(op == "where", ARITY[op])
])  # fmt: skip
def test_evaluate_takes_numbers_for_operands(op: str, position: int) -> None:
    values = operands_of(op)
    expr = call(op, *(const(1.5) if n == position else capture(n) for n in range(len(values))))
    given = [torch.full_like(v, 1.5) if n == position else v for n, v in enumerate(values)]
    found = evaluate(expr, {"s": OPERANDS[0]}, values)
    torch.testing.assert_close(torch.as_tensor(found).expand(4).double(), EXPECTED[op](*given).expand(4).double())


def test_integers_become_real_in_the_dtype_of_the_scores() -> None:
    j = torch.arange(1, 5)
    found = evaluate(parse("float(j) / 3 + s"), {"s": torch.zeros(4, dtype=torch.float64), "j": j})
    assert found.dtype is torch.float64
    assert torch.equal(found, j.double() / 3)


def test_truth_values_count_as_integers() -> None:
    found = evaluate(parse("1 - c0"), {}, [torch.tensor([True, False])])
    assert found.tolist() == [0, 1]


@pytest.mark.parametrize("op", SMOOTH)
def test_gradient_agrees_with_autograd(op: str) -> None:
    values = [v.requires_grad_() for v in operands_of(op)]
    expr = call(op, *map(capture, range(len(values))))
    expected = torch.autograd.grad(EXPECTED[op](*values).sum(), values)
    for n, want in enumerate(expected):
        found = evaluate(gradient(expr, capture(n)), {}, [v.detach() for v in values])
        torch.testing.assert_close(torch.as_tensor(found, dtype=torch.float64).expand(4), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("text", [
    "50.0 * tanh(s * 0.125 / 50.0) + c0", "where(c1 > 1.0, s * c0, -inf)", "s * sigmoid(c0) + c0 ** 2 * exp(-c1)",
    "minimum(s, c0) + maximum(s * c1, 0.5)", "abs(s - c0) * rsqrt(c1 + 1.0) + log(c0) * 2 ** c1",
])  # fmt: skip
def test_gradient_of_a_composition(text: str) -> None:
    expr = parse(text)
    s, c0, c1 = (OPERANDS[n].clone().requires_grad_() for n in range(3))
    value = evaluate(expr, {"s": s}, [c0, c1])
    weights = torch.where(value.isfinite(), 1.0, 0.0)
    expected = torch.autograd.grad(value, (s, c0, c1), weights, allow_unused=True, materialize_grads=True)
    for leaf, want in zip((S, capture(0), capture(1)), expected, strict=True):
        found = evaluate(gradient(expr, leaf), {"s": s.detach()}, [c0.detach(), c1.detach()])
        torch.testing.assert_close(torch.as_tensor(found, dtype=torch.float64).expand(4), want)


def test_gradient_of_a_linear_score_is_a_constant() -> None:
    assert gradient(parse("(s * 0.125 + c0) / 2.0 - c1"), S) == const(0.0625)
    assert gradient(parse("c0 * float(j - i)"), S) == const(0.0)
    assert str(gradient(parse("where(j <= i, s * 0.125, -inf)"), S)) == "where((j <= i), 0.125, 0.0)"


@pytest.mark.parametrize(("text", "simple"), [
    ("x + 0", "s"), ("0 + x", "s"), ("x * 1.0", "s"), ("x * 0", "0.0"), ("x - 0", "s"), ("x / 1", "s"),
    ("where(1 < 2, x, 7)", "s"), ("where(j < i, x, x)", "s"), ("(2 + 3) * 4", "20"), ("1 / 0", "(1 / 0)"),
])  # fmt: skip
def test_simplify(text: str, simple: str) -> None:
    assert str(simplify(parse(text.replace("x", "s")))) == simple


@pytest.mark.parametrize(("text", "emitted"), [
    ("s * 0.125 + c0", "(s * 0.125) + c0"),
    ("s / 8.0", "s * 0.125"),
    ("s * 0.5 * 0.25", "s * 0.125"),
    ("where(~c1, s, -inf)", 'tl.where((c1 == 0), s, float("-inf"))'),
    ("where(c1, s, -1e300)", 'tl.where(c1, s, float("-inf"))'),
    ("s + 1e-300", "s + 0.0"),
    ("(1 - c1) * -10000.0", "(1 - c1.to(tl.int32)) * -10000.0"),
    ("s + c0 * float(j - i)", "s + (c0 * (j - i).to(tl.float32))"),
    ("(j - i) // 4", "floor_divide((j - i), 4)"),
    ("s // 4", "tl.floor(s / 4)"),
    ("s ** 2", "s * s"),
    ("tanh(s)", "tanh(s, FAST_TANH)"),
])  # fmt: skip
def test_emit(text: str, emitted: str) -> None:
    assert emit(parse(text), {}, ("float", "bool")) == emitted


def test_emit_uses_the_given_names() -> None:
    assert emit(parse("s + c0 + i"), {"s": "score", "c0": "bias", "i": "row"}) == "(score + bias) + row"


@pytest.mark.parametrize("text", ["c0 + c1", "c0 - c1 * 3", "-c0 / c1", "c0 < c1", "c0 >= c1", "c0 == c1", "c0 != c1"])
def test_emitted_operators_are_python(text: str) -> None:
    values = {"c0": 2.0, "c1": 3.0}
    expected = evaluate(parse(text), {}, [torch.tensor(v, dtype=torch.float64) for v in values.values()])
    assert math.isclose(float(eval(emit(parse(text), {}), {}, values)), float(expected))


def test_helpers_are_what_the_text_calls() -> None:
    assert helpers("x = tanh(s, FAST_TANH) + modulo(i, 3)") == (HELPERS["modulo"], HELPERS["tanh"])
    assert helpers("tl.tanh(s) + softmax_tanh_(s)") == ()


def test_print_torch_is_pytorch() -> None:
    s, c0 = OPERANDS[0], OPERANDS[1]
    expr = parse("where(c0 > 1.0, minimum(tanh(s), 0.5) + float(Sk), -inf)")
    names = {"torch": torch, "s": s, "c0": c0, "Sk": torch.tensor(4)}
    found = eval(print_torch(expr), names)
    torch.testing.assert_close(found, evaluate(expr, {"s": s, "Sk": 4}, [c0]))


def test_every_operation_has_a_rule_and_unknown_ones_have_none() -> None:
    assert RULES.keys() == ARITY.keys()
    with pytest.raises(ExpressionError, match="not an operation"):
        call("sinh", S)
