"""What folded norms are worth is measured on models that fold, against the same models without norms."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import folded_norms

pytest.importorskip("transformers")


def test_every_arm_of_a_tiny_deit_is_right_and_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "folded.json"
    arguments = ["--cases", "deit-ti", "--quick", "--device", "cpu", "--dtype", "float32", "--rounds", "2"]
    assert folded_norms.main([*arguments, "--output", str(output)]) == 0
    arms = json.loads(output.read_text())["results"]["deit-ti"]
    assert [(arm["norms"], arm["peer"]) for arm in arms] == [
        (norms, peer) for norms in ("own", "folded", "deleted") for peer in ("inductor", "fxopt")
    ]
    assert all(arm["timing"]["samples"] == 2 for arm in arms)
    # Two norms in each of two blocks; the last one's output is the model's.
    assert [arm["folded"] for arm in arms if arm["norms"] == "folded"] == [{"rewritten": 4, "kept": 1}] * 2
    assert "of the bound" in capsys.readouterr().out
