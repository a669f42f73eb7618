"""Attention and what is read of its weights by one operator on the GPU: in one pass, by walks, and end to end."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fxopt.codegen.attention import reference
from fxopt.codegen.attention.short.kernel import candidates_with_weights
from fxopt.codegen.attention.weights.kernel import candidates, sharing_objection
from fxopt.codegen.attention.weights.reference import exact_weights
from fxopt.codegen.attention.weights.together import attention_and_weights_forward
from fxopt.codegen.attention.weights.wants import Want, printed
from fxopt.ir.attention import AttentionSpec
from fxopt.testing import assert_within_budget, evaluate, oracle_gradients, together
from tests.codegen.cases import EXPRESSIONS, WITHOUT_BANDS, specification
from tests.gpu.problems import problem
from tests.gpu.test_attention_kernels import ALL_SHAPES
from tests.gpu.test_attention_kernels import on_gpu as on_gpu_at_length
from tests.gpu.test_short_kernels import DTYPES, SHAPES, on_gpu

pytestmark = pytest.mark.gpu

SINGLE = torch.float32
WANTS = {
    "class row and sums": (Want("weights", SINGLE, (0, 1, 1)), Want("column_sum", SINGLE)),
    "diagonal and sums": (Want("diagonal", SINGLE), Want("column_sum", torch.float16)),
    "rows": (Want("weights", torch.bfloat16, (6, 7, 1)), Want("weights", SINGLE, (1, 6, 2))),
    "whole": (Want("weights", torch.bfloat16), Want("weights", SINGLE)),
}
HALF = ("bf16", "f16")
ONE_PASS = [
    (name, shape, list(DTYPES)[(n + m) % 3], list(WANTS)[(n + m + n // 3) % 4])
    for n, name in enumerate(WITHOUT_BANDS)
    for m, shape in enumerate(SHAPES)
    if (n + m) % 2 == 0 and shape != "256"
]
WALKS = [
    (name, shape, HALF[(n + m) % 2], list(WANTS)[(n + m // 2) % 4])
    for n, name in enumerate(EXPRESSIONS)
    for m, shape in enumerate(ALL_SHAPES)
    if ALL_SHAPES[shape].rows > 6
    and sharing_objection(specification(name, ALL_SHAPES[shape], torch.bfloat16), torch.bfloat16) is None
]


def check(
    spec: AttentionSpec,
    inputs: Sequence[Tensor],
    captures: Sequence[Tensor],
    config: str,
    wants: Sequence[Want],
    floor: float = 0.0,
) -> None:
    """The results, twice and the same: the second time launches are replayed."""
    q, k, v = inputs
    rest = (list(captures), str(spec), printed(wants), config, False)
    found, again = (attention_and_weights_forward(q, k, v, *rest) for _ in range(2))
    eager = meaning(spec, inputs, captures, wants)
    wide = [c.double() if c.is_floating_point() else c for c in captures]
    exact_spec = dataclasses.replace(spec, out_dtype=torch.float64)
    exactly = [dataclasses.replace(want, dtype=torch.float64) for want in wants]
    exact = meaning(exact_spec, (q.double(), k.double(), v.double()), wide, exactly)
    assert_within_budget([found[0], *found[2:]], eager, exact, floor=floor)
    torch.testing.assert_close(again, found, rtol=0, atol=0, equal_nan=True)


def meaning(
    spec: AttentionSpec, inputs: Sequence[Tensor], captures: Sequence[Tensor], wants: Sequence[Want]
) -> list[Tensor]:
    q, k, v = inputs
    weights = exact_weights(spec, q, k, captures)
    return [reference.attention(q, k, v, captures, str(spec)), *(want.of(weights) for want in wants)]


@pytest.mark.parametrize(("name", "shape", "dtype", "wanted"), ONE_PASS)
def test_one_pass_is_within_the_budget_of_eager(name: str, shape: str, dtype: str, wanted: str) -> None:
    sizes = SHAPES[shape]
    if dtype == "f32" and sizes.keys > 64:
        pytest.skip("registers don't hold these logits in float32")
    spec = specification(name, sizes, DTYPES[dtype])
    inputs, captures = on_gpu(name, sizes, spec, DTYPES[dtype])
    found = candidates_with_weights(problem(spec, *inputs))
    check(spec, inputs, captures, found[len(name) % len(found)], WANTS[wanted])


@pytest.mark.parametrize("wanted", WANTS)
@pytest.mark.parametrize("dtype", HALF)
def test_every_candidate_of_vision_transformers(dtype: str, wanted: str) -> None:
    spec = specification("plain", SHAPES["ViT"], DTYPES[dtype])
    inputs, captures = on_gpu("plain", SHAPES["ViT"], spec, DTYPES[dtype])
    for config in candidates_with_weights(problem(spec, *inputs)):
        check(spec, inputs, captures, config, WANTS[wanted])


@pytest.mark.parametrize(("name", "shape", "dtype", "wanted"), WALKS)
def test_walks_by_the_log_sum_exp_are_within_the_budget_of_eager(
    name: str, shape: str, dtype: str, wanted: str
) -> None:
    sizes, wants = ALL_SHAPES[shape], WANTS[wanted]
    spec = specification(name, sizes, DTYPES[dtype])
    inputs, captures = on_gpu_at_length(name, sizes, spec, DTYPES[dtype])
    (walk,) = candidates(spec, sizes.head_dim, DTYPES[dtype])[:1]
    # The weight of a row's only key is 1 up to the last digit, as its log-sum-exp is rounded as a natural logarithm.
    check(spec, inputs, captures, f"64x32w4s2|{','.join([str(walk)] * len(wants))}", wants, floor=2.0)


def pruned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    p = (q @ k.mT * 0.125).softmax(-1)
    return p @ v, p[:, :, 0, 1:].mean(1), p.mean((1, 2))


def reduced(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    p = (q @ k.mT * 0.125).float().softmax(-1)
    return p.to(v.dtype) @ v, p.diagonal(dim1=-2, dim2=-1), p.sum(2)


@pytest.mark.parametrize("lower", ["auto", "triton"])
@pytest.mark.parametrize("tokens", [197, 577])
@pytest.mark.parametrize("function", [pruned, reduced])
def test_sites_run_end_to_end(function: object, tokens: int, lower: str) -> None:
    assert callable(function)
    torch._dynamo.reset()
    torch.manual_seed(0)
    shape = (8, 12, tokens, 64)
    calls = [tuple(torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3)) for _ in range(3)]
    compiled = torch.compile(function, backend="fxopt", options={"lower": lower, "strict": True})
    with torch.no_grad():
        results = [(compiled(*args), function(*args), oracle_gradients(function, *args).outputs) for args in calls]
    assert_within_budget(*(together(side) for side in zip(*results, strict=True)), floor=1.0)


@pytest.mark.parametrize("tokens", [49, 300])
def test_gradients_are_within_the_budget_of_eager(tokens: int) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    shape = (2, 4, tokens, 64)
    operands = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    compiled = torch.compile(reduced, backend="fxopt", options={"lower": "triton", "strict": True})
    results = evaluate(compiled, *operands), evaluate(reduced, *operands), oracle_gradients(reduced, *operands)
    assert_within_budget(*results, floor=1.0)
