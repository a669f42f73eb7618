"""The log-sum-exp of a site's logits, read beside their softmax: for a loss that keeps logits small, or to merge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch.fx import Node

from fxopt.ir.nodes import Size, arguments, is_call, is_impure, shape, tensor
from fxopt.passes.attention.answers import with_lead
from fxopt.passes.attention.region import CASTS
from fxopt.passes.attention.weights import Weights
from fxopt.rewriter.builder import Builder
from fxopt.rewriter.rule import Rejection

aten = torch.ops.aten

_TARGETS: Final = (aten.logsumexp.default, aten.special_logsumexp.default)


@dataclass(frozen=True)
class LseReaders:
    """The nodes that take the log-sum-exp of a site's logits.

    ``late`` is computed from them before the site's result, in order. As their values come with the result now, it has
    to be computed after that.
    """

    readers: tuple[Node, ...] = ()
    late: tuple[Node, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.readers)

    @property
    def nodes(self) -> frozenset[Node]:
        """The readers and their operands."""
        return frozenset({*self.readers, *(reader.all_input_nodes[0] for reader in self.readers)})


def read_lse(logits: Node, weights: Weights, root: Node) -> LseReaders | Rejection:
    """Who takes the log-sum-exp over the keys of ``logits``, or of what these are a cast of; ``root`` is the result.

    A `Rejection` where what is computed from it can't wait for ``root``, or all ``weights`` are needed besides.
    """
    sources = [logits]
    while is_call(sources[-1], *CASTS):
        sources.append(sources[-1].all_input_nodes[0])
    readers = tuple(reader for source in sources for user in source.users for reader in _readers(user))
    if readers and weights.readers.whole:
        return Rejection(f"both {readers[0]} and all weights are read: the scores are computed anyway", readers)
    below = _below(readers, root)
    if any(operand in below for operand in root.all_input_nodes):
        return Rejection(f"{root} is computed from the log-sum-exp of its own scores", (root, *readers))
    late = tuple(node for node in below if node not in readers)
    fixed = next(filter(is_impure, late), None)
    if fixed is not None:
        reason = f"{fixed} reads the log-sum-exp of the scores, and has to stand before the attention's result"
        return Rejection(reason, (fixed,))
    return LseReaders(readers, late)


def _readers(user: Node) -> Iterator[Node]:
    """``user`` if it is a log-sum-exp over the last axis, or those that are all that reads the cast that it is."""
    if _is_over_keys(user):
        yield user
    elif is_call(user, *CASTS) and tensor(user).dtype.is_floating_point and all(map(_is_over_keys, user.users)):
        yield from user.users


def _is_over_keys(node: Node) -> bool:
    if not is_call(node, *_TARGETS):
        return False
    rank = len(shape(node.args[0]))
    return [int(axis) % rank for axis in arguments(node)["dim"]] == [rank - 1]


def _below(readers: Sequence[Node], root: Node) -> dict[Node, None]:
    """``readers`` and what is computed from them before ``root``, in order."""
    found: dict[Node, None] = {}
    for node in root.graph.nodes if readers else ():
        if node is root:
            break
        if node in readers or any(operand in found for operand in node.all_input_nodes):
            found[node] = None
    return found


def answer_lse(builder: Builder, lse: Node, found: LseReaders, lead: Sequence[Size]) -> None:
    """Have ``lse [B, H, S]`` replace what the readers give, of logits whose leading axes are ``lead``."""
    last = builder.at
    for node in found.late:
        last.append(node)
        last = node
    column = with_lead(builder, builder.call(aten.unsqueeze.default, lse, 3), lead)
    for reader in found.readers:
        given = column if arguments(reader)["keepdim"] else builder.call(aten.squeeze.dim, column, -1)
        builder.also(reader, builder.cast(given, tensor(reader).dtype), "log-sum-exp")
