"""The pass `rotary`: both layouts, every way to cut an axis, and rotations that are another function."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fxopt.passes.canonical.rotary import Rotary
from tests.canonical.support import DTYPES, assert_fires, assert_kept, random, rewrite

Turn = Callable[[Tensor], Tensor]


def _sliced(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def _chunked(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], 3)


def _split(x: Tensor) -> Tensor:
    first, second = torch.split(x, 4, -1)
    return torch.cat([-second, first], -1)


def _split_sizes(x: Tensor) -> Tensor:
    first, second = torch.split(x, [4, 4], dim=3)
    return torch.cat([-second, first], -1)


def _narrowed(x: Tensor) -> Tensor:
    return torch.cat([-x.narrow(-1, 4, 4), x.narrow(-1, 0, 4)], -1)


def _negative(x: Tensor) -> Tensor:
    return torch.cat([-x[..., -4:], x[..., :-4]], -1)


HALVES: dict[str, Turn] = {
    "slices": _sliced,
    "chunk": _chunked,
    "split": _split,
    "split with sizes": _split_sizes,
    "narrow": _narrowed,
    "negative slices": _negative,
}
PAIRS: dict[str, Turn] = {
    "flatten": lambda x: torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2),
    "reshape": lambda x: torch.stack((-x[:, :, :, 1::2], x[:, :, :, ::2]), dim=4).reshape(x.shape),
    "view": lambda x: torch.stack((-x[..., 1::2], x[..., ::2]), -1).view(*x.shape[:-1], -1),
}


def _args(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return random(2, 3, 5, 8, dtype=dtype), random(5, 8, dtype=dtype, seed=1), random(5, 8, dtype=dtype, seed=2)


def _embedding(turn: Turn) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda x, cos, sin: x * cos + turn(x) * sin


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("turn", [*HALVES.values(), *PAIRS.values()], ids=[*HALVES, *PAIRS])
def test_rotary_fires(turn: Turn, dtype: torch.dtype) -> None:
    rule = "halves" if turn in HALVES.values() else "pairs"
    found = assert_fires(_embedding(turn), _args(dtype), Rotary(), {"fxopt.rotary": 1, "aten.mul": 0, "aten.cat": 0})
    assert found.rule == rule


@pytest.mark.parametrize(
    "function",
    [
        lambda x, cos, sin: _sliced(x) * sin + x * cos,
        lambda x, cos, sin: cos * x + sin * _sliced(x),
        lambda x, cos, sin: (x * cos[None, None]) + (_sliced(x) * sin[None, None]),
        lambda x, cos, sin: x * cos[..., :1] + _sliced(x) * sin,
    ],
    ids=["terms swapped", "factors swapped", "unsqueezed", "broadcast cosine"],
)
def test_rotary_fires_in_any_order(function: Callable[..., Tensor]) -> None:
    assert_fires(function, _args(), Rotary(), {"fxopt.rotary": 1, "aten.mul": 0})


def test_rotary_fires_on_the_rotated_part() -> None:
    def partial(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned, passed = x[..., :8], x[..., 8:]
        return torch.cat((turned * cos + _sliced(turned) * sin, passed), -1)

    args = (random(2, 3, 5, 12), *_args()[1:])
    assert_fires(partial, args, Rotary(), {"fxopt.rotary": 1, "aten.cat": 1, "aten.mul": 0})


def test_rotary_fires_in_mixed_dtypes() -> None:
    x, cos, sin = random(2, 3, 5, 8, dtype=torch.bfloat16), random(5, 8, seed=1), random(5, 8, seed=2)
    assert_fires(_embedding(_sliced), (x, cos, sin), Rotary(), {"fxopt.rotary": 1})


@pytest.mark.parametrize("turn", [_sliced, _chunked, PAIRS["flatten"], PAIRS["reshape"]])
def test_rotary_fires_on_dynamic_shapes(turn: Turn) -> None:
    length = torch.export.Dim("length", min=2)
    dynamic = ({0: torch.export.Dim("batch", min=2), 2: length}, {0: length}, {0: length})
    result = rewrite(_embedding(turn), _args(), Rotary(), dynamic)
    assert len(result.replacements) == 1
    args = (random(4, 3, 7, 8), random(7, 8, seed=1), random(7, 8, seed=2))
    torch.testing.assert_close(result.program.module(*args)[0], _embedding(turn)(*args))


def test_rotary_keeps_computed_angles() -> None:
    def llama(x: Tensor, positions: Tensor) -> Tensor:
        with torch.no_grad():
            frequencies = torch.cat([positions[:, None] / torch.arange(1, 5)] * 2, -1)
            cos, sin = frequencies.cos(), frequencies.sin()
        return x * cos + _sliced(x) * sin

    assert_fires(llama, (random(2, 3, 5, 8), torch.arange(5.0)), Rotary(), {"fxopt.rotary": 1, "aten.cos": 1})


def _joined_on_heads(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), 1)


def _stacked_before(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), -2).flatten(-2)


@pytest.mark.parametrize(
    ("function", "shape", "reason"),
    [
        (_embedding(_joined_on_heads), (2, 1, 5, 2), "joined along axis 1"),
        (_embedding(_stacked_before), (2, 3, 5, 8), "stacked on axis -2"),
        (
            _embedding(lambda x: torch.cat((-x[..., 3:], x[..., :3]), -1)),
            (2, 3, 5, 8),
            "is not part 1 of 2",
        ),
        (
            _embedding(lambda x: torch.cat((-x[..., :4], x[..., 4:]), -1)),
            (2, 3, 5, 8),
            "is not part 1 of 2",
        ),
        (_embedding(lambda x: torch.stack((-x[..., ::2], x[..., 1::2]), -1).flatten(-2)), (2, 3, 5, 8), "interleaved"),
        (_embedding(lambda x: _sliced(x.flip(0))), (2, 3, 5, 8), "x is both"),
        (lambda x, cos, sin: _embedding(_sliced)(x, cos, sin.expand(2, 3, 5, 8)), (1, 3, 5, 8), "do not broadcast"),
    ],
)
def test_rotary_rejects(function: Callable[..., Tensor], shape: tuple[int, ...], reason: str) -> None:
    angles = (random(1, seed=1), random(1, seed=2))
    assert_kept(function, (random(*shape), *angles), Rotary(), reason)


@pytest.mark.parametrize(
    "turn",
    [lambda x: torch.cat((x[..., 4:], x[..., :4]), -1), lambda x: torch.cat((x[..., 4:], -x[..., :4]), -1)],
    ids=["no sign", "other sign"],
)
def test_rotary_does_not_match(turn: Turn) -> None:
    assert not rewrite(_embedding(turn), _args(), Rotary()).replacements
