"""What the attention benchmark found, as data, as lines and as a table."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from rich import box
from rich.table import Table

from benchmarks.timing import Timing

_UNITS: Final = {"TFLOP/s": 1e-12, "GB/s": 1e-9}
_MISSING: Final = "–"


@dataclass(frozen=True)
class Verdict:
    """One goal: the fastest candidates on both sides, the ratio of their rates, ``None`` where one is missing."""

    goal: str
    wanted: float
    own: str | None
    other: str | None
    ratio: float | None

    @property
    def reached(self) -> bool | None:
        """Whether the goal is reached; ``None`` where there is no goal, or nothing to compare."""
        return None if self.ratio is None or not self.wanted else self.ratio >= self.wanted


@dataclass
class Result:
    """One case, by candidate.

    Attributes:
        case: its name.
        group: its group.
        unit: what rates are given in.
        work: FLOPs of the scores kept by the mask, or bytes of keys and values.
        computed: the same counted in whole blocks of 64×64 scores, where a block holds a score that is kept.
        graphs: whether CUDA graphs were replayed, as for all candidates of small cases.
        timings: milliseconds.
        errors: the largest difference to float64, over the largest value.
        failures: why a candidate is missing.
        notes: further figures.
        kernels: the longest GPU kernels in one call.
        verdicts: the goals.
    """

    case: str
    group: str
    unit: str = "TFLOP/s"
    work: dict[str, float] = field(default_factory=dict)
    computed: dict[str, float] = field(default_factory=dict)
    graphs: bool = False
    timings: dict[str, Timing] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    notes: dict[str, float] = field(default_factory=dict)
    kernels: dict[str, list[tuple[str, float]]] = field(default_factory=dict)
    verdicts: list[Verdict] = field(default_factory=list)

    def rate(self, name: str) -> float:
        """Computed work of one candidate per second: what ratios are made of."""
        return self.computed[name] / self.timings[name].median_ms * 1e3

    def shown_rate(self, name: str) -> float:
        """Kept work of one candidate per second, in the result's unit."""
        return self.work[name] / self.timings[name].median_ms * 1e3 * _UNITS[self.unit]

    def fastest(self, beginnings: tuple[str, ...]) -> str | None:
        """The candidate with the highest rate among those whose names begin so."""
        return max((name for name in self.timings if name.startswith(beginnings)), key=self.rate, default=None)

    def to_json(self) -> dict[str, Any]:
        """The result as plain data, rates and ``reached`` included."""
        rates = {name: self.shown_rate(name) for name in self.timings}
        verdicts = [{**asdict(verdict), "reached": verdict.reached} for verdict in self.verdicts]
        return {**asdict(self), "rates": rates, "verdicts": verdicts}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Result:
        """The inverse of ``to_json``."""
        timings = {name: Timing(**timing) for name, timing in data["timings"].items()}
        kernels = {name: [(key, float(ms)) for key, ms in found] for name, found in data["kernels"].items()}
        verdicts = [Verdict(**_without("reached", verdict)) for verdict in data["verdicts"]]
        plain = _without("rates", data)
        return Result(**{**plain, "timings": timings, "kernels": kernels, "verdicts": verdicts})


def _without(name: str, data: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key != name}


def show(result: Result) -> None:
    """Print every candidate of one case, the fastest first, and why others are missing."""
    print(f"\n{result.case}{' (CUDA graphs)' if result.graphs else ''}")
    for name in sorted(result.timings, key=lambda n: result.timings[n].median_ms):
        timing = result.timings[name]
        error = f"  error {result.errors[name]:.1e}" if name in result.errors else ""
        rate = f"{result.shown_rate(name):8.1f} {result.unit}"
        print(f"  {name:34} {rate}  {timing.median_ms:8.4f} ms  ±{timing.spread:4.0%}{error}")
        for kernel, milliseconds in result.kernels.get(name, []):
            print(f"      {milliseconds:8.4f} ms  {kernel}")
    for note, value in result.notes.items():
        print(f"  {note}: {value:.4g}")
    for name, reason in result.failures.items():
        print(f"  {name:34} {reason}")
    sys.stdout.flush()


def table(results: Iterable[Result]) -> Table:
    """One row a goal; a case without one is compared with its fastest peer."""
    columns = ("fxopt", "rate", "against", "its rate", "ratio", "goal", "reached")
    grid = Table("case", *columns, title="fxopt against its goals, interleaved medians", box=box.SIMPLE)
    for result in results:
        for verdict in result.verdicts:
            grid.add_row(result.case, *_cells(result, verdict))
    return grid


def _cells(result: Result, verdict: Verdict) -> tuple[str, ...]:
    return (
        (verdict.own or _MISSING).removeprefix("fxopt "),
        _rate(result, verdict.own),
        verdict.other or _MISSING,
        _rate(result, verdict.other),
        _MISSING if verdict.ratio is None else f"{verdict.ratio:.2f}",
        verdict.goal or _MISSING,
        {True: "yes", False: "no", None: _MISSING}[verdict.reached],
    )


def _rate(result: Result, name: str | None) -> str:
    return _MISSING if name is None else f"{result.shown_rate(name):.1f} {result.unit}"
