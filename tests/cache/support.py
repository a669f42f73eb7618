"""What the tests of the cache share."""

from __future__ import annotations

from pathlib import Path

import pytest

from fxopt import cache

SOURCE = '"""A generated module."""\n\n\ndef answer() -> int:\n    return {value}\n'


def use(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache.VARIABLE, str(path))


def forget_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a second process would know."""
    monkeypatch.setattr(cache, "_modules", {})


def only_entry(folder: Path) -> Path:
    (entry,) = (path for path in folder.rglob("*") if path.is_file())
    return entry


def source(value: int) -> str:
    return SOURCE.format(value=value)


def make_file(path: Path) -> None:
    path.write_text("not a directory")
