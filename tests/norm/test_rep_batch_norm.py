"""RepBatchNorm in training: the schedule, the mathematics, masks, hostile statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

import fxopt
from fxopt.errors import MaskError
from fxopt.passes import RepBatchNorm
from fxopt.passes.norm.rep_module import RepNorm
from tests.norm.models import CHANNELS, One, encoder, inputs

EPS = 1e-5


def rep_norm(**options: Any) -> RepNorm:
    """A progressive norm in float64 whose parameters are all unlike 0 and 1."""
    torch.manual_seed(0)
    student = fxopt.prepare(
        One(nn.LayerNorm(CHANNELS)).double(), (inputs(1)[0].double(),), passes=[RepBatchNorm(**options)]
    )
    norm = student.norm
    assert isinstance(norm, RepNorm)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return norm.train()


def batch_norm(norm: RepNorm, x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    assert norm.alpha is not None
    return (x - mean) / (variance + EPS).sqrt() * norm.batch_weight + norm.batch_bias + norm.alpha * x


@pytest.mark.parametrize(("steps", "warmup"), [(7, 3), (10, 0), (1, 0), (3, 5), (0, 2), (0, 0)])
def test_the_share_of_the_original_falls_linearly_after_the_warm_up_and_stays_at_zero(steps: int, warmup: int) -> None:
    norm = rep_norm(steps=steps, warmup=warmup)
    shares = []
    for _ in range(warmup + steps + 3):
        shares.append(norm.remaining())
        norm.advance()
    falling = [(steps - k) / steps for k in range(steps)]
    assert shares == [1.0] * warmup + falling + [0.0] * 3


def test_the_share_is_exact_in_float32_for_long_schedules() -> None:
    norm = rep_norm(steps=300_000, warmup=10_000)
    for step in (0, 10_000, 10_001, 159_999, 309_999, 310_000, 10**9):
        norm.step.fill_(step)
        expected = torch.tensor(300_000 - min(max(step - 10_000, 0), 300_000)) / torch.tensor(300_000)
        assert torch.equal(norm.share(torch.float32), expected)


@pytest.mark.parametrize("step", [0, 1, 3, 4])
def test_training_mixes_the_original_with_the_batch_norm_of_the_batch(step: int) -> None:
    norm = rep_norm(steps=4)
    norm.step.fill_(step)
    x = inputs(1)[0].double().requires_grad_()
    share = 1 - step / 4
    variance, mean = torch.var_mean(x.flatten(0, 1), 0, correction=0)
    original = layer_norm(x, (CHANNELS,), norm.get_parameter("weight"), norm.get_parameter("bias"))
    expected = share * original + (1 - share) * batch_norm(norm, x, mean, variance)
    found = norm(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    cotangent, sources = torch.randn_like(x), [x, *norm.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(found, sources, cotangent), torch.autograd.grad(expected, sources, cotangent),
        rtol=1e-10, atol=1e-10,
    )  # fmt: skip


def test_at_the_start_it_is_the_original_bit_for_bit() -> None:
    model = encoder().train()
    (x,) = inputs(1)
    student = fxopt.prepare(model, (x,), passes=[RepBatchNorm(steps=5)])
    assert torch.equal(student(x), model(x))


def test_a_step_moves_the_running_statistics_towards_those_of_its_batch() -> None:
    norm = rep_norm(steps=5, momentum=0.25)
    x = inputs(1)[0].double()
    variance, mean = torch.var_mean(x.flatten(0, 1), 0, correction=0)
    norm(x)
    assert torch.equal(norm.running_mean, torch.zeros(CHANNELS, dtype=torch.float64))
    norm.advance()
    torch.testing.assert_close(norm.running_mean, 0.25 * mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(norm.running_var, 0.75 + 0.25 * variance, rtol=1e-12, atol=0)
    norm.advance()
    torch.testing.assert_close(norm.running_mean, 0.25 * mean, rtol=1e-12, atol=0)


def test_evaluation_is_one_scale_and_one_shift_at_any_step() -> None:
    norm = rep_norm(steps=5)
    x = inputs(1)[0].double()
    norm(x)
    norm.advance()
    expected = batch_norm(norm, x, norm.running_mean, norm.running_var)
    torch.testing.assert_close(norm.eval()(x), expected, rtol=1e-12, atol=1e-12)


def test_the_plain_exchange_has_no_original_and_no_alpha() -> None:
    norm = rep_norm(steps=0, alpha=None)
    assert norm.alpha is None
    x = inputs(1)[0].double()
    variance, mean = torch.var_mean(x.flatten(0, 1), 0, correction=0)
    expected = (x - mean) / (variance + EPS).sqrt() * norm.batch_weight + norm.batch_bias
    torch.testing.assert_close(norm(x), expected, rtol=1e-12, atol=1e-12)


def test_start_scales_what_the_batch_norm_begins_with() -> None:
    model = encoder()
    student = fxopt.prepare(model, (inputs(1)[0],), passes=[RepBatchNorm(steps=5, start=0.0, alpha=0.0)])
    last = student.last
    assert isinstance(last, RepNorm)
    assert last.alpha is not None
    assert not any(bool(p.any()) for p in (last.batch_weight, last.batch_bias, last.alpha))
    as_it_was = fxopt.prepare(model, (inputs(1)[0],), passes=[RepBatchNorm(steps=5)]).last
    assert isinstance(as_it_was, RepNorm)
    assert torch.equal(as_it_was.batch_weight, model.last.weight)


def padded(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` with padding of NaN behind its rows, and the mask of what is not padding."""
    lengths = torch.tensor([5, 3, 1, 0])
    mask = torch.arange(x.shape[1]) < lengths[:, None]
    return torch.where(mask[..., None], x, torch.nan), mask


