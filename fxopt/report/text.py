"""The report as plain text: no colours, no terminal width, every word from the model made printable."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from fxopt.ir.decision import Decision
from fxopt.ir.site import Site
from fxopt.report.printable import printable
from fxopt.report.report import PassSummary, Report

_INDENT = " " * 4


def render_text(report: Report) -> str:
    """``report`` for people: headline, sites with what or why and the user's line, passes, decisions, notes."""
    sections = [_headline(report)]
    if report.sites:
        sections.append("\n".join(["Sites", *_site_lines(report)]))
    if report.passes:
        sections.append("\n".join(["Passes", *_pass_lines(report.passes)]))
    if report.decisions:
        sections.append("\n".join(["Decisions", *_decision_lines(report)]))
    if report.notes:
        sections.append("\n".join(["Notes", *(f"  {printable(note)}" for note in report.notes)]))
    return "\n\n".join(sections)


def headlines(report: Report) -> tuple[str, ...]:
    """One sentence a kind of site: ``12 attention sites: 12 rewritten``."""
    kinds = dict.fromkeys(site.kind for site in report.sites)
    return tuple(_count(report, kind) for kind in kinds) or ("no attention, norm or MLP was found",)


def _count(report: Report, kind: str) -> str:
    rewritten, kept = report.count(kind), report.count(kind, "kept")
    total = rewritten + kept
    parts = [f"{rewritten} rewritten"] * bool(rewritten) + [f"{kept} kept"] * bool(kept)
    return f"{total} {printable(kind)} site{'s' * (total != 1)}: {', '.join(parts)}"


def _headline(report: Report) -> str:
    graphs = [f"{report.graphs} graphs"] if report.graphs != 1 else []
    return "\n".join([*headlines(report), *graphs])


def group_sites(sites: tuple[Site, ...]) -> tuple[tuple[Site, ...], ...]:
    """Sites that differ only in module and nodes (the layers of a model), together, in order of their first."""
    groups: dict[tuple[str, ...], list[Site]] = {}
    for site in sites:
        key = (site.kind, site.status, site.rule, site.reason, site.source.location)
        groups.setdefault(key, []).append(site)
    return tuple(tuple(group) for group in groups.values())


def modules(group: tuple[Site, ...]) -> str:
    """The owning modules of a group: the only one, or the first and the last."""
    names = list(dict.fromkeys(site.source.module for site in group if site.source.module))
    return " … ".join(names if len(names) < 2 else (names[0], names[-1]))


def _site_lines(report: Report) -> Iterator[str]:
    groups = group_sites(report.sites)
    width = max(len(printable(group[0].kind)) for group in groups)
    for group in groups:
        site = group[0]
        times = f"×{len(group)} " if len(group) > 1 else ""
        rule = f"{printable(site.rule)}: " if site.rule else ""
        yield f"  {printable(site.kind):{width}}  {site.status:9}  {times}{rule}{printable(site.reason)}"
        yield f"{_INDENT}at {printable(_place(group))}"
        if site.source.code:
            yield f"{_INDENT}{_INDENT}{printable(site.source.code)}"


def _place(group: tuple[Site, ...]) -> str:
    where, owners = group[0].source.location or "unknown line", modules(group)
    return f"{where} in {owners}" if owners else where


def _pass_lines(passes: tuple[PassSummary, ...]) -> Iterator[str]:
    width = max(len(printable(summary.name)) for summary in passes)
    for summary in passes:
        name, tier = f"{printable(summary.name):{width}}", f"{printable(summary.tier):11}"
        yield f"  {name}  {tier}  {outcome(summary):12}  {summary.seconds * 1e3:8.1f} ms"
        if summary.failure:
            yield f"{_INDENT}rolled back: {printable(summary.failure)}"


def outcome(summary: PassSummary) -> str:
    """What a pass did, in two words."""
    if summary.rewrites:
        return f"{summary.rewrites} rewrite{'s' * (summary.rewrites != 1)}"
    if summary.changed:
        return "changed"
    return "failed" if summary.failure else "no change"


def _decision_lines(report: Report) -> Iterator[str]:
    for (chosen, reason, timings), group in groupby(report.decisions, key=_shown):
        members = list(group)
        nodes = printable(", ".join(members[0].nodes))
        more = f" and {len(members) - 1} more" if len(members) > 1 else ""
        yield f"  {nodes}{more}: {printable(chosen)}, {printable(reason)}"
        if timings:
            yield f"{_INDENT}{timings}"


def _shown(decision: Decision) -> tuple[str, str, str]:
    return decision.chosen, decision.reason, timings(decision)


def timings(decision: Decision) -> str:
    """The measured candidates, fastest first: ``triton 12.3 µs, sdpa 20.1 µs``."""
    ranked = sorted(decision.seconds.items(), key=lambda item: item[1])
    return ", ".join(f"{printable(name)} {seconds * 1e6:.1f} µs" for name, seconds in ranked)
