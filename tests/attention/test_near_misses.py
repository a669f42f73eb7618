"""What only looks like attention is left alone with a reason, or rewritten into something that computes the same."""

from __future__ import annotations

import pytest

from tests.attention.check import Run, check_compiled, check_status, summary
from tests.attention.plan import NEAR_MISS_RUNS
from tests.golden import GoldenTable


@pytest.mark.parametrize("run", NEAR_MISS_RUNS, ids=str)
def test_near_miss_keeps_its_meaning(run: Run, matrix: GoldenTable) -> None:
    sites = check_compiled(run)
    check_status(run.case, sites)
    matrix.check(run.key, {"status": summary(sites)})
