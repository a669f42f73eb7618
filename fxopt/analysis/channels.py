"""Following the channels of a tensor to whatever reads them as channels.

A scale and a shift per channel may be moved past everything that only moves whole channels about, and past averages
over other axes: ``move(a ⊙ x + b) = a ⊙ move(x) + b``. What puts in elements of its own is an obstacle: a padded zero
would become ``b``.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.fx import Node

from fxopt.ir.nodes import Size, arguments, is_tensor, same_size, scalar, shape, tensor
from fxopt.ir.program import operator_name

aten = torch.ops.aten


@dataclass(frozen=True)
class End:
    """Something other than a move that reads the channels: of its operand ``x`` they are the axis ``axis`` (≥ 0)."""

    node: Node
    x: Node
    axis: int


@dataclass(frozen=True)
class Reach:
    """Where channels go: the moves ``between`` in the order of the graph, and the ``ends``."""

    between: tuple[Node, ...]
    ends: tuple[End, ...]


@dataclass(frozen=True)
class Obstacle:
    """Why channels can't be followed, and the nodes to blame."""

    reason: str
    nodes: tuple[Node, ...]


#: Where the channels of the first operand are in the result: the axis, a reason against it, or ``None``: it is no move.
Answer = int | str | None


def follow_channels(start: Node, axis: int, *, shifted: bool) -> Reach | Obstacle:
    """Everything that reads the channels, which are the axis ``axis`` of ``start``.

    With ``shifted`` there is a shift per channel, which zeros put in from outside and sums do not survive.
    """
    place: dict[Node, int] = {start: axis % len(shape(start))}
    between: list[Node] = []
    ends: list[End] = []
    for node in _from(start):
        for x in [operand for operand in node.all_input_nodes if operand in place]:
            moved = moved_axis(node, x, place[x], shifted=shifted)
            if isinstance(moved, str):
                return Obstacle(moved, (node,))
            if moved is None:
                ends.append(End(node, x, place[x]))
            else:
                place[node] = moved
                between.append(node)
    return Reach(tuple(between), tuple(ends))


def moved_axis(node: Node, x: Node, axis: int, *, shifted: bool) -> Answer:
    """Where ``node`` has the channels of ``x``, if it only moves them."""
    answer = _MOVES.get(node.target) if node.op == "call_function" else None
    if answer is None or not node.args or node.args[0] is not x or node.all_input_nodes.count(x) > 1:
        return None
    if any(x in (value if isinstance(value, list | tuple) else [value]) for value in node.args[1:]):
        return None
    return answer(node, axis, shifted)


def _from(start: Node) -> list[Node]:
    nodes = list(start.graph.nodes)
    return nodes[nodes.index(start) + 1 :]


def _same(node: Node, axis: int, shifted: bool) -> Answer:
    return axis if not is_tensor(node) or tensor(node).dtype.is_floating_point else None


def _dropout(node: Node, axis: int, shifted: bool) -> Answer:
    given = arguments(node)
    if given["train"] and given["p"] and shifted:
        return "dropout lies between: it would drop the shift of the norm as well"
    return axis


def axis_order(node: Node) -> tuple[int, ...]:
    """For each axis of the result of a permutation (`PERMUTATIONS`) the axis of its operand that it is.

    Found by what the operator does to a tensor all of whose sizes differ.
    """
    rest, rank = node.args[1:], len(shape(node.args[0]))
    assert callable(node.target)
    marked = torch.empty(tuple(range(2, rank + 2)), device="meta")
    return tuple(size - 2 for size in node.target(marked, *rest, **node.kwargs).shape)


def _permuted(node: Node, axis: int, shifted: bool) -> Answer:
    return axis_order(node).index(axis)


def _viewed(node: Node, axis: int, shifted: bool) -> Answer:
    """The axis of the same size with as many elements behind it."""
    before, after = shape(node.args[0]), shape(node)
    behind = _count(before[axis + 1 :])
    for place, size in enumerate(after):
        if same_size(size, before[axis]) and same_size(_count(after[place + 1 :]), behind):
            return place
    return f"{operator_name(node)} splits or joins the channels (from {_sizes(before)} to {_sizes(after)})"


def _picked(node: Node, axis: int, shifted: bool) -> Answer:
    """Some places along another axis."""
    whole = not is_tensor(node) or same_size(shape(node)[axis], shape(node.args[0])[axis])
    return axis if whole and _dimension(node) != axis else f"{operator_name(node)} takes some of the channels only"


def _selected(node: Node, axis: int, shifted: bool) -> Answer:
    dim = _dimension(node)
    if dim == axis:
        return f"{operator_name(node)} takes one of the channels"
    return axis - (dim < axis)


def _dimension(node: Node) -> int:
    return int(arguments(node)["dim"]) % len(shape(node.args[0]))


def _rolled(node: Node, axis: int, shifted: bool) -> Answer:
    dims = [int(d) % len(shape(node.args[0])) for d in arguments(node)["dims"]]
    return axis if dims and axis not in dims else f"{operator_name(node)} moves channels into each other's place"


