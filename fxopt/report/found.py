"""A site as it stands in the final graph, before what became of it is known."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node


@dataclass(frozen=True)
class Found:
    """A place of one kind: the ``anchor`` (softmax, norm, activation) and the ``region`` of nodes that belong to it.

    ``hint`` says why the place is kept when no rule came near it.
    """

    kind: str
    anchor: Node
    region: tuple[Node, ...]
    hint: str
