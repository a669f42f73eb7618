"""The benchmark of dropout on a tiny case on the CPU: its candidates run, and what is wrong is not timed."""

from __future__ import annotations

import pytest

from benchmarks import dropout


def test_every_candidate_is_timed_forward_and_in_training(capsys: pytest.CaptureFixture[str]) -> None:
    case = dropout.Case("tiny", 1, 2, 24, 64, causal=True)
    timings = dropout.measure(case, ["64x64w4s3/32x128w8s2-128x64w8s2"], rounds=1, device="cpu")
    dropout.show(case, timings)
    shown = capsys.readouterr().out
    assert "wrong" not in shown and len(timings) == len(shown.splitlines()) - 2
    assert {"forward eager", "training inductor", "training fxopt without dropout"} <= set(timings)
    assert any(name.startswith("training fxopt 64x64w4s3/") for name in timings)


def test_what_is_wrong_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(dropout, "_TOLERANCE", 0.0)
    assert not dropout._is_right(dropout.Case("tiny", 1, 2, 24, 64), "64x64w4s3/32x128w8s2-128x64w8s2", "cpu")
    assert "is wrong: error" in capsys.readouterr().out
