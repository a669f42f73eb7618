"""The benchmark of residual norms in its quick form on the CPU: every case runs, and what is wrong is not timed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import residual_norm
from benchmarks.accuracy import largest_error


def test_a_quick_run_times_every_candidate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "results.json"
    residual_norm.main(["--quick", "--case", "rms_norm", "--rounds", "1", "--output", str(output)])
    results = json.loads(output.read_text())["results"]
    shown = capsys.readouterr().out
    assert [(result["pre"], result["training"]) for result in results] == [
        (True, False), (True, True), (False, False), (False, True),
    ]  # fmt: skip
    assert {"eager", "inductor", "copy", "fxopt 16w4"} <= set(results[0]["timings"])
    assert "fxopt 16w4/16w4p4" in results[1]["timings"]
    assert "wrong" not in shown and "GB/s" in shown


def test_the_sizes_that_are_reported() -> None:
    assert len(residual_norm.cases(residual_norm.SHAPES)) == 5 * 2 * 2 * 2
    (case,) = residual_norm.cases(residual_norm.SHAPES, "layer_norm 16384x768 pre forward")
    assert case.bytes == 4 * 16384 * 768 * 2 and case.configs() == ["4w4", "4w8"]
    (case,) = residual_norm.cases(residual_norm.SHAPES, "rms_norm 4096x8192 post training")
    assert case.bytes == 7 * 4096 * 8192 * 2 and len(case.configs()) == 4


def test_what_is_wrong_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(residual_norm, "_TOLERANCE", 0.0)
    case = residual_norm.Case(4, 8, "layer_norm", pre=True, training=False)
    timings = residual_norm.measure(case, [], 1, "cpu")
    assert set(timings) == {"copy"} and "eager is wrong" in capsys.readouterr().out
    assert largest_error([torch.tensor([torch.nan])], [torch.ones(1)]) == float("inf")


def test_without_a_gpu_only_a_quick_run_is_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--quick runs without one"):
        residual_norm.main([])
