"""Functional transforms: graphs with them are left alone, whichever of their nodes a trace keeps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fxopt
from fxopt.errors import CaptureError, FxoptWarning

Function = Callable[[Tensor], Tensor]


def _masked(x: Tensor) -> Tensor:
    """As masks of transformers are made of a function of positions."""
    over_keys = torch.vmap(lambda i, j: i >= j, in_dims=(None, 0))
    positions = torch.arange(x.shape[-1])
    return x.masked_fill(~torch.vmap(over_keys, in_dims=(0, None))(positions, positions)[: len(x)], 0.0)


def _edited(x: Tensor) -> Tensor:
    y: Tensor = torch.vmap(lambda row: row.exp().mul_(2))((x * 1).add_(1))
    return y


def _branched(x: Tensor) -> Tensor:
    y: Tensor = torch.cond(x.sum() > 0, torch.vmap(torch.sum), lambda y: y.sum(1), (x,))
    return y


TRANSFORMED: dict[str, Function] = {
    "vmap": lambda x: torch.vmap(lambda row: row.exp() + torch.arange(3).exp())(x) * x,
    "vmap of what is made": lambda x: x + torch.vmap(lambda i: i * 2.0)(torch.arange(3)),
    "vmap of vmap": _masked,
    "vmap of reductions": lambda x: x * torch.vmap(torch.sum)(x)[:, None],
    "edits inside of vmap": _edited,
    "vmap inside of a branch": _branched,
    "grad": lambda x: torch.func.grad(lambda y: y.sin().sum())(x) * x,
    "vjp": lambda x: torch.func.vjp(torch.sin, x)[1](x)[0],
    "jvp": lambda x: torch.func.jvp(torch.sin, (x,), (x,))[1],
    "jacrev": lambda x: torch.func.jacrev(torch.sin)(x[0]),
}


# PyTorch's own, of what it loads for jvp.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("name", TRANSFORMED)
def test_graphs_with_functional_transforms_are_left_alone(name: str) -> None:
    function, x = TRANSFORMED[name], torch.randn(2, 3)
    torch._dynamo.reset()
    with pytest.warns(FxoptWarning, match="functional transform"):
        found = torch.compile(function, backend="fxopt", options={"base": "aot_eager"})(x)
    torch.testing.assert_close(found, function(x))


@pytest.mark.parametrize("name", TRANSFORMED)
def test_they_are_not_captured_either(name: str) -> None:
    with pytest.raises(CaptureError, match=r"functional transform|can't be captured"):
        fxopt.capture(TRANSFORMED[name], (torch.randn(2, 3),))
