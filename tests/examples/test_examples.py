"""The examples run, and show what their text says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fxopt
from examples import (
    decorate_your_module,
    explain_and_dump,
    train_linear_attention,
    train_rep_batch_norm,
    train_through_backend,
    your_own_pass,
)

SEVERAL_LENGTHS = (9, 14)
# Of torch itself, when Inductor is imported.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


def test_decorate_your_module_keeps_parameters_and_results(capsys: pytest.CaptureFixture[str]) -> None:
    assert 0 <= decorate_your_module.main(length=12) < 1e-5
    printed = capsys.readouterr().out
    assert "same state_dict: True" in printed
    assert "1 attention site: 1 rewritten" in printed


def test_huggingface_backend_rewrites_all_of_llama() -> None:
    pytest.importorskip("transformers")
    from examples import huggingface_backend

    report = huggingface_backend.main(base="eager", lengths=SEVERAL_LENGTHS)
    assert (report.count("attention"), report.count("norm"), report.count("mlp")) == (2, 5, 2)
    assert not [site for site in report.sites if site.status == "kept"]


def test_explain_and_dump_shows_why_and_what(tmp_path: Path) -> None:
    before, after = explain_and_dump.main(tmp_path / "dump")
    (kept,) = before.sites
    assert kept.status == "kept"
    assert "relu stands between the softmax and the values" in kept.reason
    assert "weights_BQT = scores_BQT.softmax(-1)" in kept.source.code
    assert after.count("attention") == 1
    assert (tmp_path / "dump" / "01-fuse-attention.diff").read_text().count("fxopt.attention")


def test_your_own_pass_makes_the_attention_match() -> None:
    good, miss = your_own_pass.main(base="eager")
    assert (good.count("softmax"), good.count("attention")) == (1, 1)
    assert not miss.modified
    assert [near.reason for near in miss.near_misses] == ["the maximum runs over axes [2], the softmax over axis 3"]


def test_without_your_own_pass_the_attention_is_kept() -> None:
    report = fxopt.explain(your_own_pass.Attention(), torch.randn(2, 7, 64))
    assert report.count("attention", "kept") == 1
    assert "the scores escape" in report.sites[0].reason


def test_train_through_backend_learns_as_eager_does() -> None:
    means = train_through_backend.main(base="eager", steps=40)
    assert len(means) == 40
    assert means[-1] < means[0]


def test_train_rep_batch_norm_learns_resumes_and_converts(capsys: pytest.CaptureFixture[str]) -> None:
    losses, report = train_rep_batch_norm.main(steps=40)
    assert losses[-1] < losses[0]
    assert [site.rule for site in report.sites if site.kind == "norm"] == ["channel-affine"] * 5
    printed = capsys.readouterr().out
    assert "5 norm sites: 5 rewritten" in printed
    assert "interrupted and resumed: the same bits" in printed


def test_train_linear_attention_learns_converts_and_stays_causal(capsys: pytest.CaptureFixture[str]) -> None:
    losses, report = train_linear_attention.main(steps=40)
    assert losses[-1] < losses[0]
    attention = [site for site in report.sites if site.kind == "attention"]
    assert [site.reason for site in attention] == ["canonical fxopt.linear_attention"] * 2
    assert all("is_causal=True" in site.source.code for site in attention)
    printed = capsys.readouterr().out
    assert "softmax attention -> causal linear attention" in printed
    assert "move logits of the first by 0.0," in printed
