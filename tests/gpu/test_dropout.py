"""Dropout in generated kernels on the GPU: against float64 with the same weights dropped, and in compiled programs."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch.nn import functional as F

from fxopt import backend
from fxopt.codegen.attention import reference
from fxopt.codegen.attention.backward.kernel import candidates as backward_candidates
from fxopt.codegen.attention.backward.operator import attention_backward
from fxopt.codegen.attention.operator import attention_forward
from fxopt.codegen.attention.philox import kept_weights, lowest_kept
from fxopt.codegen.attention.portable.kernel import candidates
from fxopt.ir.attention import AttentionSpec
from fxopt.ir.expression import parse
from fxopt.testing import assert_within_budget
from tests.codegen.cases import WITHOUT_BANDS, Shape, specification
from tests.codegen.gradients import assert_gradients_within_budget
from tests.gpu.problems import of_any_size
from tests.gpu.test_attention_kernels import DTYPES, LARGE, on_gpu

pytestmark = pytest.mark.gpu
PROBABILITY = 0.3
#: Every expression, with shapes and dtypes in turn.
NAMES = (*WITHOUT_BANDS, "causal-band", "band")
TURNS = [(name, list(LARGE)[n % len(LARGE)], list(DTYPES)[n % len(DTYPES)]) for n, name in enumerate(NAMES)]


def seed(number: int = 2**62 + 12345) -> Tensor:
    return torch.tensor([number], device="cuda")


def configurations(spec: AttentionSpec, shape: Shape, dtype: torch.dtype) -> list[str]:
    found = candidates(of_any_size(spec, shape.head_dim, shape.value_dim, dtype))
    assert found, "no configuration fits this device"
    return [str(config) for config in found]


def gradients(
    spec: AttentionSpec, inputs: Sequence[Tensor], captures: Sequence[Tensor], dout: Tensor, config: str
) -> list[Tensor]:
    """The gradients through the operators, the backward by one configuration."""
    q, k, v = inputs
    forward = str(candidates(of_any_size(spec, q.shape[3], v.shape[3], q.dtype))[0])
    out, lse = attention_forward(q, k, v, list(captures), str(spec), forward, True, seed())
    wanted = [c.is_floating_point() for c in captures]
    given = (q, k, v, list(captures), out, lse, dout, None, wanted, str(spec), config, seed())
    found: list[Tensor] = attention_backward(*given)
    return found


@pytest.mark.parametrize(("name", "shape", "dtype"), TURNS)
def test_forward_is_within_the_budget_of_eager(name: str, shape: str, dtype: str) -> None:
    sizes = LARGE[shape]
    spec = dataclasses.replace(specification(name, sizes, DTYPES[dtype], "zero"), dropout=PROBABILITY)
    (q, k, v), captures = on_gpu(name, sizes, spec, DTYPES[dtype])
    wide = [c.double() if c.is_floating_point() else c for c in captures]
    wide_spec = str(dataclasses.replace(spec, out_dtype=torch.float64))
    exact = reference.attention(q.double(), k.double(), v.double(), wide, wide_spec, seed())
    eager = reference.attention(q, k, v, captures, str(spec), seed())
    configs = configurations(spec, sizes, DTYPES[dtype])
    for config in {configs[0], configs[-1]}:
        out, _ = attention_forward(q, k, v, captures, str(spec), config, False, seed())
        assert_within_budget(out, eager, exact)


@pytest.mark.parametrize(("name", "shape", "dtype"), TURNS)
def test_gradients_are_within_the_budget_of_eager(name: str, shape: str, dtype: str) -> None:
    sizes = LARGE[shape]
    spec = dataclasses.replace(specification(name, sizes, DTYPES[dtype], "zero"), dropout=PROBABILITY)
    inputs, captures = on_gpu(name, sizes, spec, DTYPES[dtype])
    dout = torch.randn(*inputs[0].shape[:3], sizes.value_dim, device="cuda").to(DTYPES[dtype])
    found = backward_candidates(of_any_size(spec, sizes.head_dim, sizes.value_dim, DTYPES[dtype]))
    assert found, "no configuration fits this device"
    results = gradients(spec, inputs, captures, dout, str(found[0]))
    assert_gradients_within_budget(spec, inputs, captures, results, dout, seed=seed())


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("name", ["causal", "swin"])
def test_every_configuration_of_the_backward_tried(name: str, width: int) -> None:
    shape = Shape(width, width, 200, 200, 2, "group", "bshd", heads=4)
    spec = dataclasses.replace(specification(name, shape, torch.bfloat16, "zero"), dropout=PROBABILITY)
    inputs, captures = on_gpu(name, shape, spec, torch.bfloat16)
    dout = torch.randn_like(inputs[0])
    for config in backward_candidates(of_any_size(spec, width, width, torch.bfloat16)):
        results = gradients(spec, inputs, captures, dout, str(config))
        assert_gradients_within_budget(spec, inputs, captures, results, dout, seed=seed())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [64, 128])
def test_each_configuration_drops_what_the_reference_drops(width: int, dtype: torch.dtype) -> None:
    """Equal weights and values that are an identity show which weights were used, one by one."""
    spec = AttentionSpec(parse("s"), dropout=0.25, out_dtype=dtype)
    q, k = (torch.zeros(3, 5, length, width, device="cuda", dtype=dtype) for length in (333, width))
    v = torch.eye(width, device="cuda", dtype=dtype).expand(3, 5, width, width)
    kept = kept_weights(torch.empty(3, 5, 333, width, device="cuda"), seed(), lowest_kept(0.25))
    for config in configurations(spec, Shape(width, width, 333, width), dtype):
        out, _ = attention_forward(q, k, v, [], str(spec), config, False, seed())
        assert torch.equal(out != 0, kept), config
        torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / (0.75 * width)))


@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_rate_of_a_large_attention(probability: float) -> None:
    """Values of one: a row sums its kept weights. Within five standard deviations of a binomial distribution."""
    spec = AttentionSpec(parse("s"), dropout=probability, out_dtype=torch.float32)
    q = torch.zeros(4, 8, 2048, 64, device="cuda")
    config = configurations(spec, Shape(64, 64, 2048, 2048), torch.float32)[0]
    out, _ = attention_forward(q, q, torch.ones_like(q), [], str(spec), config, False, seed())
    deviation = math.sqrt(probability / (1 - probability) / (4 * 8 * 2048 * 2048))
    assert abs(out.double().mean().item() - 1) < 5 * deviation + 2**-22
    rows = out[..., 0].double()
    assert (rows - 1).abs().max() < 7 * math.sqrt(probability / (1 - probability) / 2048)
    assert (rows.std() / math.sqrt(probability / (1 - probability) / 2048) - 1).abs() < 0.02


def test_the_same_seed_gives_the_same_bits_and_another_one_does_not() -> None:
    spec = AttentionSpec(parse("s * 0.125"), parse("j <= i"), dropout=0.1, out_dtype=torch.bfloat16)
    q, k, v = (torch.randn(2, 4, 300, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    config = configurations(spec, Shape(64, 64, 300, 300), torch.bfloat16)[0]
    first, again, other = (attention_forward(q, k, v, [], str(spec), config, False, seed(n))[0] for n in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    dout = torch.randn_like(q)
    one, two = (gradients(spec, (q, k, v), [], dout, "") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_no_square_matrix_is_allocated() -> None:
    spec = AttentionSpec(parse("s * 0.125"), dropout=0.1, out_dtype=torch.bfloat16)
    q = torch.randn(1, 8, 8192, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    config = configurations(spec, Shape(64, 64, 8192, 8192), torch.bfloat16)[0]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, _ = attention_forward(q, q, q, [], str(spec), config, True, seed())
    torch.autograd.grad(out, q, torch.ones_like(out))
    assert torch.cuda.max_memory_allocated() - before < 16 * q.numel() * q.element_size()


class Attention(nn.Module):
    """Two attentions that drop weights while training, the second causal."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        p = F.dropout((q @ k.transpose(-2, -1) * 0.125).softmax(-1), 0.25, self.training)
        first = p @ v
        return first, F.scaled_dot_product_attention(q, k, v, dropout_p=0.5 if self.training else 0.0, is_causal=True)


