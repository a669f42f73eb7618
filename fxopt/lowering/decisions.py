"""What decisions share, whatever they are about: a lowering that was forced, and times kept in the cache."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch.fx import Node

from fxopt import cache
from fxopt.errors import FxoptWarning, LoweringError
from fxopt.ir.decision import Decision
from fxopt.ir.nodes import source
from fxopt.lowering.candidate import Candidate
from fxopt.lowering.measure import hint


def forced(
    site: Node, found: Sequence[Candidate], refused: Mapping[str, str], lower: str, strict: bool
) -> tuple[Candidate, Decision]:
    """The candidate of the family ``lower``; where there is none the last one, with a warning (an error if strict)."""
    for candidate in found:
        if candidate.family == lower:
            return candidate, Decision((site.name,), candidate.name, f"forced by lower={lower!r}")
    why = "; ".join(f"{name}: {reason}" for name, reason in refused.items() if name.startswith(lower))
    reason = f"lower={lower!r} can't serve this site: {why}"
    if strict:
        raise LoweringError(f"{reason} ({source(site)}); use lower='auto'")
    warnings.warn(f"{reason}; it runs as {found[-1].name} ({source(site)})", FxoptWarning, stacklevel=4)
    return found[-1], Decision((site.name,), found[-1].name, reason)


def has_hint(size: int | torch.SymInt) -> bool:
    """Whether a size is known, or was seen where it is symbolic."""
    return isinstance(size, int) or bool(size.node.has_hint())


def bucket(size: int | torch.SymInt) -> str:
    """A static size as it is, a dynamic one rounded up to a power of two."""
    return str(size) if isinstance(size, int) else f"<={1 << max(hint(size) - 1, 0).bit_length()}"


def read_seconds(key: str, found: Sequence[Candidate]) -> dict[str, float] | None:
    """The seconds of each candidate that the cache holds under ``key``, if they are those of ``found``."""
    entry = cache.read_json("decisions", key)
    seconds = entry.get("seconds") if isinstance(entry, Mapping) else None
    names = {candidate.name for candidate in found}
    if not isinstance(seconds, Mapping) or not seconds or not set(seconds) <= names:
        return None
    return {str(name): float(value) for name, value in seconds.items()}
