"""Masks and biases of positions in half precision: proved where every position is exact, otherwise as in eager."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.export import Dim

import fxopt
from tests.analysis.mask_families import Build
from tests.attention.case import FunctionModule
from tests.attention.check import compiled
from tests.attention.test_masks_by_proof import Attention, eager, rewritten

BF16, F16 = torch.bfloat16, torch.float16
TOLERANCE = {torch.float32: 1e-5, F16: 4e-3, BF16: 3e-2}


def operands(size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    return tuple(torch.randn(1, 3, size, 8, generator=generator).to(dtype) for _ in range(3))  # type: ignore[return-value]


def rows(q: Tensor) -> Tensor:
    return torch.arange(q.shape[2])[:, None]


def keys(k: Tensor) -> Tensor:
    return torch.arange(k.shape[2])


def window(q: Tensor, k: Tensor) -> Tensor:
    """As models count: positions in their own dtype."""
    places = torch.arange(q.shape[2], dtype=q.dtype)
    distance = (places[:, None] - places[None]).float()
    return (distance >= 0) & (distance < 64)


def literal(dtype: torch.dtype) -> Build:
    return lambda q, k: keys(k).to(dtype).float() <= rows(q).to(dtype).float()


def summed(q: Tensor, k: Tensor) -> Tensor:
    return torch.ones(k.shape[2], dtype=BF16).cumsum(-1).float() <= rows(q).float() + 1


#: A mask, the dtype of the model, the longest sequence for which it is what it seems, one that is longer.
MASKS: dict[str, tuple[Build, torch.dtype, int, int]] = {
    "window of bf16": (window, BF16, 257, 300),
    "window of float16": (window, F16, 300, 2100),
    "bf16 in float32": (literal(BF16), torch.float32, 257, 300),
    "float16 in float32": (literal(F16), torch.float32, 300, 2100),
    "counted in bf16": (summed, torch.float32, 256, 300),
}


def same_as_eager(actual: Tensor, attention: Attention, inputs: tuple[Tensor, ...]) -> None:
    """Float64 has no rounded positions, so eager itself is what counts; rows without keys are NaN in both."""
    limit = TOLERANCE[inputs[0].dtype]
    torch.testing.assert_close(actual, attention(*inputs), rtol=limit, atol=limit, equal_nan=True)


@pytest.mark.parametrize("beyond", [False, True], ids=["exact", "beyond"])
@pytest.mark.parametrize("name", MASKS)
def test_mask_of_half_positions_is_proved_only_where_they_are_exact(name: str, beyond: bool) -> None:
    build, dtype, *sizes = MASKS[name]
    attention, inputs = eager(build), operands(sizes[beyond], dtype)
    result, spec = rewritten(attention, inputs, None)
    assert bool(spec.captures) is beyond
    same_as_eager(result.program.module(*inputs)[0], attention, inputs)


@pytest.mark.parametrize("name", ["window of bf16", "bf16 in float32", "counted in bf16"])
@pytest.mark.parametrize("longest", [256, 400])
def test_one_program_serves_lengths_on_both_sides(name: str, longest: int) -> None:
    build, dtype, *_ = MASKS[name]
    attention, size = eager(build), Dim("size", min=4, max=longest)
    result, spec = rewritten(attention, operands(16, dtype), ({2: size}, {2: size}, {2: size}))
    assert bool(spec.captures) is (longest > 256)
    for length in (16, 256, longest):
        inputs = operands(length, dtype)
        same_as_eager(result.program.module(*inputs)[0], attention, inputs)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", ["window of bf16", "bf16 in float32", "counted in bf16"])
def test_compiled_masks_of_rounded_positions(name: str, dynamic: bool) -> None:
    build, dtype, *_ = MASKS[name]
    torch._dynamo.reset()
    call = compiled(FunctionModule(eager(build)), dynamic=dynamic)
    for length in (300, 320):
        inputs = operands(length, dtype)
        same_as_eager(call(*inputs), eager(build), inputs)


def test_an_almost_causal_mask_is_not_reported_as_causal() -> None:
    report = fxopt.explain(FunctionModule(eager(literal(BF16))), *operands(300, torch.float32))
    assert "j <= i" not in str(report)
    assert "j <= i" in str(fxopt.explain(FunctionModule(eager(literal(BF16))), *operands(200, torch.float32)))


def distance(q: Tensor, k: Tensor) -> Tensor:
    return keys(k) - rows(q)


#: Biases that are rounded to half precision in a model of float32, and what they are captured as.
BIASES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], list[str]]] = {
    "rounded positions": (lambda q, k: 0.5 * (keys(k).to(BF16) - rows(q).to(BF16)).float(), ["--ij"]),
    "rounded distances": (lambda q, k: 0.5 * distance(q, k).to(BF16).float(), ["---d"]),
    "rounded products": (lambda q, k: (0.3 * distance(q, k).to(BF16)).float(), ["---d"]),
    "rounded products that meet float32": (lambda q, k: 0.3 * distance(q, k).to(BF16), ["---d"]),
    "product of products": (lambda q, k: 0.7 * (0.3 * distance(q, k).to(BF16)), ["---d"]),
}


@pytest.mark.parametrize("size", [200, 300])
@pytest.mark.parametrize("name", BIASES)
def test_bias_of_half_positions_is_rounded_as_written(name: str, size: int) -> None:
    build, dims = BIASES[name]
    attention, inputs = eager(build), operands(size, torch.float32)
    result, spec = rewritten(attention, inputs, None)
    exact = size == 200 and name in ("rounded positions", "rounded distances")
    assert [c.dims for c in spec.captures] == ([] if exact else dims)
    same_as_eager(result.program.module(*inputs)[0], attention, inputs)


def test_products_in_half_precision_take_numbers_as_they_are() -> None:
    attention, inputs = eager(lambda q, k: -0.3 * distance(q, k).abs().to(BF16)), operands(100, BF16)
    result, spec = rewritten(attention, inputs, None)
    assert not spec.captures and "0.3000000" in str(spec.score)
    same_as_eager(result.program.module(*inputs)[0], attention, inputs)
