"""Causal masks in buffers on the GPU: read once at compile time, checked at each call without waiting for it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt import backend
from fxopt.ir.held import Unchanged, contents
from fxopt.testing import assert_within_budget, oracle

pytestmark = pytest.mark.gpu


class Attention(nn.Module):
    """Causal attention as nanoGPT has it."""

    def __init__(self, longest: int) -> None:
        super().__init__()
        self.register_buffer("bias", torch.ones(longest, longest).tril()[None, None])

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[2]
        scores = q @ k.mT * q.shape[-1] ** -0.5
        hidden = self.get_buffer("bias")[:, :, :length, :length] == 0
        attended: Tensor = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v
        return attended


class Layers(nn.Module):
    """Several of them, with a mask each."""

    def __init__(self, count: int = 3, longest: int = 512) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention(longest) for _ in range(count))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for layer in self.layers:
            q = layer(q, k, v)
        return q


def operands(length: int) -> tuple[Tensor, ...]:
    return tuple(torch.randn(2, 4, length, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))


@torch.no_grad()
def test_masks_in_buffers_are_proved_and_a_change_is_noticed() -> None:
    torch._dynamo.reset()
    model = Layers().cuda().bfloat16().eval()
    optimized, inputs = fxopt.optimize(model, strict=True), operands(384)
    for times, form in ((1, "mask: j <= i"), (1, "mask: 0 <= i - j < 128")):
        with backend.collecting() as (outcomes, failures):
            results = [optimized(*inputs) for _ in range(3)]
        assert not failures and len(outcomes) == times
        assert all(site.reason.endswith(form) for site in outcomes[0].report.sites)
        for found in results:
            assert_within_budget(found, model(*inputs), oracle(model, *inputs))
        for layer in model.layers:
            layer.get_buffer("bias").triu_(-127)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@torch.no_grad()
def test_the_check_does_not_wait_for_the_device() -> None:
    mask = torch.ones(1, 1, 512, 512, device="cuda").tril()
    digest = contents(mask)
    assert digest is not None
    unchanged = Unchanged(digest)
    assert unchanged(mask) and unchanged(mask.cpu())
    try:
        torch.cuda.set_sync_debug_mode("error")
        assert unchanged(mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    mask[..., 3, 7] = 1
    assert not unchanged(mask)
