"""The pass `gelu`: GELU in every order of its factors, exact and with tanh, and functions that are not GELU."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fxopt.passes.canonical.gelu import Gelu
from fxopt.testing import assert_operators
from tests.canonical.support import DTYPES, assert_fires, assert_kept, random, rewrite

R2, RP = math.sqrt(2.0), math.sqrt(2.0 / math.pi)

ERF: dict[str, Callable[[Tensor], Tensor]] = {
    "paper": lambda x: 0.5 * x * (1 + torch.erf(x / R2)),
    "transformers": lambda x: x * 0.5 * (1.0 + torch.erf(x / R2)),
    "multiplied": lambda x: x * (0.5 * (torch.special.erf(x * (1 / R2)) + 1)),
    "halved last": lambda x: (x * (1.0 + torch.erf(x / R2))) / 2,
    "distributed": lambda x: x * (0.5 + 0.5 * torch.erf(x / R2)),
    "erfc": lambda x: 0.5 * x * torch.erfc(-x / R2),
    "normal distribution": lambda x: torch.special.ndtr(x) * x,
}
TANH: dict[str, Callable[[Tensor], Tensor]] = {
    "GPT-2": lambda x: 0.5 * x * (1.0 + torch.tanh(RP * (x + 0.044715 * torch.pow(x, 3.0)))),
    "three factors": lambda x: 0.5 * x * (1 + torch.tanh(RP * (x + 0.044715 * x * x * x))),
    "cube on the left": lambda x: x * (torch.tanh((0.044715 * x**3 + x) * RP) + 1) * 0.5,
    "fast": lambda x: 0.5 * x * (1.0 + torch.tanh(x * RP * (1.0 + 0.044715 * x * x))),
    "Megatron": lambda x: x * 0.5 * (1.0 + torch.tanh(RP * x * (1 + 0.044715 * x * x))),
    "square": lambda x: x * 0.5 * (1.0 + torch.tanh(RP * x * (1 + 0.044715 * x.square()))),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ERF)
def test_gelu_fires_on_erf(name: str, dtype: torch.dtype) -> None:
    args = (random(3, 50, dtype=dtype, scale=2),)
    assert_fires(ERF[name], args, Gelu(), {"aten.gelu": 1, "aten.mul": 0, "aten.add": 0, "aten.div": 0})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TANH)
def test_gelu_fires_on_tanh(name: str, dtype: torch.dtype) -> None:
    args = (random(3, 50, dtype=dtype, scale=2),)
    found = assert_fires(TANH[name], args, Gelu(), {"aten.gelu": 1, "aten.mul": 0, "aten.add": 0, "aten.pow": 0})
    assert found.rule == "tanh"


@pytest.mark.parametrize("function", [ERF["paper"], TANH["GPT-2"], TANH["Megatron"]])
def test_gelu_fires_where_x_is_itself_a_product(function: Callable[[Tensor], Tensor]) -> None:
    def of_product(x: Tensor, y: Tensor) -> Tensor:
        return function(x * y * 0.5)

    args = (random(3, 50), random(3, 50, seed=1))
    result = rewrite(of_product, args, Gelu())
    assert_operators(result.program.module, {"aten.gelu": 1, "aten.mul": 2, "aten.tanh": 0, "aten.erf": 0})
    torch.testing.assert_close(result.program.module(*args)[0], of_product(*args))


@pytest.mark.parametrize(("function", "rule"), [(ERF["paper"], "erf"), (TANH["GPT-2"], "tanh")])
def test_gelu_fires_on_dynamic_shapes(function: Callable[[Tensor], Tensor], rule: str) -> None:
    dynamic = ({0: torch.export.Dim("rows", min=2)},)
    result = rewrite(function, (random(3, 50),), Gelu(), dynamic)
    assert [r.rule for r in result.replacements] == [rule]
    x = random(7, 50, seed=1)
    torch.testing.assert_close(result.program.module(x)[0], function(x))


def test_gelu_takes_constants_of_float32_accuracy() -> None:
    def megatron(x: Tensor) -> Tensor:
        return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))

    assert_fires(megatron, (random(3, 50),), Gelu(), {"aten.gelu": 1})
    assert_kept(megatron, (random(3, 50, dtype=torch.float64),), Gelu(), "the constant 'slope' is 0.79788456")


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: 0.5 * x * (1 + torch.erf(x / 1.4142)), "'slope'"),
        (lambda x: 0.5 * x * (1 + torch.erf(x * R2)), "'slope'"),
        (lambda x: 0.4 * x * (1 + torch.erf(x / R2)), "'half' is 0.4 where GELU has 0.5"),
        (lambda x: 0.5 * x * (2 + torch.erf(x / R2)), "'one' is 2.0"),
        (lambda x: x * (0.25 + 0.5 * torch.erf(x / R2)), "'half term' is 0.25"),
        (lambda x: 2 * x * (0.5 + 0.5 * torch.erf(x / R2)), "'factor' is 2.0"),
        (lambda x: 0.5 * x * torch.erfc(x / R2), "'negative slope'"),
        (lambda x: 0.5 * x * (1 + torch.tanh(RP * (x + 0.0447 * x**3))), "'cubic' is 0.0447"),
        (lambda x: 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.044715 * x**3))), "'slope' is 0.8"),
        (lambda x: 0.5 * x * (1 + torch.tanh(RP * x * (2 + 0.044715 * x * x))), "'inner one' is 2.0"),
        (lambda x: 0.5 * x * (1 + torch.tanh(RP * (x + 0.044715 * x**3 + 1))), "'zero' is 1.0"),
    ],
)
def test_gelu_rejects(function: Callable[[Tensor], Tensor], reason: str) -> None:
    assert_kept(function, (random(3, 50),), Gelu(), reason)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * torch.sigmoid(1.702 * x),
        lambda x: 0.5 * x * (1 + torch.erf(x.flip(0) / R2)),
        lambda x: 0.5 * x.flip(0) * (1 + torch.tanh(RP * (x + 0.044715 * x**3))),
        lambda x: 0.5 * x * (1 + torch.tanh(RP * (x + 0.044715 * x**2))),
        lambda x: 0.5 * x * (1 - torch.erf(x / R2)),
    ],
    ids=["QuickGELU", "erf of another", "tanh of another", "square for cube", "minus erf"],
)
def test_gelu_does_not_match(function: Callable[[Tensor], Tensor]) -> None:
    assert not rewrite(function, (random(3, 50),), Gelu()).replacements
