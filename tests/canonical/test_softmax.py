"""The pass `softmax`: every way to write it, and what only looks like it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fxopt.passes.canonical.softmax import Softmax
from tests.canonical.support import DTYPES, assert_fires, assert_kept, random, rewrite

aten = torch.ops.aten


def _shifted(x: Tensor, shift: Tensor) -> Tensor:
    e = torch.exp(x - shift)
    return e / e.sum(-1, keepdim=True)


def _dropped_axis(x: Tensor) -> Tensor:
    e = (x - x.amax(-1).unsqueeze(-1)).exp()
    return e / e.sum(-1).unsqueeze(-1)


def _reciprocal(x: Tensor) -> Tensor:
    e = (x - x.amax(-1, keepdim=True)).exp()
    return e * (1 / e.sum(-1, keepdim=True))


def _other_axis(x: Tensor) -> Tensor:
    e = (x - x.amax(1, keepdim=True)).exp()
    return e / e.sum(1, keepdim=True)


def _wide(x: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    e = (wide - wide.amax(-1, keepdim=True)).exp()
    return (e / e.sum(3, keepdim=True)).to(x.dtype)


def _shifted_by_nothing(x: Tensor) -> Tensor:
    e = x.exp()
    return e / e.sum(-1, keepdim=True)


SPELLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "amax": lambda x: _shifted(x, x.amax(-1, keepdim=True)),
    "detached maximum": lambda x: _shifted(x, x.amax(-1, keepdim=True).detach()),
    "max": lambda x: _shifted(x, x.max(-1, keepdim=True).values),
    "global maximum": lambda x: _shifted(x, x.max()),
    "expanded maximum": lambda x: _shifted(x, x.amax(-1, keepdim=True).expand_as(x)),
    "dropped axis": _dropped_axis,
    "reciprocal": _reciprocal,
    "other axis": _other_axis,
    "float32 inside": _wide,
    "unshifted": _shifted_by_nothing,
    "logsumexp": lambda x: (x - x.logsumexp(-1, keepdim=True)).exp(),
    "logsumexp dropped": lambda x: (x - torch.special.logsumexp(x, 3).unsqueeze(-1)).exp(),
    "log softmax": lambda x: functional.log_softmax(x, -1).exp(),
    "log softmax wide": lambda x: functional.log_softmax(x, -1, dtype=torch.float64).exp().to(x.dtype),
    "positive axis": lambda x: x.softmax(3),
    "dtype": lambda x: x.softmax(-1, dtype=torch.float64).to(x.dtype),
    "special": lambda x: torch.special.softmax(x, 1),
    "low level": lambda x: torch._softmax(x, 2, False),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SPELLINGS)
def test_softmax_fires_on_every_spelling(name: str, dtype: torch.dtype) -> None:
    x = random(2, 3, 5, 7, dtype=dtype, scale=3)
    assert_fires(SPELLINGS[name], (x,), Softmax(), {"aten.softmax.int": 1, "aten.exp": 0, "aten.sum": 0})


def test_softmax_says_that_an_unshifted_one_changes_overflow() -> None:
    found = assert_fires(_shifted_by_nothing, (random(4, 5),), Softmax(), {"aten.softmax.int": 1})
    assert "overflows" in found.spelling


@pytest.mark.parametrize("shift", [True, False])
def test_softmax_fires_on_late_normalisation(shift: bool) -> None:
    def late(x: Tensor, v: Tensor) -> Tensor:
        e = (x - x.amax(-1, keepdim=True) if shift else x).exp()
        return (e @ v) / e.sum(-1, keepdim=True)

    args = (random(2, 3, 5, 7), random(2, 3, 7, 4, seed=1))
    assert_fires(late, args, Softmax(), {"aten.softmax.int": 1, "aten.matmul": 1, "aten.div": 0})


def test_softmax_fires_on_dynamic_shapes() -> None:
    seq = torch.export.Dim("seq", min=2, max=64)
    dynamic = ({0: torch.export.Dim("batch", min=2), 2: seq, 3: seq},)

    def by_hand(x: Tensor) -> Tensor:
        return _shifted(x, x.amax(-1, keepdim=True))

    result = rewrite(by_hand, (random(2, 3, 5, 5),), Softmax(), dynamic)
    assert len(result.replacements) == 1
    x = random(4, 3, 9, 9, seed=1)
    torch.testing.assert_close(result.program.module(x)[0], by_hand(x))


def test_softmax_normalises_the_axis() -> None:
    result = rewrite(lambda x: x.softmax(2), (random(2, 3, 5, 7),), Softmax())
    (node,) = result.program.graph.find_nodes(op="call_function", target=aten.softmax.int)
    assert node.args[1] == -2


def test_softmax_is_idempotent() -> None:
    assert not rewrite(lambda x: x.softmax(-1), (random(2, 3),), Softmax()).replacements


def test_softmax_keeps_fully_masked_rows_nan() -> None:
    x = torch.randn(3, 4)
    x[1] = -torch.inf
    result = rewrite(SPELLINGS["amax"], (x,), Softmax())
    assert result.program.module(x)[0][1].isnan().all() and SPELLINGS["amax"](x)[1].isnan().all()


def test_softmax_keeps_safe_softmax() -> None:
    result = rewrite(lambda x: torch.ops.aten._safe_softmax.default(x, -1), (random(3, 4),), Softmax())
    assert not result.replacements


def _divided(x: Tensor, total: Tensor) -> Tensor:
    return torch.exp(x - x.amax(-1, keepdim=True)) / total


def _wrong(sum_axis: int, shift_axis: int, keepdim: bool = True) -> Callable[[Tensor], Tensor]:
    def function(x: Tensor) -> Tensor:
        e = torch.exp(x - x.amax(shift_axis, keepdim=True))
        return e / e.sum(sum_axis, keepdim=keepdim)

    return function


def _cut(x: Tensor) -> Tensor:
    e = x.exp()
    with torch.no_grad():
        total = e.sum(-1, keepdim=True)
    return e / total


def _late_axis(x: Tensor) -> Tensor:
    e = torch.exp(x - x.amax(-2, keepdim=True))
    return (e @ x) / e.sum(-2, keepdim=True)


def _misplaced(x: Tensor) -> Tensor:
    e = torch.exp(x - x.amax(-1, keepdim=True))
    return e / e.sum(-1).unsqueeze(-2)


def _wider_shift(x: Tensor) -> Tensor:
    e = torch.exp(x[0] - x.amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True)


def _both_axes(x: Tensor) -> Tensor:
    e = torch.exp(x - x.amax((-1, -2), keepdim=True))
    return e / e.sum((-1, -2), keepdim=True)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (_wrong(-1, -2), "not known to be the same along axis -1"),
        (_wrong(-2, -1), "not known to be the same along axis -2"),
        (_wrong(-1, -1, keepdim=False), "not put back"),
        (_misplaced, "is put on axis -2"),
        (_both_axes, "not over one"),
        (_wider_shift, "axes that the scores lack"),
        (_late_axis, "does not contract the axis"),
        (_cut, "found detach"),
        (lambda x: torch.exp(x - x.logsumexp(-2)), "not put back"),
    ],
)
def test_softmax_rejects(function: Callable[[Tensor], Tensor], reason: str) -> None:
    assert_kept(function, (random(5, 5, 5, 5),), Softmax(), reason)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: _divided(x, torch.exp(x - x.amax(-2, keepdim=True)).sum(-1, keepdim=True)),
        lambda x: _divided(x, 1 + torch.exp(x - x.amax(-1, keepdim=True)).sum(-1, keepdim=True)),
        lambda x: _divided(x, torch.exp(x - x.amax(-1, keepdim=True)).sum(-1, keepdim=True).detach()),
    ],
    ids=["sum of other terms", "plus one", "detached sum"],
)
def test_softmax_does_not_match(function: Callable[[Tensor], Tensor]) -> None:
    result = rewrite(function, (random(5, 5, 5, 5),), Softmax())
    assert not result.replacements and result.near_misses
