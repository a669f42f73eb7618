"""What a report says, in text, JSON and HTML."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from fxopt.errors import ReportError
from fxopt.ir.decision import Decision
from fxopt.ir.site import Source
from fxopt.passes.canonical.inactive_dropout import InactiveDropout
from fxopt.report.report import PassSummary, Report
from tests.report.support import GELU_TO_SILU, HOSTILE, Block, Failing, RulePass, capture, run, site

FULL = Report(
    sites=(
        site(kind="attention", status="rewritten", rule="fuse", reason="plain -> fxopt.attention", nodes=("a", "b")),
        site(kind="attention", reason="the weights escape", source=Source("g.py:7", "p @ v", "layer.0")),
        site(),
    ),
    passes=(PassSummary("fuse-attention", "exact", 1, True, 0.25), PassSummary("odd", "trainable", failure="no")),
    decisions=(Decision(("a",), "triton", "measured", {"sdpa": 2e-5, "triton": 1e-5, "aten": math.inf}),),
    notes=("one note",),
    graphs=2,
)
NASTY = Report(
    sites=(
        site(kind=HOSTILE, rule=HOSTILE, reason=HOSTILE, source=Source(HOSTILE, HOSTILE, HOSTILE), nodes=(HOSTILE,)),
    ),
    passes=(PassSummary(HOSTILE, HOSTILE, failure=HOSTILE),),
    decisions=(Decision((HOSTILE,), HOSTILE, HOSTILE, {HOSTILE: 1.0}),),
    notes=(HOSTILE,),
)


def test_count_is_by_kind_and_status() -> None:
    assert (FULL.count("attention"), FULL.count("attention", "kept"), FULL.count("norm"), FULL.count("kv")) == (
        1,
        1,
        0,
        0,
    )


def test_text_shows_headline_sites_passes_and_decisions() -> None:
    text = str(FULL)
    assert text.splitlines()[:3] == ["2 attention sites: 1 rewritten, 1 kept", "1 norm site: 1 kept", "2 graphs"]
    assert "fuse: plain -> fxopt.attention" in text
    assert "at g.py:7 in layer.0\n        p @ v" in text
    assert re.search(r"fuse-attention +exact +1 rewrite +250.0 ms", text)
    assert "rolled back: no" in text
    assert "a: triton, measured\n    triton 10.0 µs, sdpa 20.0 µs, aten inf µs" in text
    assert text.endswith("Notes\n  one note")


def test_text_of_an_empty_report_says_so() -> None:
    assert str(Report()) == "no attention, norm or MLP was found"


def test_layers_that_differ_only_in_module_are_one_entry() -> None:
    layers = tuple(site(source=Source("f.py:1", "", f"layer.{n}"), nodes=(f"n{n}",)) for n in range(3))
    text = str(Report(sites=layers))
    assert "3 norm sites: 3 kept" in text
    assert "×3 r: why\n    at f.py:1 in layer.0 … layer.2" in text


def test_report_of_a_pipeline_counts_rewrites_and_failures() -> None:
    program = capture(Block().eval(), torch.randn(1, 3, 8))
    result = run(program, [InactiveDropout(), RulePass((GELU_TO_SILU,)), Failing()])
    report = Report.of(result, notes=("said once", "said once"))
    dropout, rules, failing = report.passes
    assert (dropout.rewrites, rules.rewrites, failing.rewrites) == (1, 1, 0)
    assert (rules.changed, failing.changed) == (True, False)
    assert (failing.tier, failing.failure) == ("approximate", "ValueError: broken on purpose")
    assert report.notes == ("said once",)
    assert (report.count("mlp"), report.count("attention", "kept"), report.count("norm", "kept")) == (1, 1, 2)


def test_merge_adds_up_passes_and_keeps_every_site() -> None:
    merged = Report.merge([FULL, FULL])
    assert (merged.graphs, len(merged.sites), len(merged.decisions), merged.notes) == (4, 6, 2, ("one note",))
    assert merged.passes[0] == PassSummary("fuse-attention", "exact", 2, True, 0.5)
    assert merged.passes[1].failure == "no"
    assert Report.merge([]) == Report(graphs=0)


@pytest.mark.parametrize("report", [Report(), FULL, NASTY], ids=["empty", "full", "hostile"])
def test_json_round_trip(report: Report) -> None:
    text = report.to_json()
    assert text.isascii()
    assert Report.from_json(text) == report
    assert Report.from_json(text).to_json() == text


def test_json_schema_is_stable() -> None:
    document = json.loads(FULL.to_json())
    assert (document["schema"], document["version"]) == ("fxopt.report", 1)
    assert list(document) == ["schema", "version", "graphs", "sites", "passes", "decisions", "notes"]
    assert document["sites"][1] == {
        "kind": "attention",
        "status": "kept",
        "rule": "r",
        "reason": "the weights escape",
        "source": {"location": "g.py:7", "code": "p @ v", "module": "layer.0"},
        "nodes": [],
    }
    assert document["decisions"][0]["seconds"] == {"sdpa": 2e-5, "triton": 1e-5, "aten": "inf"}


def _changed(**changes: object) -> str:
    return json.dumps({**json.loads(FULL.to_json()), **changes})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "lacks"),
        ('{"schema": "other"}', "lacks"),
        (_changed(version=99), "version 99"),
        (_changed(sites=[{"kind": "norm"}]), "damaged"),
        (_changed(sites=[{**json.loads(FULL.to_json())["sites"][0], "status": "lost"}]), "'lost'"),
        (_changed(passes=[{"name": "p", "seconds": 1, "more": 2}]), "damaged"),
        (_changed(graphs=None), "damaged"),
    ],
)
def test_what_is_no_report_is_refused(text: str, message: str) -> None:
    with pytest.raises(ReportError, match=message):
        Report.from_json(text)


def test_no_control_character_reaches_a_terminal() -> None:
    text = str(NASTY)
    assert not [c for c in text.replace("\n", "") if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")]
    assert "\\x1b[31m" in text
    text.encode()


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_html_holds_the_report_and_no_markup_of_the_model(tmp_path: Path) -> None:
    page = NASTY.save_html(tmp_path / "deep" / "report.html")
    parsed = _Tags()
    parsed.feed(page.read_text(encoding="utf-8"))
    assert "b" not in parsed.tags
    assert "script" not in parsed.tags
    assert "a'b\"c d \\x1b[31m\\x07<b>&{x}%s\\" in parsed.text
    assert parsed.tags.count("table") == 3


def test_html_shows_what_text_shows(tmp_path: Path) -> None:
    parsed = _Tags()
    parsed.feed(FULL.save_html(str(tmp_path / "r.html")).read_text(encoding="utf-8"))
    for part in (
        "2 attention sites: 1 rewritten, 1 kept",
        "plain -> fxopt.attention",
        "g.py:7",
        "triton 10.0 µs",
        "one note",
    ):
        assert part in parsed.text