@pytest.mark.parametrize("as_keyword", [True, False])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64], ids=str)
def test_tokens_that_the_mask_leaves_out_do_not_count(dtype: torch.dtype, as_keyword: bool) -> None:
    student = fxopt.prepare(encoder().double(), (inputs(1)[0].double(),), passes=[RepBatchNorm(steps=5)]).train()
    x, mask = padded(inputs(1)[0].double())
    student(x, attention_mask=mask.to(dtype)) if as_keyword else student(x, mask.to(dtype))
    norm = student.get_submodule("blocks.0.norm")
    assert isinstance(norm, RepNorm)
    variance, mean = torch.var_mean(x[mask], 0, correction=0)
    torch.testing.assert_close(norm.batch_mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(norm.batch_variance, variance, rtol=1e-12, atol=1e-12)
    student(inputs(1)[0].double())
    assert norm.batch_mean.isfinite().all()
    assert not torch.equal(norm.batch_mean, mean)


def test_gradients_of_a_masked_batch_are_those_of_the_tokens_that_count() -> None:
    norm = rep_norm(steps=0)
    x = inputs(1)[0].double().requires_grad_()
    mask = torch.arange(5) < torch.tensor([5, 3, 1, 0])[:, None]
    norm.mask.value = mask
    found = norm(x)[mask]
    norm.mask.value = None
    expected = norm(x[mask][None])[0]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    cotangent, sources = torch.randn_like(found), [x, norm.batch_weight, norm.batch_bias]
    torch.testing.assert_close(
        torch.autograd.grad(found, sources, cotangent), torch.autograd.grad(expected, sources, cotangent),
        rtol=1e-10, atol=1e-10,
    )  # fmt: skip


def test_with_all_tokens_masked_the_running_statistics_serve_and_stay() -> None:
    norm = rep_norm(steps=0)
    x = inputs(1)[0].double()
    norm(x)
    norm.advance()
    before = norm.running_mean.clone(), norm.running_var.clone()
    norm.mask.value = torch.zeros(4, 5, dtype=torch.bool)
    y = norm(x)
    norm.advance()
    torch.testing.assert_close(y, batch_norm(norm, x, *before), rtol=1e-12, atol=1e-12)
    assert torch.equal(norm.running_mean, before[0])
    assert torch.equal(norm.running_var, before[1])


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(4, 1, 1, 5), "this one is torch.float32"),
        (torch.ones(5, 4, dtype=torch.int64), "does not lie over"),
    ],
)
def test_a_mask_that_is_not_one_of_tokens_is_an_error(mask: Tensor, message: str) -> None:
    student = fxopt.prepare(encoder(), (inputs(1)[0],), passes=[RepBatchNorm(steps=5)]).train()
    with pytest.raises(MaskError, match=message):
        student(inputs(1)[0], mask)
    without = fxopt.prepare(encoder(), (inputs(1)[0],), passes=[RepBatchNorm(steps=5, mask=None)]).train()
    assert without(inputs(1)[0], mask).isfinite().all()


def test_masks_lie_over_flattened_tokens_and_over_heads() -> None:
    norm = rep_norm(steps=0)
    mask = torch.arange(5) < torch.tensor([5, 3, 1, 0])[:, None]
    x = inputs(1)[0].double()
    norm.mask.value = mask
    norm(x.flatten(0, 1))
    flat = norm.batch_mean.clone()
    norm(x[:, :, None].expand(4, 5, 3, CHANNELS))
    for found in (flat, norm.batch_mean):
        torch.testing.assert_close(found, x[mask].mean(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("warmup", [0, 1])
def test_a_channel_without_variance_has_finite_results_and_gradients(warmup: int) -> None:
    norm = rep_norm(steps=2, warmup=warmup)
    norm.advance()
    x = inputs(1)[0].double()
    x[..., 3] = 7.0
    x.requires_grad_()
    y = norm(x)
    gradients = torch.autograd.grad(y.square().sum(), [x, *norm.parameters()])
    assert all(value.isfinite().all() for value in (y, *gradients))


def test_one_token_has_the_shift_alone() -> None:
    norm = rep_norm(steps=0)
    x = torch.randn(1, 1, CHANNELS, dtype=torch.float64, requires_grad=True)
    assert norm.alpha is not None
    y = norm(x)
    torch.testing.assert_close(y, norm.batch_bias + norm.alpha * x, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, norm.alpha.expand_as(x), rtol=1e-9, atol=1e-9)
    norm.advance()
    assert norm.running_var.isfinite().all()


def test_an_empty_batch_changes_no_statistics() -> None:
    norm = rep_norm(steps=0)
    assert norm(torch.zeros(0, 5, CHANNELS, dtype=torch.float64)).shape == (0, 5, CHANNELS)
    norm.advance()
    assert torch.equal(norm.running_mean, torch.zeros(CHANNELS, dtype=torch.float64))
    assert norm.running_var.isfinite().all()


def test_half_precision_is_computed_in_float32() -> None:
    student = fxopt.prepare(encoder().bfloat16(), (inputs(1)[0].bfloat16(),), passes=[RepBatchNorm(steps=4)])
    norm = student.get_submodule("last").train()
    assert isinstance(norm, RepNorm)
    norm.step.fill_(2)
    assert norm.running_mean.dtype == torch.float32
    x = inputs(1)[0].bfloat16()
    reference = fxopt.testing.oracle(norm, x)
    y = norm(x)
    assert y.dtype == torch.bfloat16
    error = (y.detach().double() - reference).abs().max()
    assert float(error) <= 2**-8 * float(reference.abs().max())
