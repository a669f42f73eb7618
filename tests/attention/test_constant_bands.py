"""Functions of what varies over no position: captured as the one number, or the one for each head, that they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim

from fxopt.analysis.bands import Applied, Positions, Table, varies
from fxopt.codegen.attention.operator import attention_forward
from fxopt.errors import LoweringError, VerificationError
from fxopt.ir.attention import AttentionSpec, Capture
from fxopt.ir.expression import J, const, parse
from fxopt.passes.attention import band
from fxopt.testing import assert_within_budget, evaluate, oracle_gradients
from tests.attention.case import FunctionModule
from tests.attention.check import compiled
from tests.attention.test_masks_by_proof import HEADS, operands, rewritten

#: What becomes of scores, from the scores ``[B, H, S, T]`` and one more tensor.
Change = Callable[[Tensor, Tensor], Tensor]
#: No gradient is asked for: it is one sum over all scores, of which no budget can be had.
ONE = torch.tensor([[0.3]])
GATE = torch.tensor([0.4, -0.7]).view(2, 1, 1, 1)
HEADWISE = torch.tensor([[0.1, -0.4, 0.9], [1.2, 0.0, -2.0]])
TABLE = torch.linspace(-1, 1, 96).view(32, HEADS)
LINE = torch.linspace(-1, 1, 40)


def plane(value: float, s: Tensor) -> Tensor:
    return torch.full(s.shape[2:], value, dtype=s.dtype)


def distance(s: Tensor) -> Tensor:
    return torch.arange(s.shape[3]) - torch.arange(s.shape[2])[:, None]


def spread(x: Tensor, s: Tensor) -> Tensor:
    return x[:, :, None, None].expand(s.shape)


CONSTANT: dict[str, tuple[Change, Tensor, str]] = {
    "one number that is added": (lambda s, x: s + torch.exp(x.expand(s.shape[2:])), ONE, "----"),
    "one number": (lambda s, x: s * torch.exp(x.expand(s.shape[2:])), ONE, "----"),
    "a literal": (lambda s, x: s * x + torch.sqrt(plane(2.0, s)), ONE, "----"),
    "a scale": (lambda s, x: s * torch.log(plane(2.5, s)) * x, ONE, "----"),
    "a scale by the length": (
        lambda s, x: s * torch.log(torch.full(s.shape[2:], s.shape[2], dtype=s.dtype)) * x, ONE, "----"
    ),
    "a gate": (lambda s, x: s * torch.sigmoid(x.expand(s.shape)), GATE, "b---"),
    "a number for each head": (lambda s, x: s * torch.tanh(spread(x, s)), HEADWISE, "bh--"),
    "a table at no distance": (
        lambda s, x: s + torch.exp(x[(distance(s) - distance(s)).abs()].permute(2, 0, 1)), TABLE, "-h--"
    ),
}  # fmt: skip
#: The same with a distance, and tables that heads read at places of their own.
VARYING: dict[str, tuple[Change, Tensor, str]] = {
    "a slope": (lambda s, x: s + torch.exp(spread(x, s) - 0.1 * distance(s).abs()), HEADWISE, "bh-d"),
    "a place for each head": (
        lambda s, x: s + torch.exp(x[distance(s).clamp(-9, 9) + 9 + torch.arange(HEADS)[:, None, None]]), LINE, "-hij"
    ),
}  # fmt: skip
ALL = CONSTANT | VARYING


def attention_with(change: Change) -> Callable[..., Tensor]:
    return lambda q, k, v, x: change(q @ k.transpose(-2, -1), x).softmax(-1) @ v


def shapes() -> Any:
    row, key = Dim("row", min=4, max=64), Dim("key", min=4, max=64)
    return ({2: row}, {2: key}, {2: key}, None)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", ALL)
def test_what_varies_over_no_position_is_captured_as_such(name: str, dynamic: bool) -> None:
    change, data, dims = ALL[name]
    attention = attention_with(change)
    result, spec = rewritten(attention, (*operands(7, 11), data), shapes() if dynamic else None)
    assert dims in [c.dims for c in spec.captures]
    for size in [(7, 11), (9, 23), (33, 5)] if dynamic else [(7, 11)]:
        inputs = (*(x.requires_grad_() for x in operands(*size)), data.clone().requires_grad_(data is not ONE))
        actual = evaluate(lambda *args: result.program.module(*args)[0], *inputs)
        assert_within_budget(actual, evaluate(attention, *inputs), oracle_gradients(attention, *inputs))


@pytest.mark.filterwarnings("error::fxopt.FxoptWarning")
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", ALL)
def test_compiled(name: str, dynamic: bool) -> None:
    change, data, _ = ALL[name]
    torch._dynamo.reset()
    call = compiled(FunctionModule(attention_with(change)), dynamic=dynamic)
    for size in ((7, 11), (9, 23)):
        inputs = (*operands(*size), data)
        torch.testing.assert_close(call(*inputs), attention_with(change)(*inputs), rtol=1e-4, atol=1e-5)


def test_which_steps_vary() -> None:
    node = torch.fx.Graph().placeholder("x")
    line, number = Positions(J, torch.int64), Positions(const(2), torch.int64)
    assert varies(line) and varies(Table(node, (None,), line)) and varies(Applied(node, ((0, number), (1, line))))
    still = (number, Table(node, (const(0),)), Table(node, (None,), number), Applied(node, ((0, number),)))
    assert not any(varies(step) for step in still)


def test_a_band_of_another_length_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    change, data, _ = CONSTANT["one number"]
    monkeypatch.setattr(band, "varies", lambda step: True)
    with pytest.raises(Exception, match="is 1 long, but read as if it were 17") as raised:
        rewritten(attention_with(change), (*operands(7, 11), data), None)
    assert isinstance(raised.value.__cause__ or raised.value, VerificationError)


@pytest.mark.parametrize(
    ("dims", "shape", "fits"),
    [
        ("---d", (1, 1, 1, 17), True),
        ("---d", (1, 1, 1, 1), False),
        ("---d", (1, 1, 1, 18), False),
        ("-h--", (1, HEADS, 1, 1), True),
        ("-h--", (1, 1, 1, 1), False),
        ("b--j", (2, 1, 1, 10), False),
        ("--i-", (1, 1, 7, 1), True),
    ],
)
def test_captures_are_as_large_as_they_are_read(dims: str, shape: tuple[int, ...], fits: bool) -> None:
    spec = AttentionSpec(parse("s + c0"), captures=(Capture(dims, torch.float32),))
    call = (*operands(7, 11), [torch.zeros(shape)], str(spec))
    config = "portable:16x16w4s2"
    if fits:
        assert attention_forward(*call, config, False)[0].shape == (2, HEADS, 7, 8)
        return
    with pytest.raises(LoweringError, match=f"can't be read as {dims}:f32"):
        attention_forward(*call, config, False)
    with pytest.raises(LoweringError, match=f"can't be read as {dims}:f32"):
        torch.ops.fxopt.attention(*call)
