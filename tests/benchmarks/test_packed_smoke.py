"""The benchmark of packed projections on tiny cases on the CPU: its candidates run, and what is wrong is not timed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks import packed

TINY = packed.Case("tiny", 2, 2, 12, 16, "split", causal=True)


@pytest.mark.parametrize("cut", ["split", "unbind", "in turn"])
def test_blocks_cut_alike_give_the_same(cut: str) -> None:
    block = packed.Block(replace(TINY, cut=cut))
    x = torch.randn(2, 12, 32)
    written = block(x)
    block.fused = True
    torch.testing.assert_close(block(x), written)


def test_every_candidate_is_timed(capsys: pytest.CaptureFixture[str]) -> None:
    timings = packed.measure(TINY, rounds=1, device="cpu")
    packed.show(TINY, timings)
    shown = capsys.readouterr().out
    assert "wrong" not in shown and len(shown.splitlines()) == len(timings) + 2
    assert set(timings) == {"eager", "sdpa", "inductor", "inductor sdpa", "fxopt", "fxopt views"}


def test_what_is_wrong_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    def step() -> tuple[Tensor, ...]:
        return (torch.ones(3),)

    assert packed._is_right("fxopt", step, [torch.ones(3)], [torch.ones(3).double()])
    assert not packed._is_right("fxopt", step, [torch.zeros(3)], [torch.zeros(3).double()])
    assert "fxopt is wrong" in capsys.readouterr().out
