"""The pass `repeat-heads`: every way to repeat key/value heads, and what repeats something else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fxopt.passes.canonical.repeat_heads import RepeatHeads
from tests.canonical.support import DTYPES, assert_fires, assert_kept, random, rewrite

B, G, S, D, N = 2, 3, 5, 7, 4


def _expanded(x: Tensor) -> Tensor:
    b, g, s, d = x.shape
    return x[:, :, None, :, :].expand(b, g, N, s, d).reshape(b, g * N, s, d)


def _expanded_first(x: Tensor) -> Tensor:
    b, g, s, d = x.shape
    return x[:, None].expand(b, N, g, s, d).reshape(b, N * g, s, d)


GROUPED: dict[str, Callable[[Tensor], Tensor]] = {
    "repeat_interleave": lambda x: x.repeat_interleave(N, dim=1),
    "repeat_interleave negative": lambda x: torch.repeat_interleave(x, N, -3),
    "expand": _expanded,
    "view and clone": lambda x: x.view(B, G, 1, S, D).expand(-1, -1, N, -1, -1).clone().view(B, G * N, S, D),
    "contiguous": lambda x: x.unsqueeze(2).expand(B, G, N, S, D).contiguous().view(B, -1, S, D),
    "flatten": lambda x: x.unsqueeze(2).expand(-1, -1, N, -1, -1).flatten(1, 2),
    "repeat": lambda x: x[:, :, None].repeat(1, 1, N, 1, 1).flatten(1, 2),
}
TILED: dict[str, Callable[[Tensor], Tensor]] = {
    "repeat": lambda x: x.repeat(1, N, 1, 1),
    "tile": lambda x: torch.tile(x, (1, N, 1, 1)),
    "expand": _expanded_first,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GROUPED)
def test_repeat_heads_fires_on_groups(name: str, dtype: torch.dtype) -> None:
    args = (random(B, G, S, D, dtype=dtype),)
    assert_fires(GROUPED[name], args, RepeatHeads(), {"fxopt.repeat_heads": 1, "aten.expand": 0})
    assert _order(GROUPED[name]) == [N, "group"]


@pytest.mark.parametrize("name", TILED)
def test_repeat_heads_fires_on_tiles(name: str) -> None:
    assert_fires(TILED[name], (random(B, G, S, D),), RepeatHeads(), {"fxopt.repeat_heads": 1})
    assert _order(TILED[name]) == [N, "tile"]


@pytest.mark.parametrize("name", ["expand", "repeat_interleave", "flatten"])
def test_repeat_heads_fires_on_colliding_sizes(name: str) -> None:
    assert_fires(GROUPED[name], (random(N, N, N, N),), RepeatHeads(), {"fxopt.repeat_heads": 1})
    assert_fires(_expanded_first, (random(N, N, N, N),), RepeatHeads(), {"fxopt.repeat_heads": 1})


def _order(function: Callable[[Tensor], Tensor]) -> list[object]:
    result = rewrite(function, (random(B, G, S, D),), RepeatHeads())
    return list(
        result.program.graph.find_nodes(op="call_function", target=torch.ops.fxopt.repeat_heads.default)[0].args[1:]
    )


EXPORTED = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13),
    reason="torch.export before 2.13 refuses a dynamic length after expand and reshape (min(7*length, 28*length))",
)


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(_expanded, marks=EXPORTED),
        pytest.param(_expanded_first, marks=EXPORTED),
        pytest.param(GROUPED["repeat_interleave"], marks=EXPORTED),
        TILED["repeat"],
    ],
)
def test_repeat_heads_fires_on_dynamic_shapes(function: Callable[[Tensor], Tensor]) -> None:
    dynamic = ({0: torch.export.Dim("batch", min=2), 2: torch.export.Dim("length", min=2)},)
    result = rewrite(function, (random(B, G, S, D),), RepeatHeads(), dynamic)
    assert len(result.replacements) == 1
    x = random(3, G, 11, D, seed=1)
    torch.testing.assert_close(result.program.module(x)[0], function(x))


def test_repeat_heads_takes_a_symbolic_count() -> None:
    def by_queries(x: Tensor, q: Tensor) -> Tensor:
        b, g, s, d = x.shape
        return x[:, :, None].expand(b, g, q.shape[0], s, d).reshape(b, g * q.shape[0], s, d)

    dynamic = ({0: torch.export.Dim("batch", min=2)}, {0: torch.export.Dim("count", min=2)})
    result = rewrite(by_queries, (random(B, G, S, D), torch.ones(N)), RepeatHeads(), dynamic)
    assert len(result.replacements) == 1
    x, q = random(3, G, S, D, seed=1), torch.ones(6)
    torch.testing.assert_close(result.program.module(x, q)[0], by_queries(x, q))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x.repeat_interleave(N, dim=2), "axis 2 of a tensor with 4 axes is not the head axis"),
        (lambda x: x[0].repeat_interleave(N, dim=1), "with 3 axes"),
        (lambda x: x.repeat(2, N, 1, 1), "is not tiling the head axis"),
        (lambda x: x.repeat(1, 1, N, 1), "is not tiling the head axis"),
        (lambda x: x.unsqueeze(3).expand(-1, -1, -1, N, -1).flatten(2, 3), "no axis of size 1 is put beside"),
        (lambda x: x[:, :1].unsqueeze(2).expand(-1, G, N, -1, -1).flatten(1, 2), "more than the new axis is expanded"),
        (lambda x: x.unsqueeze(2).repeat(1, 2, N, 1, 1).flatten(1, 2), "more than the new axis is tiled"),
        (lambda x: x.unsqueeze(2).expand(-1, -1, N, -1, -1).flatten(2, 3), "not joined with the head axis"),
        (lambda x: x.unsqueeze(1).expand(-1, N, -1, -1, -1).flatten(0, 1), "not joined with the head axis"),
    ],
)
def test_repeat_heads_rejects(function: Callable[[Tensor], Tensor], reason: str) -> None:
    assert_kept(function, (random(B, G, S, D),), RepeatHeads(), reason)


def test_repeat_heads_is_idempotent() -> None:
    first = rewrite(_expanded, (random(B, G, S, D),), RepeatHeads())
    assert not RepeatHeads().run(first.program).modified
