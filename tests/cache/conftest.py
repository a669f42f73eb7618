"""The cache directory that each test of the cache has to itself."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fxopt import cache
from tests.cache.support import use


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache directory of the test's own, and a process that has warned of nothing and imported nothing."""
    path = tmp_path / "cache"
    before = set(sys.modules)
    use(path, monkeypatch)
    for name, fresh in (("_warned", set[str]()), ("_modules", {}), ("_substitutes", {})):
        monkeypatch.setattr(cache, name, fresh)
    yield path
    for name in [name for name in sys.modules.keys() - before if name.startswith("fxopt_generated_")]:
        del sys.modules[name]
