"""The pass `glu`: every activation, two linears or one, and products that are no gated linear unit."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fxopt.errors import OptionError
from fxopt.passes.canonical.gelu import Gelu
from fxopt.passes.canonical.glu import Glu
from fxopt.passes.canonical.silu import Silu
from fxopt.testing import assert_operators
from tests.canonical.support import DTYPES, assert_fires, random, rewrite

PASSES = (Gelu(), Silu(), Glu())
Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Activation] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "sigmoid": torch.sigmoid,
}


def _args(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return random(2, 5, 8, dtype=dtype), random(12, 8, dtype=dtype, seed=1), random(12, 8, dtype=dtype, seed=2)


def _gated(activation: Activation) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda x, a, b: activation(functional.linear(x, a)) * functional.linear(x, b)


def _activations(function: Callable[..., Tensor], args: tuple[Tensor, ...]) -> list[object]:
    graph = rewrite(function, args, PASSES).program.graph
    return [node.args[2] for node in graph.find_nodes(op="call_function", target=torch.ops.fxopt.glu.default)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_glu_fires_on_every_activation(name: str, dtype: torch.dtype) -> None:
    function = _gated(ACTIVATIONS[name])
    assert_fires(function, _args(dtype), PASSES, {"fxopt.glu": 1, "aten.mul": 0, "aten.linear": 2})
    assert _activations(function, _args(dtype)) == [name]


@pytest.mark.parametrize(
    ("activation", "name"),
    [
        (lambda x: x * x.sigmoid(), "silu"),
        (lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))), "gelu"),
    ],
)
def test_glu_fires_on_activations_by_hand(activation: Activation, name: str) -> None:
    assert _activations(_gated(activation), _args()) == [name]


def _chunked(x: Tensor, w: Tensor) -> Tensor:
    gate, up = functional.linear(x, w).chunk(2, -1)
    return functional.silu(gate) * up


def _gate_last(x: Tensor, w: Tensor) -> Tensor:
    up, gate = torch.split(functional.linear(x, w), 6, dim=-1)
    return up * functional.gelu(gate)


def _sliced(x: Tensor, w: Tensor) -> Tensor:
    both = x @ w.t()
    return functional.relu(both[..., :6]) * both[..., 6:]


@pytest.mark.parametrize("function", [_chunked, _gate_last, _sliced])
def test_glu_fires_on_halves_of_one_linear(function: Callable[..., Tensor]) -> None:
    assert_fires(function, _args()[:2], PASSES, {"fxopt.glu": 1, "aten.mul": 0})


def test_glu_fires_on_reshaped_addmm() -> None:
    def conv1d(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        flat, bias = x.view(-1, 8), torch.zeros(12)
        gate = torch.addmm(bias, flat, a.t()).view(2, 5, 12)
        return functional.silu(gate) * torch.addmm(bias, flat, b.t()).view(2, 5, 12)

    assert_fires(conv1d, _args(), PASSES, {"fxopt.glu": 1, "aten.mul": 0})


def test_glu_sites_are_feed_forward_layers() -> None:
    found = assert_fires(_gated(functional.silu), _args(), PASSES, {"fxopt.glu": 1})
    assert (found.site.kind, found.site.status) == ("mlp", "rewritten")


def test_glu_fires_on_dynamic_shapes() -> None:
    dynamic = ({0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("length", min=2)}, None)
    result = rewrite(_chunked, _args()[:2], PASSES, dynamic)
    assert_operators(result.program.module, {"fxopt.glu": 1})
    x, w = random(3, 7, 8), random(12, 8, seed=1)
    torch.testing.assert_close(result.program.module(x, w)[0], _chunked(x, w))


def test_glu_needs_the_activations_first() -> None:
    with pytest.raises(OptionError, match="gelu, silu"):
        rewrite(_chunked, _args()[:2], Glu())


def _overlapping(x: Tensor, w: Tensor) -> Tensor:
    both = functional.linear(x, w)
    return functional.silu(both[..., :6]) * both[..., 3:9]


def _other_axis(x: Tensor, w: Tensor) -> Tensor:
    gate, up = functional.linear(x[:, :4], w).chunk(2, 1)
    return functional.silu(gate) * up


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x, w: functional.silu(functional.linear(x, w)) * functional.linear(x + 1, w), "neither linears of one"),
        (lambda x, w: functional.silu(x) * (x + 1), "neither linears of one"),
        (lambda x, w: functional.sigmoid(x.mean(1, keepdim=True)) * x, "differ in shape"),
        (lambda x, w: functional.silu(x[..., :4]) * x[..., 4:], "nor halves of one linear"),
        (_overlapping, "nor halves"),
        (_other_axis, "nor halves"),
    ],
)
def test_glu_rejects(function: Callable[..., Tensor], reason: str) -> None:
    result = rewrite(function, _args()[:2], PASSES)
    assert_operators(result.program.module, {"fxopt.glu": 0})
    (told,) = [miss for miss in result.near_misses if miss.site is not None]
    assert reason in told.reason and told.site is not None and told.site.status == "kept"


def test_glu_does_not_match_other_activations() -> None:
    result = rewrite(_gated(torch.tanh), _args(), PASSES)
    assert_operators(result.program.module, {"fxopt.glu": 0})
