"""UnifiedNorm in training against its formulas written out step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.passes import UnifiedNorm
from fxopt.passes.norm.unified_module import UnifiedNormalisation
from tests.norm.models import CHANNELS, One, inputs

EPS = 1e-5


def scaled(norm: UnifiedNormalisation, normal: Tensor) -> Tensor:
    return normal * norm.get_parameter("weight") + norm.get_parameter("bias")


def unified(norm: nn.Module | None = None, **options: Any) -> UnifiedNormalisation:
    """In float64, with a weight and a bias unlike 1 and 0."""
    torch.manual_seed(0)
    model = One(norm or nn.LayerNorm(CHANNELS)).double()
    student = fxopt.prepare(model, (inputs(1)[0].double(),), passes=[UnifiedNorm(**options)])
    found = student.norm
    assert isinstance(found, UnifiedNormalisation)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return found.train()


def test_smoothed_gradients_are_not_differentiated_again() -> None:
    norm = unified(warmup=0)
    x = inputs(1)[0].double().requires_grad_()
    (gradient,) = torch.autograd.grad(norm(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


def test_in_the_warm_up_it_is_a_norm_without_mean_and_its_derivative() -> None:
    norm = unified(warmup=100)
    x = inputs(1)[0].double().requires_grad_()
    expected = scaled(norm, x / (x.square().mean((0, 1)) + EPS).sqrt())
    found = norm(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    cotangent, sources = torch.randn_like(x), [x, *norm.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(found, sources, cotangent), torch.autograd.grad(expected, sources, cotangent),
        rtol=1e-10, atol=1e-10,
    )  # fmt: skip


def by_formula(
    batches: list[Tensor], cotangents: list[Tensor], gain: Tensor, warmup: int, window: int
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Results and gradients of every step, and the running second moment, without outliers and below 1000 steps."""
    seconds: list[Tensor] = []
    moments: list[Tensor] = []
    running, average = torch.ones(CHANNELS).double(), torch.zeros(CHANNELS).double()
    results, gradients = [], []
    for step, (x, cotangent) in enumerate(zip(batches, cotangents, strict=True)):
        seconds.append(x.square().mean((0, 1)))
        smooth = step >= max(warmup, window - 1)
        geometric = (torch.stack(seconds[-window:]) + EPS).log().mean(0).exp() - EPS
        v = geometric if smooth else seconds[-1]
        z = x / (v + EPS).sqrt()
        g = cotangent * gain
        moments.append((g * z).mean((0, 1)))
        psi = 0.9 * average + 0.1 * torch.stack(moments[-window:]).mean(0) if smooth else moments[-1]
        results.append(z)
        gradients.append((g - psi * z) / (v + EPS).sqrt())
        running, average = 0.9 * running + 0.1 * v, psi
    return results, gradients, running


