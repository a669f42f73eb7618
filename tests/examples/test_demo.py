"""The demo on a small encoder with random weights: it passes, and fails where it should."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import fxopt
from examples import demo

transformers = pytest.importorskip("transformers")
# Of torch itself, when Inductor is imported.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as transformers writes it: one layer, random weights, a vocabulary of the sentences' words."""
    path: Path = tmp_path_factory.mktemp("encoder")
    words = sorted({word for sentence in demo.read_sentences() for word in sentence.lower().split()})
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    transformers.BertTokenizerFast(vocab=vocabulary).save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    transformers.BertModel(config).save_pretrained(path)
    return path


def test_demo_reports_compares_times_and_dumps(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "ROUNDS", 1)
    assert demo.main(["--quick", "--model", str(folder), "--output", str(tmp_path / "dump")]) == 0
    printed = capsys.readouterr().out
    assert "1 attention site: 1 rewritten" in printed
    assert "0 of 44 changed" in printed
    assert "x of eager" in printed
    assert (tmp_path / "dump" / "manifest.json").exists()


def test_demo_fails_when_an_attention_is_kept() -> None:
    class Squared(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x @ x.transpose(-2, -1)).softmax(-1).square() @ x

    assert demo.check_report(fxopt.explain(Squared(), torch.randn(2, 3, 5, 8)))


def test_demo_fails_when_results_change() -> None:
    exact = nn.functional.normalize(torch.randn(6, 16, dtype=torch.float64), dim=-1)
    eager = exact.float()
    assert demo.check_results(eager.clone(), eager, exact) == []
    assert demo.check_results(eager.flip(0), eager, exact)


def test_sentences_come_in_pairs() -> None:
    sentences = demo.read_sentences()
    assert len(sentences) == len(set(sentences))
    assert len(sentences) % 2 == 0
    assert len(sentences) >= 40
