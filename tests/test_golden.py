from __future__ import annotations

from pathlib import Path

import pytest

from tests.golden import UPDATE_SWITCH, GoldenTable

CONTENT = "name,status,seconds\na,kept,1\nb,rewritten,2\n"


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GoldenTable:
    monkeypatch.delenv(UPDATE_SWITCH, raising=False)
    path = tmp_path / "table.csv"
    path.write_text(CONTENT)
    return GoldenTable(path, ("name",), ("status",), ("seconds",))


def test_equal_facts_pass_whatever_was_measured(table: GoldenTable) -> None:
    table.check(("a",), {"status": "kept"}, {"seconds": "9"})
    table.save([("a",), ("b",)])
    assert table.path.read_text() == CONTENT


@pytest.mark.parametrize(("name", "status"), [("a", "rewritten"), ("b", "kept")])
def test_drift_in_either_direction_fails(table: GoldenTable, name: str, status: str) -> None:
    with pytest.raises(AssertionError, match=f"became '{status}'; set {UPDATE_SWITCH}=1"):
        table.check((name,), {"status": status})


def test_a_case_without_a_row_fails(table: GoldenTable) -> None:
    with pytest.raises(AssertionError, match="c has no row"):
        table.check(("c",), {"status": "kept"})


def test_rows_and_cases_must_correspond(table: GoldenTable) -> None:
    assert table.unplanned([("a",), ("b",)]) == set()
    assert table.unplanned([("a",), ("c",)]) == {("b",), ("c",)}


def test_updating_replaces_what_was_seen_and_drops_what_is_gone(
    table: GoldenTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(UPDATE_SWITCH, "1")
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    table.check(("c",), {"status": "kept"}, {"seconds": "3"})
    table.save([("c",), ("b",)])
    assert table.path.read_text() == "name,status,seconds\nc,kept,3\nb,rewritten,2\n"


def test_updating_in_several_processes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(UPDATE_SWITCH, "1")
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    with pytest.raises(RuntimeError, match="without -n"):
        GoldenTable(tmp_path / "table.csv", ("name",), ("status",))
