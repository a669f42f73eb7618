"""What reads the weights of an attention besides the contraction with the values, and the least that serves it.

From the softmax on, casts, views that keep rows and keys, and what is done to heads alone lead to the readers. One that
takes a few rows needs the weights of those queries only, one that sums over queries needs column sums; if any reader
needs something else, all of them read the whole weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch.fx import Node

from fxopt.ir.nodes import Size, arguments, is_call, same_shape, same_size, shape, tensor
from fxopt.passes.attention.region import CASTS, RESHAPES
from fxopt.rewriter.rule import Rejection

aten = torch.ops.aten

Statistic = Literal["column_sum", "diagonal"]

SUMS: Final = (aten.sum.dim_IntList, aten.mean.dim)
CUTS: Final = (aten.select.int, aten.slice.Tensor)
_SAME: Final = (aten.detach.default, aten.alias.default, aten.clone.default, aten.contiguous.default)
#: Different parts of the rows beyond which the whole weights are computed once.
_MOST_PARTS: Final = 4
_END: Final = 2**63 - 1


@dataclass(frozen=True)
class Rows:
    """The rows ``start:stop:step`` as `torch.Tensor` slices count them."""

    start: int
    stop: int
    step: int = 1

    def count(self, rows: int) -> int:
        """How many they are of ``rows``."""
        return len(range(rows)[self.start : self.stop : self.step])

    def __str__(self) -> str:
        if self.stop == _stop_after(self.start):
            return f"weights of row {self.start}"
        stop = "" if self.stop == _END else self.stop
        return f"weights of rows {self.start or ''}:{stop}{f':{self.step}' if self.step != 1 else ''}"


def _stop_after(row: int) -> int:
    return _END if row == -1 else row + 1


@dataclass(frozen=True)
class Reader:
    """A node that reads the weights, the nodes from the softmax (left out) to its operand, and what it needs."""

    node: Node
    path: tuple[Node, ...]
    need: Rows | Statistic


@dataclass(frozen=True)
class Readers:
    """The readers of one site's weights; ``whole`` when the weights are to be computed as they are."""

    readers: tuple[Reader, ...] = ()
    whole: bool = False

    def __bool__(self) -> bool:
        return self.whole or bool(self.readers)


def read_readers(softmax: Node, chain: tuple[Node, ...], root: Node, rows: Size) -> Readers | Rejection:
    """Who reads the weights outside ``chain``, the nodes from ``softmax`` to the contraction ``root``."""
    found: list[Reader] = []
    whole = False
    for operand, reader, path in _outside(softmax, set(chain), root):
        rejection = _unfit(operand, reader, path)
        if rejection:
            return rejection
        need = _need(operand, reader, rows) if _replayable(softmax, path) else None
        if need is None or (need == "diagonal" and any(not is_call(n, *CASTS, *_SAME) for n in path)):
            whole = True
        else:
            found.append(Reader(reader, path, need))
    order = {node: position for position, node in enumerate(softmax.graph.nodes)}
    found.sort(key=lambda reader: order[reader.node])
    taken = {reader.need for reader in found if isinstance(reader.need, Rows)}
    return Readers((), True) if whole or _are_many(taken, rows) else Readers(tuple(found))


def _are_many(taken: set[Rows], rows: Size) -> bool:
    """Whether the weights of several parts cost more than whole ones, which the output can be computed from as well."""
    count = rows if isinstance(rows, int) else _END
    return len(taken) > _MOST_PARTS or 2 * sum(part.count(count) for part in taken) > count


def _outside(softmax: Node, chain: set[Node], root: Node) -> Iterator[tuple[Node, Node, tuple[Node, ...]]]:
    """Each node that reads the weights at the end of a path: its operand, itself, the path to the operand."""
    pending: list[tuple[Node, tuple[Node, ...]]] = [(softmax, ())]
    while pending:
        node, path = pending.pop()
        for user in node.users:
            if user in chain or (_is_step(node, user) and not _is_last(user)):
                pending.append((user, (*path, user)))
            elif user is not root:
                yield node, user, path


def _is_last(node: Node) -> bool:
    """Whether nothing but the graph's output reads ``node``, so that it is what is wanted of the weights."""
    return all(user.op == "output" for user in node.users)


