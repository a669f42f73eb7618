"""The benchmark of weights that are read, on tiny cases on the CPU: its ways run, and what is wrong is not timed."""

from __future__ import annotations

import pytest
import torch

from benchmarks import attention_weights as benchmark

TINY = benchmark.Case("tiny", 2, 2, 24, 64, (benchmark._CLASS_ROW, benchmark._SUMS, benchmark._DIAGONAL))


def test_every_way_is_timed(capsys: pytest.CaptureFixture[str]) -> None:
    timings = benchmark.measure(TINY, rounds=1, device="cpu")
    benchmark.show(TINY, timings)
    shown = capsys.readouterr().out
    assert "wrong" not in shown and len(timings) == len(shown.splitlines()) - 2
    assert {name.split()[1] for name in timings if name.startswith("fxopt")} == {"apart", "walks", "one"}
    assert {"eager", "inductor"} <= set(timings)


def test_what_is_wrong_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    operands = [torch.ones(2, 2, 24, 64, dtype=torch.bfloat16)] * 3
    weights = torch.ones(2, 2, 24, 24)
    wrong = [operands[2], *(want.of(weights) for want in TINY.wants)]
    assert not benchmark._is_right(TINY, "guess", lambda: wrong, operands)
    assert "guess is wrong: error" in capsys.readouterr().out
