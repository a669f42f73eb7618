"""Following channels: what is called a move commutes with a scale and a shift per channel, whatever the axis."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from fxopt.analysis.channels import _MOVES, Obstacle, follow_channels
from fxopt.frontend.export import from_export

#: Sizes that differ, and a size that occurs twice.
SHAPES = ((2, 3, 4, 6), (4, 4, 4, 4), (1, 3, 1, 6))
INDEX = torch.tensor([[1, 0, 1], [0, 0, 1]])
ALL = (0, 1, 2, 3)

#: The function, the axes along which channels may lie, and those where there must be no shift.
CASES: dict[str, tuple[Callable[[Tensor], Any], tuple[int, ...], tuple[int, ...]]] = {
    "clone": (lambda x: x.clone(), ALL, ()),
    "contiguous": (lambda x: x.mT.contiguous(), ALL, ()),
    "alias": (lambda x: torch.ops.aten.alias(x.mT), ALL, ()),
    "detach": (lambda x: x.detach(), ALL, ()),
    "permute": (lambda x: x.permute(2, 0, 3, 1), ALL, ()),
    "transpose": (lambda x: x.transpose(1, -1), ALL, ()),
    "movedim": (lambda x: x.movedim(1, 3), ALL, ()),
    "movedims": (lambda x: x.movedim((0, 2), (3, 0)), ALL, ()),
    "swapaxes": (lambda x: x.swapaxes(0, 2), ALL, ()),
    "swapdims": (lambda x: x.swapdims(0, 2), ALL, ()),
    "mT": (lambda x: x.mT, ALL, ()),
    "T": (lambda x: x.select(0, 0).select(0, 0).T, (2, 3), ()),
    "adjoint": (lambda x: x.adjoint(), ALL, ()),
    "t": (lambda x: x.select(0, 0).select(0, 0).t(), (2, 3), ()),
    "view": (lambda x: x.view(x.shape[0] * x.shape[1], x.shape[2], x.shape[3]), (2, 3), ()),
    "reshape": (lambda x: x.reshape(x.shape[0], -1, x.shape[3]), (0, 3), ()),
    "flatten": (lambda x: x.flatten(1, 2), (0, 3), ()),
    "unflatten": (lambda x: x.unflatten(3, (2, -1)), (0, 1, 2), ()),
    "unsqueeze": (lambda x: x.unsqueeze(2), ALL, ()),
    "squeeze": (lambda x: x.unsqueeze(1).squeeze(1), ALL, ()),
    "squeeze all": (lambda x: x.unsqueeze(1).squeeze((1,)), ALL, ()),
    "slice": (lambda x: x[:, 1:], (0, 2, 3), ()),
    "narrow": (lambda x: x.narrow(3, 1, 3), (0, 1, 2), ()),
    "select": (lambda x: x.select(1, 1), (0, 2, 3), ()),
    "index_select": (lambda x: x.index_select(1, INDEX[0]), (0, 2, 3), ()),
    "gather": (lambda x: x.gather(1, torch.zeros_like(x, dtype=torch.long)), (0, 2, 3), ()),
    "gather of less": (lambda x: x.gather(1, torch.zeros_like(x, dtype=torch.long)[..., :3]), (0, 2), ()),
    "split": (lambda x: x.split([1, x.shape[3] - 1], 3), (0, 1, 2), ()),
    "split evenly": (lambda x: x.split(2, 3)[1], (0, 1, 2), ()),
    "chunk": (lambda x: x.chunk(2, 3), (0, 1, 2), ()),
    "unbind": (lambda x: x.unbind(1), (0, 2, 3), ()),
    "roll": (lambda x: x.roll((1, 2), (1, 3)), (0, 2), ()),
    "roll of all": (lambda x: x.roll(1), (), ()),
    "flip": (lambda x: x.flip((0, 2)), (1, 3), ()),
    "index": (lambda x: x[:, :, :, INDEX], (0, 1, 2), ()),
    "index of two axes": (lambda x: x[:, INDEX, INDEX * 0], (0, 3), ()),
    "index of axes apart": (lambda x: x[INDEX * 0, :, INDEX * 0], (), ()),
    "expand": (lambda x: x.unsqueeze(0).expand(5, -1, -1, -1, -1), ALL, ()),
    "repeat": (lambda x: x.repeat(2, 1, 1, 1, 2), (0, 1, 2), ()),
    "mean": (lambda x: x.mean((1, 2)), (0, 3), ()),
    "mean kept": (lambda x: x.mean(-1, keepdim=True), (0, 1, 2), ()),
    "sum": (lambda x: x.sum((1, 2)), (), (0, 3)),
    "adaptive_avg_pool1d": (lambda x: F.adaptive_avg_pool1d(x.flatten(0, 1), 2), (2,), ()),
    "adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, 1), (0, 1), ()),
    "avg_pool1d": (lambda x: F.avg_pool1d(x.flatten(0, 1), 2), (2,), ()),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 1, 1), (0, 1), ()),
    "avg_pool2d padded": (lambda x: F.avg_pool2d(x, 2, 1, 1), (), (0, 1)),
    "avg_pool2d padded, not counted": (lambda x: F.avg_pool2d(x, 2, 1, 1, count_include_pad=False), (0, 1), ()),
    "avg_pool2d, divided by 3": (lambda x: F.avg_pool2d(x, 1, 1, divisor_override=3), (), (0, 1)),
    "pad": (lambda x: F.pad(x, (1, 2, 0, 0, 1, 0)), (), (0, 2)),
    "pad by nothing": (lambda x: F.pad(x, (0, 0, 0, 0)), ALL, ()),
    "pad by ones": (lambda x: F.pad(x, (1, 2), value=1.0), (), ()),
    "pad by repeating": (lambda x: F.pad(x, (1, 1, 0, 0), mode="replicate"), (0, 1, 2), ()),
    "constant_pad_nd": (lambda x: torch.constant_pad_nd(x, (1, 2)), (), (0, 1, 2)),
    "dropout": (lambda x: F.dropout(x, 0.5, False), ALL, ()),
    "cast": (lambda x: x.to(torch.float32).to(torch.float64), ALL, ()),
    "cast like": (lambda x: x.type_as(torch.ones((), dtype=torch.float32)).double(), ALL, ()),
    "cast to": (lambda x: x.to(torch.ones((), dtype=torch.float32)).double(), ALL, ()),
    "square": (lambda x: x * x, (), ()),
    "pairs": (lambda x: torch.cat((x, x), 1), (), ()),
    "maximum": (lambda x: x.amax(1), (), ()),
    "softmax": (lambda x: x.softmax(1), (), ()),
    "running sum": (lambda x: x.cumsum(1), (), ()),
    "cast to integers": (lambda x: x.to(torch.int64), (), ()),
}

#: The shape that the cases tell the legal axes of; of the others it is checked that what is followed is right.
EXPECTED = SHAPES[0]


@functools.cache
def _graph(name: str, shape: tuple[int, ...]) -> fx.Graph:
    return from_export(CASES[name][0], (torch.randn(shape, dtype=torch.float64),)).graph


def _read(name: str, shape: tuple[int, ...], axis: int, *, shifted: bool) -> dict[int, int] | Obstacle:
    """For each result of the case the axis of the channels; empty if something else than moves reads them."""
    graph = _graph(name, shape)
    (start,) = graph.find_nodes(op="placeholder")[:1]
    reach = follow_channels(start, axis, shifted=shifted)
    if isinstance(reach, Obstacle):
        return reach
    places = {end.x: end.axis for end in reach.ends if end.node.op == "output"}
    results = tree_leaves(graph.output_node().args[0])
    return {} if len(places) < len(set(results)) else {i: places[result] for i, result in enumerate(results)}


def _along(vector: Tensor, axis: int, rank: int) -> Tensor:
    return vector.view([-1 if place == axis else 1 for place in range(rank)])


def _legal(name: str, shape: tuple[int, ...], axis: int, *, shifted: bool) -> bool:
    """Whether the channels are followed; then the results must be those of the definition."""
    function = CASES[name][0]
    generator = torch.Generator().manual_seed(axis)
    x = torch.randn(shape, dtype=torch.float64, generator=generator)
    places = _read(name, shape, axis, shifted=shifted)
    if isinstance(places, Obstacle) or not places:
        return False
    scale, shift = torch.randn(2, shape[axis], dtype=torch.float64, generator=generator)
    shift = shift if shifted else torch.zeros_like(shift)
    moved = tree_leaves(function(x * _along(scale, axis, 4) + _along(shift, axis, 4)))
    plain = tree_leaves(function(x))
    tolerance = 1e-5 if name.startswith("cast") else 1e-12
    for number, (after, before) in enumerate(zip(moved, plain, strict=True)):
        expected = before * _along(scale, places[number], before.dim()) + _along(shift, places[number], before.dim())
        torch.testing.assert_close(after, expected, rtol=tolerance, atol=tolerance)
    return True


@pytest.mark.parametrize("name", CASES)
def test_moves_commute_with_scale_and_shift(name: str) -> None:
    _, with_shift, without = CASES[name]
    assert tuple(axis for axis in ALL if _legal(name, EXPECTED, axis, shifted=True)) == with_shift
    unshifted = tuple(axis for axis in ALL if _legal(name, EXPECTED, axis, shifted=False))
    assert unshifted == tuple(sorted({*with_shift, *without}))


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_moves_are_right_where_sizes_collide(name: str, shape: tuple[int, ...]) -> None:
    for axis in ALL:
        for shifted in (True, False):
            _legal(name, shape, axis, shifted=shifted)


def test_every_move_has_a_case() -> None:
    covered = {node.target for name in CASES for node in _graph(name, EXPECTED).nodes}
    named = {getattr(target, "__name__", str(target)) for target in _MOVES.keys() - covered - {operator.getitem}}
    assert named <= {
        "lift_fresh.default", "to.dtype_layout", "to.other", "to.device", "_to_copy.default", "_unsafe_view.default",
        "squeeze.default",
    }, "these come from other entries or stand for the same thing"  # fmt: skip
