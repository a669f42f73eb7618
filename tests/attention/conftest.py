from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.attention.plan import planned_keys
from tests.golden import GoldenTable


@pytest.fixture(scope="session")
def matrix() -> Iterator[GoldenTable]:
    """The golden table of what became of every spelling and near miss."""
    table = GoldenTable(
        Path(__file__).with_name("matrix.csv"), ("number", "name", "mode", "shapes", "dtype"), ("status",)
    )
    yield table
    table.save(planned_keys())