def _item(node: Node, axis: int, shifted: bool) -> Answer:
    return axis


def _indexed(node: Node, axis: int, shifted: bool) -> Answer:
    """Places along neighbouring axes, by integer tensors."""
    indices = list(arguments(node)["indices"])
    used = [place for place, index in enumerate(indices) if index is not None]
    if axis in used:
        return "an index takes some of the channels only"
    readable = all(is_tensor(indices[p]) and tensor(indices[p]).dtype in (torch.int64, torch.int32) for p in used)
    if not readable or used != list(range(used[0], used[-1] + 1)):
        return "it is indexed in a way that is not followed"
    rank = max(len(shape(indices[place])) for place in used)
    return axis if axis < used[0] else axis - len(used) + rank


def _expanded(node: Node, axis: int, shifted: bool) -> Answer:
    place = axis + len(shape(node)) - len(shape(node.args[0]))
    return place if same_size(shape(node)[place], shape(node.args[0])[axis]) else "expand repeats a single channel"


def _repeated(node: Node, axis: int, shifted: bool) -> Answer:
    repeats = arguments(node)["repeats"]
    place = axis + len(repeats) - len(shape(node.args[0]))
    return place if scalar(repeats[place]) == 1 else "repeat strings copies of the channels together"


def _averaged(node: Node, axis: int, shifted: bool) -> Answer:
    given = arguments(node)
    rank = len(shape(node.args[0]))
    dims = given["dim"]
    dims = list(range(rank)) if not dims else [d % rank for d in dims]
    if axis in dims:
        return f"{operator_name(node)} runs over the channels"
    return axis if given["keepdim"] else axis - sum(d < axis for d in dims)


def _summed(node: Node, axis: int, shifted: bool) -> Answer:
    return (
        "a sum lies between: it would add the shift of the norm once per element"
        if shifted
        else _averaged(node, axis, shifted)
    )


def _pooled(node: Node, axis: int, shifted: bool) -> Answer:
    """An average over windows of the last axes, every window of its own elements only."""
    given, rank = arguments(node), len(shape(node.args[0]))
    axes = 2 if "2d" in operator_name(node) else 1
    if axis >= rank - axes:
        return f"{operator_name(node)} runs over the channels"
    if shifted and given.get("divisor_override") is not None:
        return "the average divides by a number of its own"
    padding = given.get("padding", 0)
    padded = any(padding if isinstance(padding, list | tuple) else [padding]) and given.get("count_include_pad", True)
    return "zero padding lies between" if padded and shifted else axis


def _padded(node: Node, axis: int, shifted: bool) -> Answer:
    given = arguments(node)
    amounts, rank = list(given["pad"]), len(shape(node.args[0]))
    if all(scalar(amount) == 0 for amount in amounts):
        return axis
    behind = 2 * (rank - 1 - axis)
    if any(scalar(amount) != 0 for amount in amounts[behind : behind + 2]):
        return f"{operator_name(node)} adds channels"
    if given.get("mode", "constant") != "constant":
        return axis
    if scalar(given["value"]) not in (None, 0):
        return f"padding with {given['value']} lies between"
    return "zero padding lies between: what is 0 there would become the shift of the norm" if shifted else axis


def _count(sizes: tuple[Size, ...]) -> Size:
    return math.prod(sizes)


def _sizes(sizes: tuple[Size, ...]) -> str:
    return f"[{', '.join(map(str, sizes))}]"


def _table(*rows: tuple[Callable[[Node, int, bool], Answer], str]) -> dict[Any, Callable[[Node, int, bool], Answer]]:
    table: dict[Any, Callable[[Node, int, bool], Answer]] = {operator.getitem: _item}
    for answer, names in rows:
        for name in names.split():
            packet, _, overload = name.partition(".")
            table[getattr(getattr(aten, packet), overload or "default")] = answer
    return table


_MOVES: Final = _table(
    (_same, "clone contiguous alias detach lift_fresh to.dtype to.dtype_layout to.device to.other type_as _to_copy"),
    (_dropout, "dropout"),
    (_permuted, "permute transpose.int movedim.int movedim.intlist swapaxes swapdims t numpy_T mT adjoint"),
    (_viewed, "view reshape _unsafe_view flatten.using_ints unflatten.int unsqueeze"),
    (_viewed, "squeeze squeeze.dim squeeze.dims"),
    (_picked, "slice.Tensor narrow index_select gather split.Tensor split_with_sizes chunk"),
    (_selected, "select.int unbind.int"),
    (_rolled, "roll flip"),
    (_indexed, "index.Tensor"),
    (_expanded, "expand"),
    (_repeated, "repeat"),
    (_averaged, "mean.dim"),
    (_summed, "sum.dim_IntList"),
    (_pooled, "adaptive_avg_pool1d adaptive_avg_pool2d avg_pool1d avg_pool2d"),
    (_padded, "pad constant_pad_nd"),
)

#: Operators that put the axes into another order.
PERMUTATIONS: Final = frozenset(target for target, answer in _MOVES.items() if answer is _permuted)
