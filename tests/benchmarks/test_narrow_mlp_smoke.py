"""The benchmark of narrow feed-forward blocks in its quick form on the CPU: every case runs, what is wrong is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import narrow_mlp
from benchmarks.accuracy import largest_error


def test_a_quick_run_times_every_candidate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "results.json"
    narrow_mlp.main(["--quick", "--configs", "32x32w4s1", "--rounds", "1", "--output", str(output)])
    results = json.loads(output.read_text())["results"]
    assert [result["part"] for result in results] == list(narrow_mlp.PARTS)
    for result in results:
        assert {"eager", "inductor", "fxopt 32x32w4s1", "fxopt 128x64w8s3"} <= set(result["timings"])
    shown = capsys.readouterr().out
    assert "wrong" not in shown and "TFLOP/s" in shown


def test_the_sizes_that_are_reported() -> None:
    assert len(narrow_mlp.cases(narrow_mlp.SHAPES)) == 4 * 3
    (case,) = narrow_mlp.cases(narrow_mlp.SHAPES, "200704x96 residual")
    assert case.operations == 2 * 2 * 200704 * 96 * 384
    assert case.bytes == 2 * (3 * 200704 * 96 + 2 * 96 * 384)


def test_what_no_kernel_serves_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    timings = narrow_mlp.measure(narrow_mlp.Case(4, 384, "alone"), [], 1, "cpu")
    assert set(timings) == {"eager", "inductor"} and "no kernel: rows of 384" in capsys.readouterr().out


def test_what_is_wrong_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(narrow_mlp, "_TOLERANCE", 0.0)
    assert narrow_mlp.measure(narrow_mlp.Case(4, 16, "residual"), [], 1, "cpu") == {}
    assert "eager is wrong" in capsys.readouterr().out
    assert largest_error([torch.tensor([torch.nan])], [torch.ones(1)]) == float("inf")


def test_without_a_gpu_only_a_quick_run_is_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--quick runs without one"):
        narrow_mlp.main([])
