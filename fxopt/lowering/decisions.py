"""What decisions share, whatever they are about: a lowering that was forced, times kept, and what is said of others."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch.fx import Node

from fxopt import cache
from fxopt.codegen.attention.machine import Shortfall
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
            named = {name: reason for name, reason in refused.items() if name.startswith(lower)}
            return candidate, Decision((site.name,), candidate.name, f"forced by lower={lower!r}{shortfalls(named)}")
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


@dataclass(frozen=True)
class Times:
    """Seconds of the candidates of a site by their names, the errors of those that failed, and where that is from."""

    seconds: Mapping[str, float]
    failed: Mapping[str, str] = field(default_factory=dict)
    source: str = "measured"


#: By their keys, times that are not kept on disk.
_OF_THIS_PROCESS: Final[dict[str, Times]] = {}


def recalled(key: str, found: Sequence[Candidate]) -> Times | None:
    """The times of the candidates ``found`` that the cache or this process has under ``key``."""
    seconds = read_seconds(key, found)
    return _OF_THIS_PROCESS.get(key) if seconds is None else Times(seconds, source="measured, from the cache")


def keep(key: str, times: Times) -> None:
    """Keep times under ``key``: on disk, or where a candidate failed, which may be for want of memory that another
    process has, as long as this process runs.
    """
    if times.failed:
        _OF_THIS_PROCESS[key] = times
    else:
        cache.write_json("decisions", key, {"seconds": dict(times.seconds)})


def read_seconds(key: str, found: Sequence[Candidate]) -> dict[str, float] | None:
    """The seconds of each candidate that the cache holds under ``key``, if they are those of ``found``."""
    entry = cache.read_json("decisions", key)
    seconds = entry.get("seconds") if isinstance(entry, Mapping) else None
    names = {candidate.name for candidate in found}
    if not isinstance(seconds, Mapping) or not seconds or not set(seconds) <= names:
        return None
    return {str(name): float(value) for name, value in seconds.items()}


#: Characters of an error that a decision shows.
_ERROR: Final = 120


def error_line(error: Exception) -> str:
    """The kind of an error and the first line of what it says, shortened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = ": ".join([type(error).__name__, *lines[:1]])
    return text if len(text) <= _ERROR else f"{text[: _ERROR - 1]}…"


def shortfalls(refused: Mapping[str, str]) -> str:
    """What a decision adds of kernels that were ``refused`` for what the machine lacks; those alike are named together.

    What is refused because it doesn't fit the problem isn't said: it would be no candidate on any machine.
    """
    names: dict[str, list[str]] = {}
    for name, reason in refused.items():
        if isinstance(reason, Shortfall):
            names.setdefault(reason, []).append(name.removeprefix("triton-"))
    return "".join(f"; {', '.join(alike)}: {reason}" for reason, alike in names.items())


def failures(failed: Mapping[str, str]) -> str:
    """What a decision adds of candidates that failed when they were measured, given their errors."""
    return "".join(f"; {name} failed when it was measured: {error}" for name, error in failed.items())
