"""Every spelling of attention is recognised, and computes the same through each way in."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxopt
from tests.attention.check import Run, check_compiled, check_numbers, check_status, summary
from tests.attention.plan import NEAR_MISS_RUNS, SPELLING_RUNS, planned_keys
from tests.golden import GoldenTable

STRUCTURAL = [run for run in SPELLING_RUNS if run.shapes == "static" and run.dtype is torch.float32]


@pytest.mark.parametrize("run", SPELLING_RUNS, ids=str)
def test_spelling_is_recognised_and_computes_the_same(run: Run, matrix: GoldenTable) -> None:
    sites = check_compiled(run)
    check_status(run.case, sites)
    matrix.check(run.key, {"status": summary(sites)})


@pytest.mark.parametrize("run", [run for run in STRUCTURAL if run.mode == "inference"], ids=str)
def test_structural_entry_computes_the_same(run: Run) -> None:
    def rewritten(module: nn.Module, args: tuple[object, ...]) -> nn.Module:
        result = fxopt.rewrite(module, args, {})
        assert isinstance(result, nn.Module)
        assert result.state_dict().keys() == module.state_dict().keys()
        return result

    check_numbers(run, rewritten)


def test_matrix_has_a_row_for_each_run_and_no_other(matrix: GoldenTable) -> None:
    assert not matrix.unplanned(planned_keys())


def test_every_case_runs_in_each_of_its_modes() -> None:
    planned = {(run.case.number, run.mode) for run in (*SPELLING_RUNS, *NEAR_MISS_RUNS)}
    cases = {run.case.number: run.case for run in (*SPELLING_RUNS, *NEAR_MISS_RUNS)}
    assert planned == {(number, mode) for number, case in cases.items() for mode in case.modes}
