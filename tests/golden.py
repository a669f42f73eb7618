"""Golden tables: facts about many cases kept in a CSV file, compared row by row, rewritten on request.

A row that differs fails, whichever way it differs: an unexpected gain is as much news as a loss. Set
``FXOPT_UPDATE_GOLDEN=1`` to write what was observed instead, and review the difference like any other change.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Final

UPDATE_SWITCH: Final = "FXOPT_UPDATE_GOLDEN"
Key = tuple[str, ...]


def updating() -> bool:
    """True if observed rows are to be written instead of compared."""
    return os.environ.get(UPDATE_SWITCH) == "1"


class GoldenTable:
    """A CSV file whose first columns name a case, whose next are facts that must hold, and whose last are measures.

    Measures are kept for the reader; they differ from machine to machine and are not compared.
    """

    def __init__(
        self, path: Path, keys: tuple[str, ...], facts: tuple[str, ...], measures: tuple[str, ...] = ()
    ) -> None:
        if updating() and "PYTEST_XDIST_WORKER" in os.environ:
            raise RuntimeError(f"update {path.name} in one process: run pytest without -n")
        self.path, self.keys, self.facts, self.measures = path, keys, facts, measures
        self.rows: dict[Key, dict[str, str]] = self._read()
        self._observed: dict[Key, dict[str, str]] = {}

    def check(self, key: Key, observed: Mapping[str, str], measured: Mapping[str, str] | None = None) -> None:
        """Compare one case with its row, or take note of it when updating."""
        row = {name: observed[name] for name in self.facts}
        if updating():
            self._observed[key] = {**row, **(measured or {})}
            return
        hint = f"set {UPDATE_SWITCH}=1 to rewrite {self.path.name}, if the change is meant"
        assert key in self.rows, f"{', '.join(key)} has no row; {hint}"
        expected = self.rows[key]
        drift = [
            f"{name}: {expected[name]!r} became {row[name]!r}" for name in self.facts if expected[name] != row[name]
        ]
        assert not drift, f"{', '.join(key)}: {'; '.join(drift)}; {hint}"

    def unplanned(self, planned: Collection[Key]) -> set[Key]:
        """Rows that no case stands for, and cases that no row stands for."""
        return set() if updating() else set(self.rows) ^ set(planned)

    def save(self, planned: Collection[Key]) -> None:
        """Write what was observed, keep other rows whose case still exists, in the order of ``planned``."""
        if not self._observed:
            return
        rows = {**self.rows, **self._observed}
        with self.path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*self.keys, *self.facts, *self.measures], lineterminator="\n")
            writer.writeheader()
            for key in (key for key in planned if key in rows):
                writer.writerow({**dict(zip(self.keys, key, strict=True)), **rows[key]})

    def _read(self) -> dict[Key, dict[str, str]]:
        if not self.path.exists():
            return {}
        with self.path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        values = (*self.facts, *self.measures)
        return {tuple(row[name] for name in self.keys): {name: row[name] for name in values} for row in rows}
