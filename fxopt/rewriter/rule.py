"""Rules: pattern, check, rewrite. A rule is a value; it holds no state between its three steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from fxopt.rewriter.builder import Builder
from fxopt.rewriter.pattern import Match, Pattern


@dataclass(frozen=True)
class Rejection:
    """Why a match may not be rewritten, and the nodes to blame (the first one that failed comes first)."""

    reason: str
    nodes: tuple[Node, ...] = ()


#: What `check` found out, handed to `rewrite` as it is.
Bindings = Any


def accept(match: Match) -> Match:
    """The check of a rule that has no side condition."""
    return match


def says_nothing(bindings: Bindings) -> str:
    """The description of a rewrite that its operator tells all of."""
    return ""


@dataclass(frozen=True)
class Rule:
    """One rewrite.

    Attributes:
        name: kebab-case, unique within its pass; reports print it.
        patterns: every accepted spelling, named. The last operation of each is the node that is replaced.
        check: side conditions on a match: what `rewrite` needs, or a `Rejection` with the reason and nodes, or ``None``
            when the match turns out to be something else altogether and there is nothing to report.
        rewrite: builds the replacement with the `Builder` and returns its last node, which must have the shape, dtype
            and device of the node it replaces; the engine verifies that.
        describe: what the report says of a rewritten site beyond the operator it became; empty for nothing.
        kind: the kind of site this rule decides (``"attention"``, ``"norm"`` …); empty for mere canonicalisation.
    """

    name: str
    patterns: Mapping[str, Pattern]
    rewrite: Callable[[Builder, Bindings], Node]
    check: Callable[[Match], Bindings | Rejection | None] = accept
    kind: str = ""
    describe: Callable[[Bindings], str] = says_nothing