def operands() -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys of nothing but zeros, and values that are an identity."""
    q, k = (torch.zeros(2, 4, 64, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    v = torch.eye(64, device="cuda", dtype=torch.bfloat16).expand(2, 4, 64, 64).contiguous().requires_grad_()
    return q, k, v


@pytest.mark.parametrize(("lower", "graphs"), [("triton", False), ("triton", True), ("auto", False), ("sdpa", False)])
def test_a_compiled_program_goes_back_over_the_weights_that_it_dropped(lower: str, graphs: bool) -> None:
    """With replayed CUDA graphs too: each call draws anew, and the gradient of the values shows the same weights."""
    torch._dynamo.reset()
    options: Any = {"lower": lower, "strict": True, "inductor": {"triton.cudagraphs": graphs}}
    compiled = torch.compile(Attention().train(), backend="fxopt", options=options)
    drawn = []
    with backend.collecting() as (outcomes, failures):
        for _ in range(5):
            torch.compiler.cudagraph_mark_step_begin()
            q, k, v = operands()
            results = compiled(q, k, v)
            used = [x.detach().clone() for x in results]
            cotangents = [torch.randn_like(x) for x in results]
            (found,) = torch.autograd.grad(results, v, cotangents)
            expected = sum(x.double().mT @ c.double() for x, c in zip(used, cotangents, strict=True))
            torch.testing.assert_close(found.double(), expected, atol=3e-2, rtol=3e-2)
            drawn.append((used[0] == 0).clone())
    assert not failures
    if lower != "auto":
        assert all(d.chosen.startswith(lower) for d in outcomes[0].decisions)
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(drawn)), "each call draws anew"
    assert abs(torch.stack(drawn).float().mean().item() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / (5 * drawn[0].numel()))


@pytest.mark.parametrize("lower", ["triton", "sdpa"])
def test_the_same_seed_of_torch_drops_the_same(lower: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(Attention().train(), backend="fxopt", options={"lower": lower, "strict": True})
    results = []
    for number in (1, 1, 2):
        inputs = operands()
        torch.manual_seed(number)
        results.append(compiled(*inputs))
    for first, again, other in zip(*results, strict=True):
        assert torch.equal(first, again) and not torch.equal(first, other)


def test_rewrites_are_verified_with_the_same_weights_dropped() -> None:
    inputs = [torch.randn(2, 4, 64, 64, device="cuda", requires_grad=True) for _ in range(3)]
    torch._dynamo.reset()
    options: Any = {"strict": True, "verify": "numeric", "base": "eager"}
    with backend.collecting() as (outcomes, failures):
        torch.compile(Attention().train(), backend="fxopt", options=options)(*inputs)
    assert not failures and outcomes[0].report.count("attention") == 2
