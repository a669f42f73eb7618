"""Students with linear attention through schedules, conversion in float64, export, compilation and checkpoints."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.passes import LinearAttention, RepBatchNorm, SimplifiedLinearAttention
from fxopt.passes.linear_attention.module import LinearisedModule
from tests.linear_attention.models import CHANNELS, Called, Causal, Heads, inputs, mixer, train
from tests.linear_attention.models import optimizer_of as fresh_optimizer

#: What is trained, with norms exchanged beside and without.
CASES: dict[str, tuple[type[Heads], list[fxopt.Pass]]] = {
    "simplified": (Called, [SimplifiedLinearAttention(kernel=3, steps=3, warmup=1)]),
    "causal": (Causal, [LinearAttention(steps=3)]),
    "simplified, norms": (Called, [SimplifiedLinearAttention(kernel=3), RepBatchNorm(steps=3, warmup=1)]),
    "causal, norms": (Causal, [LinearAttention(steps=4), RepBatchNorm(steps=4)]),
}
each = pytest.mark.parametrize("name", CASES)


@functools.cache
def _prepared(name: str, seed: int) -> nn.Module:
    kind, passes = CASES[name]
    return fxopt.prepare(mixer(kind, seed).double(), (inputs(1)[0].double(),), passes=passes)


def student_of(name: str, seed: int = 0) -> nn.Module:
    """A copy of its own, in training."""
    return copy.deepcopy(_prepared(name, seed)).train()


def batches(count: int, seed: int = 1) -> list[Tensor]:
    return [x.double() for x in inputs(count, seed)]


def trained(name: str, seed: int = 0) -> nn.Module:
    student = student_of(name, seed)
    train(student, fresh_optimizer(student), batches(6))
    return student


@pytest.mark.parametrize(("steps", "warmup"), [(7, 3), (10, 0), (1, 0), (3, 5), (0, 2)])
def test_the_share_of_the_original_falls_linearly_after_the_warm_up_and_stays_at_zero(steps: int, warmup: int) -> None:
    chosen = LinearAttention(steps=steps, warmup=warmup)
    student = fxopt.prepare(mixer(Causal), (inputs(1)[0],), passes=[chosen])
    layer = student.get_submodule("layers.0")
    assert isinstance(layer, LinearisedModule)
    shares = []
    for _ in range(warmup + steps + 3):
        shares.append(layer.share.clone())
        layer.advance()
    falling = [torch.tensor(float(steps - k)) / torch.tensor(float(steps)) for k in range(steps)]
    expected = [torch.tensor(1.0)] * warmup + falling + [torch.tensor(0.0)] * 3
    assert all(torch.equal(found, wanted) for found, wanted in zip(shares, expected, strict=True))


def test_the_share_is_exact_for_long_schedules() -> None:
    chosen = LinearAttention(steps=300_000, warmup=10_000)
    layer = fxopt.prepare(mixer(Causal), (inputs(1)[0],), passes=[chosen]).get_submodule("layers.0")
    assert isinstance(layer, LinearisedModule)
    for step in (0, 10_000, 10_001, 159_999, 309_999, 310_000, 10**9):
        layer.step.fill_(step)
        left = 300_000 - min(max(step - 10_000, 0), 300_000)
        assert torch.equal(layer.share, torch.tensor(left) / torch.tensor(300_000))


@pytest.mark.parametrize("chosen", [LinearAttention(steps=4), SimplifiedLinearAttention(kernel=3, steps=4)])
def test_gradient_accumulation_and_recomputed_activations_count_steps(chosen: fxopt.Pass) -> None:
    plain, again = (fxopt.prepare(mixer(Called), (inputs(1)[0],), passes=[chosen]).train() for _ in range(2))
    for student, recompute in ((plain, False), (again, True)):
        optimizer = fresh_optimizer(student)
        for number, x in enumerate(inputs(4), start=1):
            leaf = x.clone().requires_grad_()
            y = torch.utils.checkpoint.checkpoint(student, leaf, use_reentrant=False) if recompute else student(leaf)
            y.square().mean().backward()
            if number % 2 == 0:
                optimizer.step()
                optimizer.zero_grad()
    assert float(plain.get_buffer("layers.0.step")) == 2
    for name, value in plain.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@each
def test_the_converted_model_is_the_unfolded_student_in_float64(name: str) -> None:
    student = trained(name)
    x = batches(1, seed=5)[0]
    expected = student.eval()(x)
    size = float(expected.detach().abs().max())
    with torch.no_grad():
        torch.testing.assert_close(fxopt.convert(student)(x), expected, rtol=1e-12, atol=1e-12 * size)


@each
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(name: str) -> None:
    data = batches(6)
    whole = student_of(name)
    losses = train(whole, fresh_optimizer(whole), data)
    first = student_of(name)
    optimizer = fresh_optimizer(first)
    begun = train(first, optimizer, data[:2])
    second = student_of(name, seed=9)
    second.load_state_dict(first.state_dict())
    resumed = fresh_optimizer(second)
    resumed.load_state_dict(optimizer.state_dict())
    assert begun + train(second, resumed, data[2:]) == losses
    assert all(torch.equal(second.state_dict()[key], value) for key, value in whole.state_dict().items())


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@each
def test_compiled_training_is_one_graph_and_follows_eager(name: str) -> None:
    eager, student = student_of(name), student_of(name)
    torch._dynamo.reset()
    compiled = torch.compile(student, fullgraph=True, backend="aot_eager")
    data = batches(5)
    losses = train(compiled, fresh_optimizer(student), data)
    assert losses == pytest.approx(train(eager, fresh_optimizer(eager), data), rel=1e-10)
    for key, value in eager.state_dict().items():
        torch.testing.assert_close(student.state_dict()[key], value, rtol=1e-8, atol=1e-8)


@each
def test_the_converted_model_goes_through_export_compile_and_state_dict(name: str) -> None:
    fast, other = fxopt.convert(trained(name)), fxopt.convert(trained(name, seed=4))
    x = batches(1, seed=5)[0]
    with torch.no_grad():
        expected = fast(x)
        torch.testing.assert_close(torch.export.export(fast, (x,), strict=False).module()(x), expected)
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(fast, backend="aot_eager", fullgraph=True)(x), expected)
        assert (other(x) - expected).abs().max() > 1e-3
        other.load_state_dict(fast.state_dict())
        torch.testing.assert_close(other(x), expected)


def test_where_no_key_is_met_the_result_is_zero_with_finite_gradients() -> None:
    """All products of rectified queries and keys are 0 then, and their sum is ``eps`` alone."""
    student = fxopt.prepare(mixer(Called).double(), (batches(1)[0],), passes=[LinearAttention()]).train()
    layer = student.get_submodule("layers.0")
    qkv, proj = layer.get_submodule("qkv"), layer.get_submodule("proj")
    assert isinstance(qkv, nn.Linear) and isinstance(proj, nn.Linear)
    with torch.no_grad():
        qkv.weight[:CHANNELS].zero_()
        qkv.bias[:CHANNELS].fill_(-1.0)
    y = layer(batches(1)[0], None)
    torch.testing.assert_close(y, proj.bias.expand_as(y), rtol=0, atol=0)
    gradients = torch.autograd.grad(y.square().sum(), list(layer.parameters()), allow_unused=True)
    assert all(gradient is None or bool(gradient.isfinite().all()) for gradient in gradients)
