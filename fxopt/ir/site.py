"""Sites: the places in a model that a user asks about, and what became of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["rewritten", "kept"]
Tier = Literal["exact", "approximate", "trainable"]


@dataclass(frozen=True, slots=True)
class Source:
    """Where a node comes from: the user's line (``file:line``, the text of the line) and the module that owns it."""

    location: str = ""
    code: str = ""
    module: str = ""

    def __str__(self) -> str:
        where = self.location or "unknown line"
        return f"{where} in {self.module}" if self.module else where


@dataclass(frozen=True, slots=True)
class Site:
    """One attention, norm, MLP … of the model.

    Attributes:
        kind: ``"attention"``, ``"norm"``, ``"mlp"``, ``"linear"``, ``"token"``, ``"kv"`` …
        status: ``"rewritten"`` or ``"kept"``.
        rule: the rule that rewrote it, or that came nearest; empty when none applies.
        reason: for a kept site why, and what would make it match; for a rewritten one what it became.
        source: the user's line and owning module.
        nodes: names of the graph nodes it covered (for a kept site the first one that failed comes first).
    """

    kind: str
    status: Status
    rule: str
    reason: str
    source: Source
    nodes: tuple[str, ...] = ()
