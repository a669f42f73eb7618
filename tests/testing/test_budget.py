from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fxopt.testing import Evaluation, assert_within_budget, compare, draw, evaluate, oracle, oracle_gradients

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def program(x: Tensor) -> Tensor:
    return (x @ x.mT).softmax(-1) @ x


def reassociated(x: Tensor) -> Tensor:
    return (x.flip(-1) @ x.flip(-1).mT).softmax(-1) @ x


def wrong_axis(x: Tensor) -> Tensor:
    return (x @ x.mT).softmax(0) @ x


@pytest.mark.parametrize("dtype", DTYPES)
def test_reassociation_is_within_the_budget_with_gradients(dtype: torch.dtype) -> None:
    x = (draw((64, 64), dtype=dtype) / 4).requires_grad_()
    reports = assert_within_budget(evaluate(reassociated, x), evaluate(program, x), oracle_gradients(program, x))
    assert [report.name for report in reports] == ["outputs", "gradients['args[0]']"]
    assert all(0 < report.used <= 1 for report in reports)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_wrong_axis_is_caught(dtype: torch.dtype) -> None:
    x = draw((64, 64), dtype=dtype) / 4
    with pytest.raises(AssertionError, match=r"outputs: max error .* times its budget"):
        assert_within_budget(wrong_axis(x), program(x), oracle(program, x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_scale_off_by_one_percent_is_caught(dtype: torch.dtype) -> None:
    x = draw((64, 64), dtype=dtype) / 4
    with pytest.raises(AssertionError, match="budget"):
        assert_within_budget(program(x) * 1.03, program(x), oracle(program, x))


def test_the_band_admits_one_rounding_where_eager_is_exact() -> None:
    eager = torch.ones(4)
    step = torch.finfo(torch.float32).eps
    assert compare(eager - step / 2, eager, eager.double())[0].ok
    assert not compare(eager + 2 * step, eager, eager.double())[0].ok


def test_the_mean_is_budgeted_separately() -> None:
    reference = torch.ones(1000, dtype=torch.float64)
    eager = reference.float()
    eager[0] += 1e-3
    (report,) = compare(reference.float() + 1e-3, eager, reference)
    assert report.rewritten <= report.budget
    assert report.problems == ("the mean error is over its budget",)


def _nan(x: Tensor) -> Tensor:
    return torch.cat([x.new_full((1,), math.nan), x[1:]])


def _negative_infinity(x: Tensor) -> Tensor:
    return torch.cat([x.new_full((1,), -math.inf), x[1:]])


def _positive_infinity(x: Tensor) -> Tensor:
    return -_negative_infinity(-x)


@pytest.mark.parametrize(
    ("actual", "eager", "message"),
    [
        (torch.clone, _nan, "no longer are"),
        (_nan, torch.clone, "1 values became NaN"),
        (_positive_infinity, torch.clone, "1 values became infinite"),
        (_positive_infinity, _negative_infinity, "changed its sign"),
        (lambda x: x[None], torch.clone, r"shape is \[1, 3\] where eager gives \[3\]"),
        (lambda x: x.half(), torch.clone, "dtype is torch.float16 where eager gives torch.float32"),
        (lambda x: x.to("meta"), torch.clone, "device is meta where eager gives cpu"),
    ],
)
def test_a_difference_of_form_is_caught(
    actual: Callable[[Tensor], Tensor], eager: Callable[[Tensor], Tensor], message: str
) -> None:
    x = torch.ones(3)
    with pytest.raises(AssertionError, match=message):
        assert_within_budget(actual(x), eager(x), x.double())


def test_equal_special_values_pass() -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, 1.0])
    assert assert_within_budget(x, x.clone(), x.double())[0].rewritten == 0


def test_a_reference_that_overflows_is_reported() -> None:
    (report,) = compare(torch.ones(1), torch.ones(1), torch.tensor([math.inf], dtype=torch.float64))
    assert "reference is not finite" in report.problems[0]


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_integers_and_booleans_must_be_equal(dtype: torch.dtype) -> None:
    x = torch.tensor([0, 1, 1]).to(dtype)
    y = torch.tensor([0, 1, 0]).to(dtype)
    assert compare(x, x.clone(), x)[0].ok
    assert compare(y, x, x)[0].problems == ("1 of 3 values differ from eager's",)


def test_missing_gradients_and_changed_constants_are_reported() -> None:
    x = torch.ones(1)
    eager = Evaluation((x, "kept"), {"args[0]": x})
    (first, second, third) = compare(Evaluation((x, "lost")), eager, eager)
    assert first.ok
    assert second.problems == ("is 'lost' where eager gives 'kept'",)
    assert third.problems == ("missing from the rewritten results",)


def test_nothing_to_compare_is_a_failure() -> None:
    with pytest.raises(AssertionError, match="nothing to compare"):
        assert_within_budget((), (), ())


def test_floor_and_precision_widen_the_band() -> None:
    noise, zero, reference = torch.full((1,), 2.0**-26), torch.zeros(1), torch.zeros(1, dtype=torch.float64)
    assert not compare(noise, zero, reference)[0].ok
    assert compare(noise, zero, reference, floor=1.0)[0].ok
    assert not compare(noise * 2**16, zero, reference, floor=1.0)[0].ok
    assert compare(noise * 2**16, zero, reference, floor=1.0, precision=torch.bfloat16)[0].ok


def test_ratio_and_used() -> None:
    (report,) = compare(torch.tensor([1.2]), torch.tensor([1.1]), torch.tensor([1.0], dtype=torch.float64))
    assert report.ratio == pytest.approx(2.0, rel=1e-5)
    assert report.used == pytest.approx(1.0, rel=1e-5)
    (unlucky,) = compare(torch.ones(1) * 2, torch.ones(1), torch.ones(1, dtype=torch.float64))
    assert unlucky.ratio == math.inf
