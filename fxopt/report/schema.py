"""The JSON form of a report. Its version rises with every change that an older reader would misread."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any, Final, get_args

from fxopt.errors import ReportError
from fxopt.ir.decision import Decision
from fxopt.ir.site import Site, Source, Status
from fxopt.report.report import PassSummary, Report

SCHEMA: Final = "fxopt.report"
VERSION: Final = 1


def write_report(report: Report) -> str:
    """``report`` as JSON. Seconds that are not finite stand as the strings ``"inf"``, ``"-inf"`` and ``"nan"``."""
    document = {
        "schema": SCHEMA,
        "version": VERSION,
        "graphs": report.graphs,
        "sites": [_plain(asdict(site)) for site in report.sites],
        "passes": [_plain(asdict(summary)) for summary in report.passes],
        "decisions": [_decision(decision) for decision in report.decisions],
        "notes": list(report.notes),
    }
    return json.dumps(document, indent=2, allow_nan=False)


def read_report(text: str) -> Report:
    """Read what `write_report` wrote; raises `ReportError` on anything else."""
    try:
        document = json.loads(text)
    except ValueError as error:
        raise ReportError(f"this is not a report: it is not JSON ({error})") from error
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise ReportError(f'this is not a report: it lacks "schema": "{SCHEMA}"')
    if document.get("version") != VERSION:
        found = document.get("version")
        raise ReportError(f"the report has version {found!r}, this fxopt reads {VERSION}; explain the model again")
    try:
        return _read(document)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ReportError(f"the report is damaged: {type(error).__name__}: {error}; explain the model again") from error


def _read(document: dict[str, Any]) -> Report:
    return Report(
        sites=tuple(_read_site(entry) for entry in document["sites"]),
        passes=tuple(_read_pass(entry) for entry in document["passes"]),
        decisions=tuple(_read_decision(entry) for entry in document["decisions"]),
        notes=tuple(str(note) for note in document["notes"]),
        graphs=int(document["graphs"]),
    )


def _read_site(entry: dict[str, Any]) -> Site:
    if entry["status"] not in get_args(Status):
        raise ValueError(f"a site's status is one of {get_args(Status)}, not {entry['status']!r}")
    nodes = tuple(map(str, entry["nodes"]))
    kind, rule, reason = str(entry["kind"]), str(entry["rule"]), str(entry["reason"])
    return Site(kind, entry["status"], rule, reason, Source(**entry["source"]), nodes)


def _read_pass(entry: dict[str, Any]) -> PassSummary:
    return PassSummary(**{**entry, "seconds": float(entry["seconds"])})


def _read_decision(entry: dict[str, Any]) -> Decision:
    seconds = {str(name): float(value) for name, value in entry["seconds"].items()}
    return Decision(tuple(map(str, entry["nodes"])), str(entry["chosen"]), str(entry["reason"]), seconds)


def _decision(decision: Decision) -> dict[str, Any]:
    seconds = {name: _finite(value) for name, value in decision.seconds.items()}
    return {
        "nodes": list(decision.nodes),
        "chosen": decision.chosen,
        "reason": decision.reason,
        "seconds": seconds,
    }


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: _finite(value) if isinstance(value, float) else value for name, value in fields.items()}


def _finite(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
