"""What the other readers of an attention's weights get in their place: weights of some rows, sums, or all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from fxopt.analysis.rows import of_rows as moved
from fxopt.analysis.simplify import simplify
from fxopt.ir.attention import AttentionSpec, Capture
from fxopt.ir.expression import Expr, call, capture, const
from fxopt.ir.nodes import Size, arguments, is_call, same_shape, shape, tensor
from fxopt.ir.operators import overload
from fxopt.passes.attention.readers import (
    CUTS,
    SUMS,
    Reader,
    Readers,
    Rows,
    Statistic,
    is_view,
    lead_sizes,
    summed_axes,
)
from fxopt.passes.attention.region import CASTS
from fxopt.rewriter.builder import Builder

aten = torch.ops.aten


@dataclass(frozen=True)
class Operands:
    """What the weights of a site are computed from."""

    queries: Node
    keys: Node
    captures: tuple[Node, ...]
    spec: AttentionSpec


def answer(builder: Builder, readers: Readers, softmax: Node, operands: Operands) -> None:
    """Build what ``readers`` need just before ``softmax`` and have it replace them."""
    if readers.whole:
        read = _as_read(softmax)
        with builder.before(softmax):
            weights = _weights(builder, operands, tensor(read).dtype)
            builder.also(read, with_lead(builder, weights, shape(softmax)[:-2]), "weights")
        return
    made: dict[tuple[Rows | Statistic, Node], Node] = {}
    for reader in readers.readers:
        if (reader.need, softmax) not in made:
            with builder.before(softmax):
                least = _least(builder, reader, softmax, operands)
                made[reader.need, softmax] = with_lead(builder, least, shape(softmax)[:-2])
        small = made[reader.need, softmax]
        for node in reader.path:
            if (reader.need, node) not in made:
                with builder.before(node):
                    made[reader.need, node] = _replayed(builder, node, small, reader)
            small = made[reader.need, node]
        with builder.before(reader.node):
            builder.also(reader.node, _finished(builder, reader, small, operands), _title(reader))


def _as_read(softmax: Node) -> Node:
    """``softmax``, or the cast to fewer bits that alone reads it: weights are then rounded as they are written."""
    users = tuple(softmax.users)
    if len(users) != 1 or not is_call(users[0], *CASTS) or tensor(users[0]).device != tensor(softmax).device:
        return softmax
    narrow, wide = tensor(users[0]).dtype, tensor(softmax).dtype
    return users[0] if narrow.is_floating_point and torch.promote_types(narrow, wide) == wide else softmax


def _title(reader: Reader) -> str:
    if isinstance(reader.need, Rows):
        return str(reader.need)
    return {"column_sum": "column sums", "diagonal": "diagonal of the weights"}[reader.need]


def _least(builder: Builder, reader: Reader, softmax: Node, operands: Operands) -> Node:
    """The weights of the rows that are read, or the statistic with an axis of size 1 in place of the one it lacks."""
    if isinstance(reader.need, Rows):
        return _row_weights(builder, reader.need, operands, tensor(softmax).dtype)
    dtype = torch.promote_types(tensor(softmax).dtype, torch.float32)
    spec = replace(operands.spec, dropout=0.0, out_dtype=dtype, out_layout="bhsd")
    sources = (operands.queries, operands.keys, list(operands.captures))
    found = builder.call(overload("attention_statistics"), *sources, str(spec), reader.need)
    return builder.call(aten.unsqueeze.default, found, 2 if reader.need == "column_sum" else 3)


def _row_weights(builder: Builder, rows: Rows, operands: Operands, dtype: torch.dtype) -> Node:
    # A capture that is indexed by something else than the row itself can't be cut down to some rows.
    if all(how.dims[2] in "i-" and how.dims[3] in "j-" for how in operands.spec.captures):
        return _weights(builder, of_rows(builder, operands, rows), dtype)
    whole = _weights(builder, operands, dtype)
    return builder.call(aten.slice.Tensor, whole, 2, rows.start, rows.stop, rows.step)


def _weights(builder: Builder, operands: Operands, dtype: torch.dtype) -> Node:
    spec = replace(operands.spec, dropout=0.0, out_dtype=dtype, out_layout="bhsd")
    sources = (operands.queries, operands.keys, list(operands.captures))
    return builder.call(overload("attention_weights"), *sources, str(spec))


def of_rows(builder: Builder, operands: Operands, rows: Rows) -> Operands:
    """``operands`` with these queries only; expressions still count rows, and their number, as before."""

    def taken(node: Node) -> Node:
        return builder.call(aten.slice.Tensor, node, 2, rows.start, rows.stop, rows.step)

    spec, captures = operands.spec, list(operands.captures)
    kept = [taken(node) if how.dims[2] == "i" else node for node, how in zip(captures, spec.captures, strict=True)]
    numbers = _Numbers(builder, operands.queries, list(spec.captures), kept)
    score, mask = moved(spec, rows.step, lambda: numbers.first(rows.start), numbers.count)
    spec = replace(spec, score=score, mask=mask, captures=tuple(numbers.descriptions))
    return Operands(taken(operands.queries), operands.keys, tuple(numbers.nodes), spec)


@dataclass
class _Numbers:
    """Numbers about the rows as expressions: constants where they are static, else captured tensors of one element."""

    builder: Builder
    queries: Node
    descriptions: list[Capture]
    nodes: list[Node]

    def count(self) -> Expr:
        """How many rows there are."""
        size = self.builder.size(self.queries, 2)
        return const(size) if isinstance(size, int) else self._captured(size)

    def first(self, start: int) -> Expr:
        """The number of row ``start``, which counts from the end where it is negative."""
        return const(start) if start >= 0 else simplify(call("add", self.count(), const(start)))

    def _captured(self, size: Node) -> Expr:
        device = tensor(self.queries).device
        node = self.builder.call(aten.full.default, [1, 1, 1, 1], size, dtype=torch.int64, device=device)
        self.nodes.append(node)
        self.descriptions.append(Capture("----", torch.int64))
        return capture(len(self.nodes) - 1)


def with_lead(builder: Builder, small: Node, lead: Sequence[Size]) -> Node:
    """``small [*, r, T]`` with the leading axes ``lead``."""
    known = shape(small)[:-2]
    if same_shape(known, tuple(lead)):
        return small
    plan = lead_sizes(known, tuple(lead))
    assert plan is not None, "readers are checked for this"
    sizes = [builder.size(small, item[0]) if isinstance(item, tuple) else item for item in plan]
    return builder.reshape(small, [*sizes, builder.size(small, -2), builder.size(small, -1)])


def _replayed(builder: Builder, node: Node, small: Node, reader: Reader) -> Node:
    """What ``node`` makes of the weights, made of ``small``. Statistics stay wide until the end."""
    if is_call(node, aten.dropout.default, aten.clone.default, aten.contiguous.default):
        return small
    if is_call(node, *CASTS):
        return builder.cast(small, tensor(node).dtype) if isinstance(reader.need, Rows) else small
    if is_view(node):
        return with_lead(builder, small, shape(node)[:-2])
    assert callable(node.target)
    return builder.call(node.target, small, *node.args[1:], **node.kwargs)


def _finished(builder: Builder, reader: Reader, small: Node, operands: Operands) -> Node:
    """``small`` in the shape and dtype of the reader, by an operation that stands where the reader stood."""
    node, rank = reader.node, len(shape(small))
    if is_call(node, *CUTS):
        if is_call(node, aten.select.int):
            return builder.call(aten.select.int, small, rank - 2, 0)
        return builder.call(aten.slice.Tensor, small, rank - 2)
    if is_call(node, *SUMS):
        return _finished_sum(builder, node, small, operands)
    diagonal = builder.call(aten.squeeze.dim, small, rank - 1)
    return builder.cast(diagonal, tensor(node).dtype)


def _finished_sum(builder: Builder, node: Node, small: Node, operands: Operands) -> Node:
    """Column sums ``[*, 1, T]`` divided and summed over other axes as ``node`` does it."""
    axes = summed_axes(node)
    others = [axis for axis in axes if axis != len(shape(small)) - 2]
    if node.target is aten.mean.dim:
        small = builder.call(aten.div.Tensor, small, builder.size(operands.queries, 2))
    if others:
        small = builder.call(node.target, small, others, True)  # type: ignore[arg-type]
    if not arguments(node)["keepdim"]:
        small = builder.call(aten.squeeze.dims, small, list(axes))
    else:
        small = builder.call(aten.alias.default, small)
    return builder.cast(small, tensor(node).dtype)
