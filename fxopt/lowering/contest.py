"""A generated kernel against the base compiler's own of the same piece: measured once, kept on disk; a tie is lost.

Compiling the base compiler's own takes a second or more. So what was measured serves every site of its kind, and a
process that has spent enough on measurements begins no more.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch

from fxopt import cache
from fxopt.ir.decision import Decision
from fxopt.lowering.candidate import Candidate
from fxopt.lowering.decisions import error_line, failures, read_seconds
from fxopt.lowering.measure import MEASUREMENT_SECONDS, median_seconds
from fxopt.lowering.probe import PLAIN

#: A kernel is chosen if it takes at most this share of the time of Inductor's: less is a tie, or noise.
TIE: Final = 0.97
#: Seconds below which a kernel of Inductor's takes less time than launching ours takes the host.
SMALLEST: Final = 20e-6


@dataclass(frozen=True)
class Terms:
    """How a contest is held.

    Attributes:
        title: what is measured, in the plural.
        spent: the seconds that this process spent on them, under ``"seconds"``.
        budget: the seconds after which it begins no more.
        tie: the share of the base compiler's time that a kernel may take.
        smallest: the seconds of the base compiler below which there is nothing to win.
    """

    title: str
    spent: dict[str, float]
    budget: float = 2.0
    tie: float = TIE
    smallest: float = SMALLEST


def decide(
    name: str,
    key: str,
    found: Sequence[Candidate],
    measure: Callable[[dict[str, str]], dict[str, float]],
    terms: Terms,
) -> tuple[Candidate, Decision]:
    """The candidate to run the site ``name``, by the cache's seconds under ``key`` or by those that ``measure`` gives.

    ``measure`` puts what failed into the dictionary that it is given; that is said, and nothing is kept then. The last
    of the candidates is the base compiler's.
    """
    seconds, failed = read_seconds(key, found), dict[str, str]()
    how = "measured, from the cache"
    if seconds is None:
        if terms.spent["seconds"] > terms.budget:
            spent = f"{terms.budget:g} s were spent on {terms.title} already"
            return found[-1], Decision((name,), PLAIN, f"not measured: {spent}; the next process goes on")
        seconds, how = _timed(measure, failed, terms), "measured"
    if not failed:
        cache.write_json("decisions", key, {"seconds": seconds})
    chosen, remark = best(seconds, terms)
    by_name = {candidate.name: candidate for candidate in found}
    return by_name[chosen], Decision((name,), chosen, how + remark + failures(failed), seconds)


def _timed(
    measure: Callable[[dict[str, str]], dict[str, float]], failed: dict[str, str], terms: Terms
) -> dict[str, float]:
    start = time.perf_counter()
    seconds = measure(failed)
    took = time.perf_counter() - start
    MEASUREMENT_SECONDS["total"] += took
    terms.spent["seconds"] += took
    return seconds


def best(seconds: Mapping[str, float], terms: Terms) -> tuple[str, str]:
    """The candidate to run, and what the report adds where that is not the fastest."""
    plain = seconds.get(PLAIN)
    if plain is None:
        return PLAIN, "; the base compiler's kernel could not be measured"
    fastest = min(seconds, key=lambda name: seconds[name])
    if fastest == PLAIN:
        return PLAIN, ""
    if plain < terms.smallest:
        return PLAIN, "; so short that launching decides"
    return (fastest, "") if seconds[fastest] <= terms.tie * plain else (PLAIN, "; a tie")


def measured(
    names: Sequence[str],
    launches: Callable[[str], tuple[Callable[[], Any], ...]],
    calls: Callable[[str], tuple[Callable[[], Any], ...]],
    device: torch.device,
    failed: dict[str, str],
) -> dict[str, float]:
    """Median seconds of the base compiler's way and of the fastest of the kernels ``names``.

    Args:
        names: the generated candidates.
        launches: by name, what to time of a kernel alone.
        calls: by name, what to time of a candidate with what stands around it.
        device: where they run.
        failed: why what fails is left out, by name.
    """
    # Compiling what stands around the kernels takes longer than timing them: only the faster ones get that far.
    alone = {name: _seconds(partial(launches, name), device, name, failed) for name in names}
    seconds: dict[str, float] = {}
    for name in (PLAIN, min(alone, key=lambda name: alone[name])):
        took = _seconds(partial(calls, name), device, name, failed)
        seconds |= {} if math.isinf(took) else {name: took}
    return seconds


def _seconds(
    calls: Callable[[], tuple[Callable[[], Any], ...]], device: torch.device, name: str, failed: dict[str, str]
) -> float:
    """Median seconds of all ``calls`` together; infinite, and said in ``failed``, where one fails."""
    try:
        return sum(median_seconds(call, device) for call in calls())
    except Exception as error:  # noqa: BLE001 - what can't be measured is not chosen
        failed.setdefault(name, error_line(error))
        return math.inf
