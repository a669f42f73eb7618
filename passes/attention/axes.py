"""Where the axes of a contraction's second operand come from, through transposes and permutes.

A contraction of queries with *anything* can be written as attention, but only keys make it mean attention: the summed
axis must be the innermost axis of the tensor that keys are a view of, and batch axes must have stayed in front, or keys
must be laid out as the values are. Everything else is a near miss (a forgotten or a wrong transpose).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from fxopt.ir.nodes import is_call, is_tensor, same_size, shape

aten = torch.ops.aten

_KEEPS_AXES = (
    aten.contiguous.default, aten.clone.default, aten.expand.default, aten.to.dtype, aten.to.device, aten.alias.default,
    aten._to_copy.default, aten.detach.default, aten.mul.Tensor, aten.div.Tensor, torch.ops.fxopt.repeat_heads.default,
)  # fmt: skip


def origin(node: Node) -> tuple[int | None, ...]:
    """For each axis of ``node`` the axis it was in the tensor that ``node`` is a permuted view of (``None``: added)."""
    rank = len(shape(node))
    moves: list[int | None] = list(range(rank))
    while True:
        if is_call(node, aten.unsqueeze.default) and isinstance(node.args[1], int):
            axis = node.args[1] % len(shape(node))
            moves = [None if m is None or m == axis else m - (m > axis) for m in moves]
        elif order := _permutation(node):
            moves = [None if m is None else order[m] for m in moves]
        elif added := _axes_merged(node):
            moves = [m + added if m else m for m in moves]
        elif not is_call(node, *_KEEPS_AXES) or _changes_rank(node):
            return tuple(moves)
        operand = node.args[0]
        assert isinstance(operand, Node)
        node = operand


def is_key_like(keys: Node, values: Node) -> bool:
    """Whether ``keys [*lead, D, T]`` is the transpose of a tensor whose innermost axis is the feature axis.

    Accepted: the summed axis is innermost at its origin and the first axis still leads (or the layout has two axes), or
    the key axis and the batch axes come from where those of ``values [*lead, T, E]`` come from.
    """
    key_axes, value_axes = origin(keys), origin(values)
    rank = max((axis for axis in key_axes if axis is not None), default=0) + 1
    innermost = key_axes[-2] == rank - 1
    leads = rank == 2 or key_axes[0] in (0, None)
    as_values = len(key_axes) == len(value_axes) and (*key_axes[:-2], key_axes[-1]) == value_axes[:-1]
    return innermost and (leads or as_values)


def round_trip(node: Node) -> tuple[Node, ...]:
    """The permutations and copies between ``node`` and the tensor that it shows with its axes back in their places.

    ``x.transpose(1, 2).contiguous().transpose(1, 2)``, for one. From last to first; empty when there is no such tensor.
    """
    chain: list[Node] = []
    moves = list(range(len(shape(node)))) if _permutation(node) else []
    while moves:
        order = _permutation(node)
        if not order and not is_call(node, aten.contiguous.default, aten.clone.default):
            return ()
        chain.append(node)
        moves = [order[m] for m in moves] if order else moves
        if moves == sorted(moves):
            return tuple(chain)
        operand = node.args[0]
        assert isinstance(operand, Node)
        node = operand
    return ()


def axis_list(axes: Any, rank: int) -> list[int]:
    """Axes as a graph argument gives them, counted from the left."""
    return [int(axis) % rank for axis in axes]


def _permutation(node: Node) -> list[int] | None:
    rank = len(shape(node)) if node.op == "call_function" and is_tensor(node) else 0
    if is_call(node, aten.permute.default):
        return axis_list(node.args[1], rank)
    if is_call(node, aten.transpose.int):
        a, b = axis_list(node.args[1:3], rank)
    elif is_call(node, aten.t.default, aten.mT.default, aten.numpy_T.default) and rank >= 2:
        a, b = rank - 2, rank - 1
    else:
        return None
    order = list(range(rank))
    order[a], order[b] = b, a
    return order


def _axes_merged(node: Node) -> int:
    """How many batch axes a view into ``[N, R, C]`` has merged with the first one, which stands for them all."""
    if not is_call(node, aten.reshape.default, aten.view.default, aten.flatten.using_ints) or len(shape(node)) != 3:
        return 0
    before, after = shape(node.args[0]), shape(node)
    keeps = len(before) > 3 and all(same_size(a, b) for a, b in zip(before[-2:], after[-2:], strict=True))
    return len(before) - 3 if keeps else 0


def _changes_rank(node: Node) -> bool:
    operand = node.args[0]
    return not isinstance(operand, Node) or len(shape(operand)) != len(shape(node))
