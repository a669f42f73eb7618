"""The report as one self-contained page: tables, an inline style, no script."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Final

from fxopt.ir.site import Site
from fxopt.report.printable import printable
from fxopt.report.report import Report
from fxopt.report.text import group_sites, headlines, modules, outcome, timings

_STYLE: Final = """\
body { font: 15px/1.45 system-ui, sans-serif; max-width: 80rem; margin: 2rem auto; padding: 0 1rem; color: #1c1c1c; }
table { border-collapse: collapse; width: 100%; margin-bottom: 2rem; }
th, td { text-align: left; vertical-align: top; padding: .35rem .7rem; border-bottom: 1px solid #ddd; }
code { font: 13px ui-monospace, monospace; overflow-wrap: anywhere; }
tr.rewritten td:nth-child(2) { color: #146c2e; } tr.kept td:nth-child(2) { color: #8a4b00; }
"""
_SITE_COLUMNS: Final = ("kind", "status", "count", "rule", "what or why", "where")


def render_html(report: Report) -> str:
    """``report`` as a page. Every text is escaped, and control characters are written out."""
    sections = [
        f"<p>{'<br>'.join(map(_text, headlines(report)))}</p>",
        _table("Sites", _SITE_COLUMNS, map(_site, group_sites(report.sites))),
        _table("Passes", ("pass", "tier", "did", "time", "rolled back"), _passes(report)),
        _table("Decisions", ("nodes", "runs as", "why", "measured"), _decisions(report)),
        _notes(report),
    ]
    body = "\n".join(section for section in sections if section)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>fxopt report</title>\n'
        f"<style>\n{_STYLE}</style>\n</head>\n<body>\n<h1>fxopt report</h1>\n{body}\n</body>\n</html>\n"
    )


def _text(value: object) -> str:
    return escape(printable(str(value)), quote=True)


def _code(value: object) -> str:
    return f"<code>{_text(value)}</code>" if str(value) else ""


def _table(title: str, columns: Sequence[str], rows: Iterable[str]) -> str:
    body = "\n".join(rows)
    if not body:
        return ""
    head = "".join(f"<th>{_text(column)}</th>" for column in columns)
    return f"<h2>{_text(title)}</h2>\n<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def _row(*cells: str, css: str = "") -> str:
    attribute = f' class="{css}"' if css else ""
    return f"<tr{attribute}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _site(group: tuple[Site, ...]) -> str:
    site = group[0]
    where = "<br>".join(filter(None, (_code(site.source.location), _text(modules(group)), _code(site.source.code))))
    css = "rewritten" if site.status == "rewritten" else "kept"
    return _row(
        _text(site.kind), _text(site.status), _text(len(group)), _text(site.rule), _text(site.reason), where, css=css
    )


def _passes(report: Report) -> list[str]:
    return [
        _row(_text(p.name), _text(p.tier), _text(outcome(p)), _text(f"{p.seconds * 1e3:.1f} ms"), _text(p.failure))
        for p in report.passes
    ]


def _decisions(report: Report) -> list[str]:
    return [
        _row(_code(", ".join(d.nodes)), _text(d.chosen), _text(d.reason), _text(timings(d))) for d in report.decisions
    ]


def _notes(report: Report) -> str:
    if not report.notes:
        return ""
    return "<h2>Notes</h2>\n<ul>\n" + "\n".join(f"<li>{_text(note)}</li>" for note in report.notes) + "\n</ul>"