def _unfit(operand: Node, reader: Node, path: tuple[Node, ...]) -> Rejection | None:
    nodes = (operand, reader)
    if any(is_call(node, aten.dropout.default) and arguments(node)["train"] for node in path):
        reason = f"{operand}, after dropout, is also read by {reader}; what dropout leaves exists in the graph only"
        return Rejection(f"the attention weights escape: {reason}", nodes)
    unchanged = not any(is_call(node, *SUMS, *CUTS) for node in path)
    if unchanged and is_call(reader, aten.matmul.default, aten.bmm.default) and reader.args[0] is operand:
        reason = f"{operand} is also multiplied with other values by {reader}; one attention has values of one kind"
        return Rejection(f"the attention weights escape: {reason}", nodes)
    schema = getattr(reader.target, "_schema", None)
    if reader.op == "call_function" and (schema is None or schema.is_mutable):
        return Rejection(f"the attention weights escape: {reader} may change {operand} in place", nodes)
    return None


def _is_step(node: Node, user: Node) -> bool:
    """Whether ``user`` keeps the rows and keys of ``node`` in place: a cast, a view, or what concerns heads alone."""
    rank = len(shape(node))
    if is_call(user, *CASTS):
        return tensor(user).device == tensor(node).device and tensor(user).dtype.is_floating_point
    if is_call(user, *_SAME):
        return True
    if is_call(user, *RESHAPES):
        return keeps_rows(user) and same_size(math.prod(shape(node)[:-2]), math.prod(shape(user)[:-2]))
    if is_call(user, *CUTS):
        axis = int(arguments(user)["dim"]) % rank
        return axis != rank - 2 and (axis != rank - 1 or user.target is aten.slice.Tensor)
    return is_call(user, *SUMS) and bool(axes := summed_axes(user)) and max(axes) < rank - 2


def keeps_rows(node: Node) -> bool:
    """Whether a view leaves the last two axes (query rows, keys) as they are."""
    before, after = shape(node.args[0]), shape(node)
    return len(before) >= 2 and len(after) >= 2 and same_shape(before[-2:], after[-2:])


def summed_axes(node: Node) -> tuple[int, ...]:
    """The axes that a sum or mean runs over, counted from the left."""
    rank = len(shape(node.args[0]))
    axes = arguments(node)["dim"]
    return tuple(int(axis) % rank for axis in (range(rank) if axes is None or axes == [] else axes))


def _need(operand: Node, reader: Node, rows: Size) -> Rows | Statistic | None:
    rank = len(shape(operand))
    given = arguments(reader) if reader.op == "call_function" else {}
    if is_call(reader, *CUTS) and int(given["dim"]) % rank == rank - 2:
        return _rows(reader, given.get("index"), given.get("start"), given.get("end"), given.get("step", 1), rows)
    if is_call(reader, *SUMS) and tensor(reader).dtype.is_floating_point:
        axes = summed_axes(reader)
        return "column_sum" if rank - 2 in axes and rank - 1 not in axes else None
    if is_call(reader, aten.diagonal.default) and given["offset"] == 0:
        axes = (int(given["dim1"]) % rank, int(given["dim2"]) % rank)
        return "diagonal" if sorted(axes) == [rank - 2, rank - 1] else None
    return None


def _rows(reader: Node, index: object, start: object, end: object, step: object, rows: Size) -> Rows | None:
    if is_call(reader, aten.select.int):
        return Rows(index, _stop_after(index)) if isinstance(index, int) else None
    start, end = 0 if start is None else start, _END if end is None else end
    if not (isinstance(start, int) and isinstance(end, int) and isinstance(step, int)):
        return None
    # A start before the first row is moved there, which a shift of the row index does not know of.
    if start < 0 and not (isinstance(rows, int) and -start <= rows):
        return None
    return None if (start, end, step) == (0, _END, 1) else Rows(start, end, step)


def _replayable(softmax: Node, path: tuple[Node, ...]) -> bool:
    """Whether every view on the way can be taken of other rows: at most one size that none of before equals."""
    return all(lead_sizes(shape(node.args[0])[:-2], shape(node)[:-2]) is not None for node in path if is_view(node))


def is_view(node: Node) -> bool:
    """Whether ``node`` is a view or copy that may change the axes before the rows."""
    return is_call(node, *RESHAPES) and not is_call(node, *_SAME)


def lead_sizes(known: tuple[Size, ...], wanted: tuple[Size, ...]) -> list[int | tuple[int]] | None:
    """How to reshape the leading axes ``known`` to ``wanted``: a size, −1 once, or ``(axis,)`` for that axis of known.

    ``None`` when two sizes or more are symbolic and not among those known.
    """
    plan: list[int | tuple[int]] = []
    for size in wanted:
        axis = next((n for n, other in enumerate(known) if same_size(size, other)), None)
        plan.append(size if isinstance(size, int) else -1 if axis is None else (axis,))
    return plan if plan.count(-1) <= 1 else None
