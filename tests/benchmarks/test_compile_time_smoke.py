"""The cost of compiling is measured in processes of its own, cold and warm, and told apart into its parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import compile_time

pytest.importorskip("transformers")


def test_a_tiny_bert_is_compiled_cold_warm_and_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "compile.json"
    arguments = ["--models", "bert-sdpa", "--quick", "--device", "cpu", "--processes", "1", "--repeats", "1"]
    missed = compile_time.main([*arguments, "--goal", "0.0", "--output", str(output)])
    assert missed == 1, "no compilation takes no time"
    document = json.loads(output.read_text())
    (result,) = document["results"]
    assert (len(result["cold"]), len(result["warm"]), len(result["again"])) == (1, 1, 2)
    for run in (*result["cold"], *result["warm"], *result["again"]):
        assert 0 < run["parts"]["capture"] + run["parts"]["passes"] < run["own"] < run["first_call"]
    assert result["nodes"] > 50
    assert document["environment"]["import beyond torch"].endswith(" s")
    assert {kind: len(runs) for kind, runs in result["alone"].items()} == {"cold": 1, "warm": 1}
    assert all(seconds > 0 for runs in result["alone"].values() for seconds in runs)
    shown = capsys.readouterr().out
    assert "bert-sdpa" in shown and "whole first calls (eager alone): cold" in shown
