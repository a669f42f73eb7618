"""The benchmark of the SLAB-Swin block on the CPU: variants agree with float64, and what is wrong is not timed."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import slab_block


def test_every_variant_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "slab.json"
    slab_block.main(["--quick", "--output", str(output)])
    shown = capsys.readouterr().out
    assert shown.count("fxopt  ") == shown.count("fxopt, fuse-mlp  ") == 2 and shown.count(f"{slab_block.BASE}  ") == 2
    assert "whole block" in output.read_text()


def test_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slab_block, "_TOLERANCE", 0.0)
    with pytest.raises(SystemExit, match="is wrong: error"):
        slab_block.main(["--quick"])
