"""The index space of an attention site, and how tensors of other ranks are read in it.

Legend: a score tensor ``[*lead, S, T]`` is seen as ``[B, H, S, T]``; ``lead`` may be empty, ``(B,)``, ``(B·H,)``,
``(B, H)``, ``(B, G, R)`` with ``H = G·R``, or longer (Swin's ``(B/W, W, H)``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fxopt.ir.attention import Capture
from fxopt.ir.nodes import Size, same_shape, same_size, shape, tensor
from fxopt.rewriter.builder import Builder, aten, product


@dataclass(frozen=True)
class Space:
    """The sizes ``B, H, S, T`` of a site, and how the leading axes of its contractions divide into ``B`` and ``H``."""

    lead: tuple[Size, ...]
    batch_axes: int
    rows: Size
    columns: Size

    @property
    def batch(self) -> Size:
        """``B``."""
        return _multiply(self.lead[: self.batch_axes])

    @property
    def heads(self) -> Size:
        """``H``."""
        return _multiply(self.lead[self.batch_axes :])


def space_of(scores: Node, keys: Node, stages: list[tuple[Size, ...]]) -> Space:
    """The space of the contraction ``scores`` whose second operand is ``keys``.

    ``stages`` are the shapes that the scores pass through before the softmax; they tell how a merged ``B·H`` divides.
    """
    lead = shape(scores)[:-2]
    rows, columns = shape(scores)[-2:]
    if len(lead) == 1:
        divided = [s[:-2] for s in stages if len(s) == 4 and same_size(s[0] * s[1], lead[0])]
        return Space(divided[0] if divided else (lead[0], 1), 1, rows, columns)
    if len(lead) == 3 and len(shape(keys)) == 5 and same_size(shape(keys)[2], 1):
        return Space(lead, 1, rows, columns)
    return Space(lead, max(len(lead) - 1, 0), rows, columns)


def split_lead(lead: tuple[Size, ...], space: Space) -> int | None:
    """How many of the leading axes make up ``B`` when the others make up ``H``; ``None`` if no division does."""
    for count in range(len(lead) + 1):
        if same_size(_multiply(lead[:count]), space.batch) and same_size(_multiply(lead[count:]), space.heads):
            return count
    return None


@dataclass(frozen=True)
class Operand:
    """A tensor broadcast onto the scores at a stage of shape ``stage``; becomes a captured tensor of rank 4."""

    node: Node
    stage: tuple[Size, ...]

    def obstacle(self, space: Space) -> str:
        """Why its leading axes can't be read in ``space``; empty when they can."""
        if self._letters(space) is not None:
            return ""
        return f"{self.node} of shape {shape(self.node)} does not divide into batch and heads of {tuple(self.stage)}"

    def capture(self, builder: Builder, space: Space) -> tuple[Node, Capture]:
        """Build the rank-4 view and describe it; only leading axes that are broadcast in part are copied."""
        letters = self._letters(space)
        assert letters is not None, "capture() after obstacle() found none"
        node = _unexpand(builder, self.node)
        known = _aligned(node, self.stage)
        sizes = [1] * (len(known) - len(shape(node))) + [builder.size(node, axis) for axis in range(len(shape(node)))]
        if letters == "mixed":
            node = builder.call(aten.expand.default, node, [*self.stage[:-2], sizes[-2], sizes[-1]])
            sizes, letters = [*self.stage[:-2], *sizes[-2:]], "bh"
        lead = self._lead(builder, sizes, letters, space)
        tail = ("-" if same_size(known[-2], 1) else "i") + ("-" if same_size(known[-1], 1) else "j")
        if len(shape(node)) != 4 or len(self.stage) != 4:
            node = builder.reshape(node, [*lead, sizes[-2], sizes[-1]])
        node = with_adjacent_keys(builder, node)
        return node, Capture(letters + tail, tensor(node).dtype)

    def _letters(self, space: Space) -> str | None:
        known = _aligned(self.node, self.stage)
        lead = [1 if _repeats(self.node, axis - len(known)) else size for axis, size in enumerate(known[:-2])]
        split = split_lead(self.stage[:-2], space)
        if split is None:
            merged = len(lead) == 1 and same_size(self.stage[0], space.batch * space.heads)
            return None if not merged else "--" if same_size(lead[0], 1) else "bh" if _inferred(space) else None
        batch = _group(lead[:split], self.stage[:split], "b")
        heads = _group(lead[split:], self.stage[split:-2], "h")
        if batch is not None and heads not in (None, "p"):
            return f"{batch}{heads}"
        return "mixed" if all(isinstance(size, int) for size in self.stage[:-2]) else None

    def _lead(self, builder: Builder, sizes: list[Any], letters: str, space: Space) -> list[Any]:
        split = split_lead(self.stage[:-2], space)
        if split is not None:
            return [product(builder, sizes[:split]), product(builder, sizes[split:-2])]
        return [1, 1] if letters == "--" else _inferred(space)


def with_adjacent_keys(builder: Builder, node: Node) -> Node:
    """``node`` copied once if its keys are provably far apart in memory: kernels read it block by block, many times."""
    stride = tensor(node).stride()[-1]
    if same_size(shape(node)[-1], 1) or not isinstance(stride, int) or stride <= 1:
        return node
    return builder.call(aten.clone.default, node, memory_format=torch.contiguous_format)


def _inferred(space: Space) -> list[int]:
    """``[B, H]`` for a reshape, −1 standing for the one that is symbolic; empty when both are."""
    sizes = [size if isinstance(size, int) else -1 for size in (space.batch, space.heads)]
    return [] if sizes == [-1, -1] else sizes


def _aligned(node: Node, stage: tuple[Size, ...]) -> list[Size]:
    known = list(shape(node))
    return [1] * (len(stage) - len(known)) + known


def _repeats(node: Node, axis: int) -> bool:
    """Whether ``axis`` (counted from the right) repeats one element, as an expanded axis does."""
    strides = tensor(node).stride()
    return -axis <= len(strides) and same_size(strides[axis], 0)


def _group(known: list[Size], stage: tuple[Size, ...], letter: str) -> str | None:
    """The letter of a group of axes: broadcast, full, periodic (``1 … 1`` then full), or ``None`` for any other
    mixture.
    """
    if all(same_size(size, 1) for size in known):
        return "-"
    first = next(i for i, size in enumerate(known) if not same_size(size, 1))
    if not same_shape(tuple(known[first:]), stage[first:]):
        return None
    return letter if all(same_size(size, 1) for size in stage[:first]) else "p"


def _unexpand(builder: Builder, node: Node) -> Node:
    """``node`` with every axis that repeats one element (stride 0) cut to size 1."""
    value = tensor(node)
    for axis, (size, stride) in enumerate(zip(value.shape, value.stride(), strict=True)):
        if same_size(stride, 0) and not same_size(size, 1):
            node = builder.call(aten.slice.Tensor, node, axis, 0, 1)
    return node


def _multiply(sizes: tuple[Size, ...]) -> Size:
    result: Size = 1
    for size in sizes:
        result = result * size
    return result
