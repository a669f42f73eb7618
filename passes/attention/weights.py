"""From the softmax to the contraction with the values: what happens to the attention weights on the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch.fx import Node

from fxopt.ir.nodes import arguments, is_call, shape
from fxopt.passes.attention.readers import Readers, keeps_rows, read_readers
from fxopt.passes.attention.region import CASTS, RESHAPES
from fxopt.passes.attention.zeroed import hides_nan, zeroed
from fxopt.rewriter.rule import Rejection

aten = torch.ops.aten

SOFTMAX: Final = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
#: Operators that a softmax may be searched through in order to explain why a site is kept.
_SEEN_THROUGH: Final = (
    *CASTS, *RESHAPES, aten.dropout.default, aten.transpose.int, aten.permute.default, aten.mul.Tensor, aten.div.Tensor,
    aten.add.Tensor, aten.pow.Tensor_Scalar, aten.relu.default, aten.slice.Tensor, aten.select_scatter.default,
    aten.masked_fill.Scalar, aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther, aten.sub.Tensor,
    aten.detach.default, aten.nan_to_num.default,
)  # fmt: skip


@dataclass(frozen=True)
class Weights:
    """The way from a softmax to the contraction with the values: dropout on it, the nodes it covers, who else reads
    the weights, and which of the nodes set some to 0.
    """

    softmax: Node
    dropout: float
    nodes: tuple[Node, ...]
    readers: Readers
    fills: tuple[Node, ...] = ()


def read_weights(weights: Node, root: Node) -> Weights | Rejection | None:
    """Follow ``weights``, an operand of the contraction ``root``, back to a softmax over the last axis.

    ``None`` when no softmax is there at all; a `Rejection` when there is one but something else lies in between, or its
    axis is not the key axis, or the weights are read elsewhere in a way that can't be served.
    """
    nodes: list[Node] = []
    fills: list[Node] = []
    dropout = 0.0
    node = weights
    while not is_call(node, *SOFTMAX):
        if is_call(node, aten.dropout.default) and dropout == 0.0:
            dropout = _active_dropout(node)
        elif (found := zeroed(node)) and not hides_nan(node):
            fills.append(node)
        elif not is_call(node, *CASTS) and not _keeps_rows(node):
            return _explain(node)
        nodes.append(node)
        operand = found[0] if node in fills and found else node.args[0]
        assert isinstance(operand, Node)
        node = operand
    axis, rank = arguments(node)["dim"], len(shape(node))
    if axis not in (-1, rank - 1):
        return Rejection(
            f"the softmax runs over axis {axis} of {rank}; attention normalises over keys, the last axis", (node,)
        )
    chain = (*nodes, node)
    readers = read_readers(node, chain, root, shape(node)[-2])
    if isinstance(readers, Rejection):
        return readers
    if not fills:
        return Weights(node, dropout, chain, readers)
    inside = chain[chain.index(fills[0]) + 1 :]
    early = next((user for n in inside for user in n.users if user not in chain), None)
    if early is not None:
        return Rejection(f"the weights are read by {early} before {fills[0]} sets some of them to 0", (fills[0], early))
    return Weights(node, dropout, chain, Readers((), bool(readers)), tuple(fills))


def _active_dropout(node: Node) -> float:
    given = arguments(node)
    return float(given["p"]) if given["train"] else 0.0


def _keeps_rows(node: Node) -> bool:
    """A view that leaves the last two axes (query rows, keys) as they are."""
    return is_call(node, *RESHAPES) and keeps_rows(node)


def _explain(node: Node) -> Rejection | None:
    """Whether a softmax lies further up, in which case ``node`` is what keeps the site from matching."""
    first, seen = node, set()
    pending = [node]
    while pending:
        current = pending.pop()
        if is_call(current, *SOFTMAX):
            name = getattr(first.target, "_schema", first).name
            if why := hides_nan(first):
                return Rejection(why, (first, current))
            return Rejection(f"{name} stands between the softmax and the values", (first, current))
        if current in seen or not is_call(current, *_SEEN_THROUGH):
            continue
        seen.add(current)
        pending.extend(current.all_input_nodes)
    return None
