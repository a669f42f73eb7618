"""The benchmark of the log-sum-exp on a tiny case on the CPU: its candidates run, and what is wrong is not timed."""

from __future__ import annotations

import pytest

from benchmarks import log_sum_exp


def test_every_candidate_is_timed_forward_and_in_training(capsys: pytest.CaptureFixture[str]) -> None:
    case = log_sum_exp.Case("tiny", 2, 4, 24, 16, causal=True)
    timings = log_sum_exp.measure(case, rounds=1, device="cpu")
    log_sum_exp.show(case, timings)
    names = {f"{mode} {name}" for mode in ("forward", "training") for name in ("eager", "inductor", "fxopt")}
    assert set(timings) == names and "wrong" not in capsys.readouterr().out


def test_what_is_wrong_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    case = log_sum_exp.Case("tiny", 2, 2, 24, 16)
    other = log_sum_exp.Case("tiny", 2, 2, 24, 16, causal=True)
    assert not log_sum_exp._is_right(case, "causal", other.written_out, case.operands("cpu"))
    assert "causal is wrong: error" in capsys.readouterr().out
