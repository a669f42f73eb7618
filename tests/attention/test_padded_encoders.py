"""PyTorch's own encoder over padded sequences: masks that it edits in place are read like any other."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import fxopt

TOKENS = 9
HIDDEN = torch.arange(TOKENS) >= torch.tensor([[9], [4], [7], [1]])


class Encoder(nn.Module):
    """One layer in a module of its own, called with a padding mask."""

    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=batch_first)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        y: Tensor = self.layer(x, src_key_padding_mask=hidden)
        return y


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_the_attention_is_canonical_and_computes_the_same(batch_first: bool, training: bool) -> None:
    torch.manual_seed(0)
    model = Encoder(batch_first=batch_first).double().train(training)
    x = torch.randn((4, TOKENS, 16) if batch_first else (TOKENS, 4, 16), dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = fxopt.explain(model, x, HIDDEN)
        optimized = torch.compile(model, backend="fxopt", options={"base": "eager"})(x, HIDDEN)
    attention = [site for site in found.sites if site.kind == "attention"]
    assert [site.status for site in attention] == ["rewritten"] and "mask: (~c0)" in attention[0].reason
    torch.testing.assert_close(optimized, model(x, HIDDEN), rtol=1e-12, atol=1e-12)
