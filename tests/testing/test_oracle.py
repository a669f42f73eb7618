from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxopt.testing import double_precision, draw, evaluate, oracle, oracle_gradients, upcast

REDUCED = [torch.float32, torch.bfloat16, torch.float16]


def casting(x: Tensor) -> Tensor:
    """Rounds at every step it can: through bf16, a float32 softmax, half constants and a made tensor."""
    y = x.float().to(torch.bfloat16).half().type_as(x)
    y = torch.softmax(y, -1, dtype=torch.float32).to(x.dtype) + torch.full((), 1 / 3, dtype=torch.float16)
    return y / torch.tensor(3.0) + torch.arange(3, dtype=torch.bfloat16)[1] / 7


def exact(x: Tensor) -> Tensor:
    return (torch.softmax(x, -1) + 1 / 3) / 3 + 1 / 7


@pytest.mark.parametrize("dtype", REDUCED)
def test_oracle_ignores_every_cast(dtype: torch.dtype) -> None:
    x = draw((4, 9), dtype=dtype)
    result = oracle(casting, x)
    assert result.dtype is torch.float64
    assert float((result - exact(x.double())).abs().max()) < 1e-15
    assert float((casting(x).double() - result).abs().max()) > 1e-8, "eager rounds, or the test shows nothing"


def test_oracle_keeps_literal_constants() -> None:
    lowest = torch.finfo(torch.float16).min
    mask = torch.tensor([True, False])
    result = oracle(lambda x: x.half().masked_fill(mask, lowest), torch.zeros(2))
    assert result.tolist() == [lowest, 0.0]


def test_oracle_upcasts_nested_arguments_and_leaves_integers() -> None:
    def program(pair: tuple[Tensor, dict[str, Tensor]], *, index: Tensor) -> dict[str, Any]:
        x, rest = pair
        return {"sum": x + rest["y"], "index": index, "dtypes": [str(x.dtype), str(rest["y"].dtype)]}

    x, y = torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.float16)
    result = oracle(program, (x, {"y": y}), index=torch.tensor([1]))
    assert result["dtypes"] == ["torch.float64"] * 2
    assert result["index"].dtype is torch.int64
    assert result["sum"].tolist() == [2.0, 2.0]


def test_oracle_reads_and_mutates_captured_tensors_through_one_twin() -> None:
    captured = torch.full((2,), 1 / 3, dtype=torch.float32)

    def program(x: Tensor) -> Tensor:
        captured.add_(1.0)
        return x.float() + captured

    result = oracle(program, torch.zeros(2, dtype=torch.bfloat16))
    assert result.tolist() == (captured.double() + 1).tolist()
    assert captured.tolist() == torch.full((2,), 1 / 3).tolist(), "the caller's tensor must stay"


def test_oracle_deep_copies_a_module() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).bfloat16().train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    result = oracle(module, torch.ones(5, 3, dtype=torch.bfloat16))
    assert result.dtype is torch.float64
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in before.items())
    assert next(module.parameters()).dtype is torch.bfloat16


def test_oracle_restores_the_default_dtype_after_an_error() -> None:
    def failing(x: Tensor) -> Tensor:
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        oracle(failing, torch.ones(1))
    assert torch.get_default_dtype() is torch.float32


def test_oracle_runs_compiled_programs_eagerly() -> None:
    def never(graph: Any, inputs: Any) -> Any:
        raise AssertionError("compiled")

    compiled = torch.compile(lambda x: x.float() / 3, backend=never)
    assert float(oracle(compiled, torch.ones((), dtype=torch.bfloat16))) == 1 / 3


@pytest.mark.parametrize("dtype", REDUCED)
def test_oracle_runs_sdpa_and_norms(dtype: torch.dtype) -> None:
    def program(x: Tensor) -> Tensor:
        y = F.layer_norm(x.float(), x.shape[-1:]).to(x.dtype)
        return F.scaled_dot_product_attention(y, y, y, is_causal=True)

    x = draw((1, 2, 5, 8), dtype=dtype)
    y = F.layer_norm(x.double(), x.shape[-1:])
    weights = (y @ y.mT / math.sqrt(8)).masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -math.inf).softmax(-1)
    assert float((oracle(program, x) - weights @ y).abs().max()) < 1e-14


def test_oracle_draws_the_same_dropout() -> None:
    x = torch.ones(4000)
    torch.manual_seed(1)
    eager = F.dropout(x, 0.3)
    torch.manual_seed(1)
    assert torch.equal(oracle(lambda t: F.dropout(t, 0.3), x) == 0, eager == 0)


def test_upcast_keeps_identity_and_requires_grad() -> None:
    x = torch.ones(2, dtype=torch.float16, requires_grad=True)
    first, (second, flag) = upcast((x, [x, True]))
    assert first is second
    assert first.requires_grad and first.dtype is torch.float64 and flag is True


def test_oracle_gradients_match_the_derivative() -> None:
    x = draw((3, 5), dtype=torch.bfloat16).requires_grad_()
    eager, exact_run = evaluate(torch.exp, x), oracle_gradients(lambda t: t.float().exp().to(t.dtype), x)
    assert list(exact_run.gradients) == ["args[0]"]
    gradient = exact_run.gradients["args[0]"]
    cotangent = gradient / x.detach().double().exp()
    assert gradient.dtype is torch.float64
    assert torch.equal((cotangent * 32).round() / 32, (cotangent * 2**40).round() / 2**40)
    error = (eager.gradients["args[0]"].double() - gradient).abs().max()
    assert 0 < float(error) < 2.0**-6 * float(gradient.abs().max())


def test_oracle_gradients_name_parameters() -> None:
    module = nn.Linear(3, 2)
    result = oracle_gradients(module, torch.ones(1, 3))
    assert sorted(result.gradients) == ["parameters.bias", "parameters.weight"]
    assert module.weight.grad is None


def test_double_precision_widens_fused_half_softmax() -> None:
    with double_precision():
        result = torch.ops.aten._softmax.default(torch.zeros(2, dtype=torch.float16), -1, True)
    assert result.dtype is torch.float64
