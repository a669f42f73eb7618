"""Which calls a rewritten module serves, and what it says to others: what its program has written in may not differ."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.errors import CaptureError

X = torch.arange(12.0).view(4, 3)


class Model(nn.Module):
    """Whatever can be written into a program: a number, a flag, a name, a size."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(
        self, x: Tensor, shift: Tensor | None = None, factor: float = 2.0, *, negate: bool = False, **rest: Any
    ) -> Tensor:
        y: Tensor = self.linear(x) * factor
        y = y if shift is None else y + shift
        y = -y if negate else y
        return y.reshape(x.shape[0] * 3)


def rewritten(*args: Any, shapes: Any = None, **kwargs: Any) -> tuple[Model, Any]:
    torch.manual_seed(0)
    model = Model().eval()
    return model, fxopt.rewrite(model, args, kwargs, dynamic_shapes=shapes)


CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "by position": ((X, X[:1]), {}),
    "by name": ((), {"x": X, "shift": X[:1]}),
    "by name in another order": ((), {"shift": X[:1], "x": X}),
    "both": ((X,), {"shift": X[:1]}),
    "with a default": ((X, X[:1], 2.0), {}),
    "with a default by name": ((X, X[:1]), {"negate": False}),
}


@torch.no_grad()
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("example", CALLS.values(), ids=CALLS)
def test_a_call_may_be_written_in_any_way(example: Any, call: Any) -> None:
    model, module = rewritten(*example[0], **example[1])
    assert torch.equal(module(*call[0], **call[1]), model(X, X[:1]))


OTHERS: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "another number": ((X, None, 3.0), {}, r"for factor=2\.0, called with 3\.0"),
    "another kind of number": ((X, None, 2), {}, r"for factor=2\.0, called with 2;"),
    "a flag": ((X,), {"negate": True}, "arguments of the structure"),
    "a tensor more": ((X, X), {}, "for shift=None, called with tensor"),
    "another size": ((X[:2],), {}, r"for x of the sizes \[4, 3\], called with \[2, 3\]"),
    "another rank": ((X[None],), {}, r"for x of the sizes \[4, 3\], called with \[1, 4, 3\]"),
    "no tensor": ((1.0,), {}, r"for x=\[4, 3\], called with 1\.0"),
    "too many": ((X, None, 2.0, 1, 2), {}, "arguments of the structure"),
    "an unknown name": ((X,), {"unknown": X}, "arguments of the structure"),
    "nothing": ((), {}, "arguments of the structure"),
}


@pytest.mark.parametrize(("args", "kwargs", "message"), OTHERS.values(), ids=OTHERS)
def test_another_call_is_an_error(args: tuple[Any, ...], kwargs: dict[str, Any], message: str) -> None:
    _, module = rewritten(X, None, 2.0)
    with pytest.raises(CaptureError, match=message):
        module(*args, **kwargs)


@torch.no_grad()
def test_symbolic_sizes_may_differ_and_equal_ones_stay_equal() -> None:
    rows = torch.export.Dim("rows")
    shapes = {"x": {0: rows}, "shift": {0: rows}}
    model, module = rewritten(X, X, shapes=shapes)
    x = torch.randn(7, 3)
    torch.testing.assert_close(module(x, x), model(x, x))
    with pytest.raises(CaptureError, match=r"shift of the sizes \[s\d+, 3\], where s\d+ is 7, called with \[2, 3\]"):
        module(x, x[:2])


@torch.no_grad()
def test_a_compiled_module_takes_calls_as_it_does_otherwise() -> None:
    model, module = rewritten(X, X[:1])
    compiled: Any = torch.compile(module, backend="eager", fullgraph=True)
    assert torch.equal(compiled(X, X[:1]), model(X, X[:1]))
    assert torch.equal(compiled(shift=X[:1], x=X), model(X, X[:1]))
