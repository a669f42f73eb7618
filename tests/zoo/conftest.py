from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.golden import GoldenTable
from tests.zoo.models import ZOO

KEYS = ("model", "implementation")
FACTS = ("sites", "rewritten", "kept", "reasons", "graph_breaks")
MEASURES = ("max_error_ratio",)


@pytest.fixture(scope="session")
def expected() -> Iterator[GoldenTable]:
    """The golden table of what became of every model."""
    table = GoldenTable(Path(__file__).with_name("expected.csv"), KEYS, FACTS, MEASURES)
    yield table
    table.save([(zoo.name, zoo.implementation) for zoo in ZOO])