@pytest.mark.parametrize(("warmup", "window"), [(0, 4), (3, 2), (5, 4), (0, 1)])
def test_after_the_warm_up_second_moments_and_gradients_are_smoothed(warmup: int, window: int) -> None:
    norm = unified(warmup=warmup, window=window)
    gain, bias = (norm.get_parameter(name).detach() for name in ("weight", "bias"))
    batches = [x.double() for x in inputs(10)]
    cotangents = [x.double() for x in inputs(10, seed=7)]
    results, gradients, running = by_formula(batches, cotangents, gain, warmup, window)
    for x, cotangent, result, gradient in zip(batches, cotangents, results, gradients, strict=True):
        leaf = x.clone().requires_grad_()
        y = norm(leaf)
        (found,) = torch.autograd.grad(y, leaf, cotangent)
        torch.testing.assert_close(y, result * gain + bias, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(found, gradient, rtol=1e-11, atol=1e-11)
        norm.advance()
    torch.testing.assert_close(norm.running_second, running, rtol=1e-11, atol=1e-11)
    (x,) = inputs(1, seed=9)
    expected = x.double() / (running + EPS).sqrt() * gain + bias
    torch.testing.assert_close(norm.eval()(x.double()), expected, rtol=1e-11, atol=1e-11)


def test_gradients_are_scaled_after_a_thousand_steps_within_bounds() -> None:
    plain, scaled = unified(warmup=2000), unified(warmup=0, window=1, momentum=1.0)
    x = inputs(1)[0].double()
    second = x.square().mean((0, 1))
    for norm in (plain, scaled):
        norm.step.fill_(1500)
    factor = torch.linspace(0.5, 100, CHANNELS).double()
    scaled.running_second.copy_(second / factor)
    results = []
    for norm in (plain, scaled):
        leaf = x.clone().requires_grad_()
        results.append(torch.autograd.grad(norm(leaf), leaf, x.cos())[0])
    ratio = ((second + EPS) / (second / factor + EPS)).sqrt().clamp(0.2, 5)
    torch.testing.assert_close(results[1], results[0] * ratio, rtol=1e-9, atol=1e-9)
    assert float(ratio.max()) == 5


def test_a_step_with_an_outlier_is_not_smoothed_and_stays_out_of_the_window() -> None:
    norm = unified(warmup=0, window=4, filter_outliers=True)
    batches = [x.double() for x in inputs(6)]
    for x in batches[:5]:
        norm(x)
        norm.advance()
    ordinary, running = norm.second_window.clone(), norm.running_second.clone()
    outlier = batches[5].clone()
    outlier[..., 2] *= 1000
    y = norm(outlier)
    own = scaled(norm, outlier / (outlier.square().mean((0, 1)) + EPS).sqrt())
    torch.testing.assert_close(y, own, rtol=1e-12, atol=1e-12)
    ordinary[1] = running
    torch.testing.assert_close(norm.second_window, ordinary, rtol=1e-12, atol=0)


def test_without_the_filter_an_outlier_is_smoothed() -> None:
    norm = unified(warmup=0, window=4)
    for x in inputs(5):
        norm(x.double())
        norm.advance()
    outlier = inputs(1)[0].double() * 1000
    largest = norm(outlier).detach().abs().max()
    own = scaled(norm, outlier / (outlier.square().mean((0, 1)) + EPS).sqrt())
    assert float(largest) > 10 * float(own.detach().abs().max())


@pytest.mark.parametrize("dead", ["always", "once"])
def test_a_channel_of_zeros_stays_finite_and_does_not_blow_up_the_next_steps(dead: str) -> None:
    norm = unified(warmup=0, window=2)
    for step, x in enumerate(inputs(6)):
        leaf = x.double()
        if dead == "always" or step == 3:
            leaf[..., 1] = 0
        leaf.requires_grad_()
        y = norm(leaf)
        (gradient,) = torch.autograd.grad(y.sum(), leaf)
        assert y.isfinite().all()
        assert gradient.isfinite().all()
        assert float(y.detach().abs().max()) < 1e3
        norm.advance()


def test_padding_does_not_count_and_gets_no_share_of_the_statistics_gradient() -> None:
    mask = torch.arange(5) < torch.tensor([5, 3, 1, 0])[:, None]
    x = inputs(1)[0].double()
    masked, kept = unified(warmup=100), unified(warmup=100)
    masked.mask.value = mask
    leaf = x.clone().requires_grad_()
    y = masked(leaf)
    short = x[mask][None].requires_grad_()
    expected = kept(short)
    torch.testing.assert_close(y[mask], expected[0], rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(expected)
    (found,) = torch.autograd.grad(y[mask], leaf, cotangent[0])
    torch.testing.assert_close(found[mask], torch.autograd.grad(expected, short, cotangent)[0][0])
    assert not found[~mask].any()


def test_with_all_tokens_masked_the_running_moment_serves_and_stays() -> None:
    norm = unified(warmup=100)
    x = inputs(1)[0].double()
    norm(x)
    norm.advance()
    running = norm.running_second.clone()
    norm.mask.value = torch.zeros(4, 5, dtype=torch.bool)
    torch.testing.assert_close(norm(x), scaled(norm, x / (running + EPS).sqrt()), rtol=1e-12, atol=1e-12)
    norm.advance()
    assert torch.equal(norm.running_second, running)


@pytest.mark.parametrize(
    "norm", [nn.RMSNorm(CHANNELS), nn.LayerNorm(CHANNELS, elementwise_affine=False)], ids=["no bias", "nothing"]
)
def test_weight_and_bias_are_made_where_there_is_none(norm: nn.Module) -> None:
    assert {"weight", "bias"} == {name for name, _ in unified(norm).named_parameters()}
