from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fxopt.testing import double_precision, evaluate, oracle_gradients
from fxopt.testing.draws import equal_draws


def fused(x: Tensor) -> Tensor:
    """What dropout runs as on a GPU."""
    return torch.native_dropout(x, 0.25, True)[0]


def sdpa(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)


def plain(x: Tensor) -> Tensor:
    return F.dropout(x, 0.25)


@pytest.mark.parametrize("function", [fused, plain])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_dtype_drops_the_same_elements(function: object, dtype: torch.dtype) -> None:
    assert callable(function)
    x = torch.ones(7, 333, dtype=dtype, requires_grad=True)
    with equal_draws():
        torch.manual_seed(1)
        found = evaluate(function, x)
        torch.manual_seed(1)
        exact = oracle_gradients(function, x)
    kept = found.outputs != 0
    assert torch.equal(kept, exact.outputs != 0) and exact.outputs.dtype is torch.float64
    assert 0.7 < kept.float().mean() < 0.8
    torch.testing.assert_close(found.outputs[kept].double(), exact.outputs[kept], atol=0, rtol=2**-8)
    gradient = found.gradients["args[0]"].double()
    torch.testing.assert_close(gradient, exact.gradients["args[0]"], atol=1e-2, rtol=1e-2)
    assert torch.equal(gradient[~kept], torch.zeros_like(gradient[~kept]))


def test_fused_attention_runs_as_separate_operators_with_the_same_draws() -> None:
    x = torch.randn(1, 2, 40, 8)
    with equal_draws():
        torch.manual_seed(1)
        found = sdpa(x)
        torch.manual_seed(1)
        with double_precision():
            exact = sdpa(x.double())
    torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("probability", "train"), [(1.0, True), (0.3, False), (0.0, True)])
def test_what_is_not_random_stays_as_it_is(probability: float, train: bool) -> None:
    x = torch.randn(50)
    with equal_draws():
        found = torch.native_dropout(x, probability, train)[0]
    assert torch.equal(found, torch.native_dropout(x, probability, train)[0])
