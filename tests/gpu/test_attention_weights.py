"""Generated kernels of attention weights and statistics on the GPU, and sites whose weights are read, end to end."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

import fxopt
from fxopt.codegen.attention.weights.kernel import candidates
from fxopt.codegen.attention.weights.operator import attention_weights_forward
from fxopt.codegen.attention.weights.reference import exact_weights, reduction
from fxopt.codegen.attention.weights.source import KINDS
from fxopt.ir.attention import AttentionSpec
from fxopt.testing import Sizes, assert_within_budget, evaluate, oracle_gradients, together
from tests.attention.case import Case
from tests.attention.weight_readers import WEIGHT_READERS
from tests.codegen.cases import EXPRESSIONS, in_turn, specification
from tests.gpu.test_attention_kernels import ALL_SHAPES, DTYPES, LARGE, on_gpu

pytestmark = pytest.mark.gpu


def meaning(spec: AttentionSpec, q: Tensor, k: Tensor, captures: list[Tensor], kind: str) -> Tensor:
    weights = exact_weights(spec, q, k, captures)
    return (weights if kind == "weights" else reduction(kind)(weights)).to(spec.out_dtype)


#: Calls of a site whose errors are taken together.
_DRAWS = 4
#: Every expression with every shape, and every dtype and kind with each of both.
CROSS = [
    (name, shape, list(DTYPES)[(n + m) % 3], list(KINDS)[(n + 2 * m + m // 3) % 3])
    for n, name in enumerate(EXPRESSIONS)
    for m, shape in enumerate(ALL_SHAPES)
]


@pytest.mark.parametrize(("name", "shape", "dtype", "kind"), CROSS)
def test_kernel_is_within_the_budget_of_eager(name: str, shape: str, dtype: str, kind: str) -> None:
    sizes = ALL_SHAPES[shape]
    spec = specification(name, sizes, DTYPES[dtype])
    (q, k, _), captures = on_gpu(name, sizes, spec, DTYPES[dtype])
    wide = [c.double() if c.is_floating_point() else c for c in captures]
    exact = meaning(dataclasses.replace(spec, out_dtype=torch.float64), q.double(), k.double(), wide, kind)
    eager = meaning(spec, q, k, captures, kind)
    config = in_turn(candidates(spec, sizes.head_dim, q.dtype, sizes.rows), name, shape, ALL_SHAPES)
    out = attention_weights_forward(q, k, captures, str(spec), kind, str(config))
    assert_within_budget(out, eager, exact)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_within_the_budget_of_eager(kind: str) -> None:
    spec = specification("tile-bias", LARGE["D64"], torch.float32)
    (q, k, _), captures = on_gpu("tile-bias", LARGE["D64"], spec, torch.float32)
    config = str(candidates(spec, 64, q.dtype)[0])
    leaves = [x.requires_grad_() for x in (q, k, *captures)]

    def fused(q: Tensor, k: Tensor, *captures: Tensor) -> Tensor:
        out: Tensor = attention_weights_forward(q, k, list(captures), str(spec), kind, config)
        return out

    def eager(q: Tensor, k: Tensor, *captures: Tensor) -> Tensor:
        dtype = torch.float64 if q.dtype is torch.float64 else spec.out_dtype
        return meaning(dataclasses.replace(spec, out_dtype=dtype), q, k, list(captures), kind)

    results = evaluate(fused, *leaves), evaluate(eager, *leaves), oracle_gradients(eager, *leaves)
    assert_within_budget(*results, floor=1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_two_runs_agree_to_the_last_bit(kind: str) -> None:
    spec = specification("causal", LARGE["D64"], torch.bfloat16)
    (q, k, _), captures = on_gpu("causal", LARGE["D64"], spec, torch.bfloat16)
    config = str(candidates(spec, 64, q.dtype)[0])
    first, second = (attention_weights_forward(q, k, captures, str(spec), kind, config) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("lower", ["auto", "triton"])
@pytest.mark.parametrize("case", WEIGHT_READERS, ids=lambda case: case.number)
def test_sites_run_end_to_end(case: Case, lower: str) -> None:
    torch._dynamo.reset()
    module, args = case.build(Sizes(B=2, H=4, G=2, S=130, T=150, D=64, E=32), torch.float32)
    torch.manual_seed(0)
    calls = [tuple(torch.randn(x.shape, device="cuda") for x in args) for _ in range(_DRAWS)]
    with torch.no_grad():
        assert fxopt.explain(module, *calls[0]).count("attention") == 1
        compiled = torch.compile(module, backend="fxopt", options={"lower": lower, "strict": True})
        results = [(compiled(*args), module(*args), oracle_gradients(module, *args).outputs) for args in calls]
    # Together: the largest error of one small result is a matter of luck, eager's too.
    assert_within_budget(*(together(side) for side in zip(*results, strict=True)), floor=1.0)
