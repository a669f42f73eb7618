"""The evidence on norms runs from the text or the images to the table, on a CPU and in a few steps."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from benchmarks import norms_language, norms_vision
from benchmarks.norm_training import BASELINE, NORMS

_STEPS = 10


def _results(path: Path) -> list[dict[str, object]]:
    runs: list[dict[str, object]] = json.loads(path.read_text())["runs"]
    return runs


def test_language_trains_every_norm_on_the_excerpt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "language.json"
    norms_language.main(["--tiny", "--steps", str(_STEPS), "--seeds", "0", "--device", "cpu", "--output", str(output)])
    runs = _results(output)
    assert [run["norm"] for run in runs] == list(NORMS)
    assert all(0 < float(str(run["score"])) < 7 for run in runs)
    table = capsys.readouterr().out
    assert f"| {BASELINE}" in table
    assert "+0.00%" in table


def test_language_trains_linear_attention(capsys: pytest.CaptureFixture[str]) -> None:
    norms_language.main(
        ["--tiny", "--steps", str(_STEPS), "--seeds", "0", "--device", "cpu", "--norms", "LinearAttention"]
    )
    assert "| LinearAttention" in capsys.readouterr().out


def test_vision_trains_a_norm_on_images_like_the_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw = torch.Generator().manual_seed(0)
    rows = [[*torch.randint(17, (64,), generator=draw).tolist(), number % 10] for number in range(1797)]
    digits, output = tmp_path / "digits.csv.gz", tmp_path / "vision.json"
    with gzip.open(digits, "wt") as file:
        file.write("\n".join(",".join(map(str, row)) for row in rows))
    arguments = ["--digits", str(digits), "--tiny", "--steps", str(_STEPS), "--seeds", "0", "--device", "cpu"]
    norms = [BASELINE, "RepBatchNorm", "SimplifiedLinearAttention"]
    norms_vision.main([*arguments, "--norms", *norms, "--output", str(output)])
    assert [run["norm"] for run in _results(output)] == norms
    assert "points" in capsys.readouterr().out


def test_batches_depend_on_the_seed_alone(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("to be, or not to be: that is the question. " * 40)
    corpus = norms_language.Corpus(text, norms_language.TINY, "cpu")
    (first,), targets = next(corpus.batches(3))
    assert torch.equal(first[:, 1:], targets[:, :-1])
    assert torch.equal(first, next(corpus.batches(3))[0][0])
    assert not torch.equal(first, next(corpus.batches(4))[0][0])
