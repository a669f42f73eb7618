"""Queries, keys and values of a site as rank-4 tensors, without materialising repeated heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.fx import Node

from fxopt.ir.attention import KvMap
from fxopt.ir.nodes import Size, arguments, is_call, is_tensor, same_shape, same_size, scalar, shape, tensor
from fxopt.passes.attention.axes import axis_list
from fxopt.passes.attention.space import Space
from fxopt.rewriter.builder import Builder, product
from fxopt.rewriter.rule import Rejection

aten = torch.ops.aten

_REPEAT: Final = torch.ops.fxopt.repeat_heads.default
_VIEWS: Final = (
    aten.view.default, aten.reshape.default, aten.transpose.int, aten.permute.default, aten.unsqueeze.default,
    aten.expand.default, aten.contiguous.default, aten.slice.Tensor, aten.select.int, _REPEAT,
)  # fmt: skip


@dataclass(frozen=True)
class Heads:
    """How the operands of the two contractions become ``q [B,H,S,D]``, ``k [B,G,T,D]``, ``v [B,G,T,E]``."""

    query_node: Node
    key_node: Node
    value_node: Node
    space: Space
    grouped: bool
    kv_map: KvMap

    def queries(self, builder: Builder) -> Node:
        """Queries ``[B,H,S,D]``."""
        return _to_rank_4(builder, self.query_node, self.space, grouped=False)

    def keys(self, builder: Builder, queries: Node) -> Node:
        """Keys ``[B,G,T,D]``: the transpose of the second operand of the first contraction."""
        untransposed = _untransposed(builder, self.key_node)
        repeat = _repetition(untransposed)
        if repeat is not None and self.grouped:
            untransposed = repeat
        return _to_rank_4(builder, untransposed, self.space, self.grouped, queries)

    def values(self, builder: Builder, queries: Node) -> Node:
        """Values ``[B,G,T,E]``."""
        repeat = _repetition(self.value_node)
        node = repeat if repeat is not None and self.grouped else self.value_node
        return _to_rank_4(builder, node, self.space, self.grouped, queries)

    def restore(self, builder: Builder, result: Node, output: Node) -> Node:
        """The result ``[B,H,S,E]`` in the shape of the contraction that it replaces."""
        if same_shape(shape(result), shape(output)):
            return result
        lead = _sizes_of(builder, self.query_node, len(shape(output)) - 2)
        rows, columns = builder.size(result, 2), builder.size(result, 3)
        return builder.reshape(result, [*lead, rows, columns])


def read_heads(queries: Node, keys: Node, values: Node, space: Space) -> Heads | Rejection:
    """Find out how heads are shared; repeated heads are looked through when keys and values repeat alike."""
    lead = shape(queries)[:-2]
    if not same_shape(lead, space.lead) and len(lead) != 1:
        return Rejection("queries are broadcast over the batch or the heads of keys", (queries,))
    if len(shape(values)) != len(shape(queries)) or len(shape(keys)) != len(shape(queries)):
        return Rejection("queries, keys and values differ in rank", (values,))
    source = _key_source(keys)
    shared = repeated_heads(source, values) if source is not None else None
    if shared is not None:
        return Heads(queries, keys, values, space, True, shared[2])
    broadcast = len(lead) >= 2 and same_size(shape(keys)[len(lead) - 1], 1) and not same_size(lead[-1], 1)
    if broadcast and not same_size(shape(values)[len(lead) - 1], 1):
        return Rejection("keys are shared between heads, but values are not", (values,))
    return Heads(queries, keys, values, space, broadcast, "group")


def repeated_heads(keys: Node, values: Node) -> tuple[Node, Node, KvMap] | None:
    """Keys and values before their heads were repeated, when both are repeated alike."""
    key_order, value_order = _order(keys), _order(values)
    if key_order is None or key_order != value_order:
        return None
    return keys.args[0], values.args[0], key_order[1]  # type: ignore[return-value]


def unscaled(builder: Builder, node: Node) -> tuple[Node, float]:
    """``node`` without the constant factors it was multiplied by, and their product; views on the way are rebuilt."""
    factor = _factor(node)
    if factor is not None:
        operand = node.args[0]
        assert isinstance(operand, Node)
        inner, rest = unscaled(builder, operand)
        return inner, rest * factor
    if not is_call(node, *_VIEWS):
        return node, 1.0
    operand = node.args[0]
    assert isinstance(operand, Node)
    inner, rest = unscaled(builder, operand)
    if rest == 1.0:
        return node, 1.0
    assert callable(node.target)
    return builder.call(node.target, inner, *node.args[1:], **node.kwargs), rest


def _factor(node: Node) -> float | None:
    """The constant by which ``node`` multiplies its first operand."""
    if not is_call(node, aten.mul.Tensor, aten.div.Tensor) or not is_tensor(node.args[0]):
        return None
    number = None if is_tensor(node.args[1]) else scalar(node.args[1])
    if number is None or number == 0 or tensor(node.args[0]).dtype != tensor(node).dtype:
        return None
    return float(number) if node.target is aten.mul.Tensor else 1.0 / float(number)


def _untransposed(builder: Builder, keys: Node) -> Node:
    source = _key_source(keys)
    return source if source is not None else builder.transpose(keys)


def _key_source(keys: Node) -> Node | None:
    """The tensor ``[*lead, T, D]`` that ``keys [*lead, D, T]`` is the transpose of, when the graph has it."""
    rank = len(shape(keys))
    swapped = {rank - 2, rank - 1}
    if is_call(keys, aten.transpose.int) and set(axis_list(keys.args[1:3], rank)) == swapped:
        return keys.args[0]  # type: ignore[return-value]
    last = [*range(rank - 2), rank - 1, rank - 2]
    if is_call(keys, aten.permute.default) and axis_list(keys.args[1], rank) == last:
        return keys.args[0]  # type: ignore[return-value]
    if is_call(keys, aten.mT.default, aten.t.default):
        return keys.args[0]  # type: ignore[return-value]
    return None


def _repetition(node: Node) -> Node | None:
    """The tensor whose heads ``node`` repeats."""
    return node.args[0] if is_call(node, _REPEAT) else None  # type: ignore[return-value]


def _order(node: Node | None) -> tuple[Any, KvMap] | None:
    if not is_call(node, _REPEAT):
        return None
    given = arguments(node)  # type: ignore[arg-type]
    return given["count"], given["order"]


def _sizes_of(builder: Builder, node: Node, count: int) -> list[Any]:
    return [builder.size(node, axis) for axis in range(count)]


def _to_rank_4(builder: Builder, node: Node, space: Space, grouped: bool, queries: Node | None = None) -> Node:
    """``node [*lead, N, D]`` as ``[B, H or G, N, D]``; batch axes of size 1 are broadcast without a copy."""
    sizes = [builder.size(node, axis) for axis in range(len(shape(node)))]
    lead, tail = sizes[:-2], sizes[-2:]
    if len(lead) == 1 and len(space.lead) == 2 and len(shape(node)) == 3:
        batch, heads = (size if isinstance(size, int) else -1 for size in (space.batch, space.heads))
        return builder.reshape(node, [batch, heads, *tail])
    if len(lead) != 2:
        split = space.batch_axes
        node = builder.reshape(node, [product(builder, lead[:split]), product(builder, lead[split:]), *tail])
    return _broadcast(builder, node, space, grouped, queries)


def _broadcast(builder: Builder, node: Node, space: Space, grouped: bool, queries: Node | None) -> Node:
    """``node [B or 1, H or 1, N, D]`` with the batch, and unless ``grouped`` the heads, of ``queries [B,H,S,D]``."""
    known: tuple[Size, ...] = shape(node)
    same_batch = same_size(known[0], space.batch)
    same_heads = grouped or same_size(known[1], space.heads)
    if queries is None or (same_batch and same_heads):
        return node
    batch = -1 if same_batch else builder.size(queries, 0)
    heads = -1 if same_heads else builder.size(queries, 1)
    return builder.call(aten.expand.default, node, [batch, heads, -1, -1])
