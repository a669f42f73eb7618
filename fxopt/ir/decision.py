"""Decisions: what each rewritten site runs as, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Decision:
    """What was chosen to run one site; made by the lowering layer, shown by reports.

    Attributes:
        nodes: names of the graph nodes of the site.
        chosen: name of the candidate that runs it (``"triton"``, ``"sdpa"``, ``"aten"`` …).
        reason: why: measured, forced by an option, taken from the cache, the only one that can serve the site …
        seconds: measured seconds of one call of each candidate; empty where nothing was measured.
    """

    nodes: tuple[str, ...]
    chosen: str
    reason: str
    seconds: Mapping[str, float] = field(default_factory=dict)
