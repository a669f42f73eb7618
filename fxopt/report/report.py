"""The report: what was, or would be, done with a model. Text, JSON and HTML show the same data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fxopt.ir.decision import Decision
from fxopt.ir.site import Site, Status
from fxopt.report.sites import collect_sites
from fxopt.rewriter.pipeline import PipelineResult


@dataclass(frozen=True)
class PassSummary:
    """What one pass did.

    Attributes:
        name: the pass's name.
        tier: ``"exact"``, ``"approximate"`` or ``"trainable"``.
        rewrites: how many rewrites it applied.
        changed: whether it changed the program at all (constant folding does so without rewrites that are counted).
        seconds: how long it took, verification included.
        failure: why it was rolled back; empty when it succeeded.
    """

    name: str
    tier: str
    rewrites: int = 0
    changed: bool = False
    seconds: float = 0.0
    failure: str = ""

    def plus(self, other: PassSummary) -> PassSummary:
        """The same pass over both graphs."""
        failures = dict.fromkeys(failure for failure in (self.failure, other.failure) if failure)
        return PassSummary(
            self.name,
            self.tier,
            self.rewrites + other.rewrites,
            self.changed or other.changed,
            self.seconds + other.seconds,
            "; ".join(failures),
        )


@dataclass(frozen=True)
class Report:
    """What became of a model.

    Attributes:
        sites: every attention, norm and MLP (and what else rules rewrote), in graph order.
        passes: what each pass did, in order.
        decisions: what each lowered site runs as.
        notes: anything else that a user should know.
        graphs: how many captured graphs it covers; Dynamo makes several of a model with graph breaks.
    """

    sites: tuple[Site, ...] = ()
    passes: tuple[PassSummary, ...] = ()
    decisions: tuple[Decision, ...] = ()
    notes: tuple[str, ...] = ()
    graphs: int = 1

    @classmethod
    def of(cls, result: PipelineResult, decisions: Sequence[Decision] = (), notes: Sequence[str] = ()) -> Report:
        """The report of one program: its sites, passes and notes, with what the lowering layer decided."""
        return cls(
            sites=collect_sites(result),
            passes=_summaries(result),
            decisions=tuple(decisions),
            notes=tuple(dict.fromkeys((*result.program.notes, *notes))),
        )

    @classmethod
    def merge(cls, reports: Iterable[Report]) -> Report:
        """One report of several graphs: sites and decisions one after the other, passes of the same name added up."""
        reports = tuple(reports)
        passes: dict[tuple[str, str], PassSummary] = {}
        for summary in (summary for report in reports for summary in report.passes):
            key = (summary.name, summary.tier)
            passes[key] = passes[key].plus(summary) if key in passes else summary
        return cls(
            sites=tuple(site for report in reports for site in report.sites),
            passes=tuple(passes.values()),
            decisions=tuple(decision for report in reports for decision in report.decisions),
            notes=tuple(dict.fromkeys(note for report in reports for note in report.notes)),
            graphs=sum(report.graphs for report in reports),
        )

    def count(self, kind: str, status: Status = "rewritten") -> int:
        """How many sites of ``kind`` have ``status``."""
        return sum(site.kind == kind and site.status == status for site in self.sites)

    def to_json(self) -> str:
        """The report as JSON (ASCII, stable order); `from_json` reads it back."""
        from fxopt.report.schema import write_report

        return write_report(self)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read what `to_json` wrote.

        Raises:
            ReportError: ``text`` is not a report, or is one of another version.
        """
        from fxopt.report.schema import read_report

        return read_report(text)

    def save_html(self, path: str | Path) -> Path:
        """Write the report as one self-contained page (no script, nothing loaded) and return its path."""
        from fxopt.report.html import render_html

        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(render_html(self), encoding="utf-8")
        return target

    def __str__(self) -> str:
        from fxopt.report.text import render_text

        return render_text(self)


def _summaries(result: PipelineResult) -> tuple[PassSummary, ...]:
    """One summary a pass that ran; a pass that ran twice is one line."""
    passes: dict[tuple[str, str], PassSummary] = {}
    for record in result.records:
        outcome = record.result
        summary = PassSummary(
            record.name, record.tier, len(outcome.replacements), outcome.modified, record.seconds, record.failure
        )
        key = (record.name, record.tier)
        passes[key] = passes[key].plus(summary) if key in passes else summary
    return tuple(passes.values())
