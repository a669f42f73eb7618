"""Every family of masks, forward and backward, with fixed and with changing lengths, in every dtype, as users do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

from fxopt import backend
from fxopt.testing import assert_within_budget, evaluate, oracle, oracle_gradients
from tests.analysis.mask_families import FAMILIES, Family

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
HEADS, WIDTH = 3, 64
#: Rows and keys: first those that a graph is compiled for, then others that a graph of symbolic lengths serves too.
LENGTHS = ((300, 340), (77, 131))
#: The first row has no key, which gives NaN and spoils all gradients; with a finite number it gives the mean of values.
EMPTY = frozenset({"strictly-causal"})


class Attention(nn.Module):
    """Attention written out, whose mask a family builds; ``lowest`` fills with the least finite number, not with −∞."""

    def __init__(self, family: Family, lowest: bool) -> None:
        super().__init__()
        self.build, self.lowest = family.build, lowest

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *data: Tensor) -> Tensor:
        torch._check(q.shape[3] == WIDTH)  # kernels are generated for a width, which is dynamic in no model
        scores, mask = q @ k.transpose(-2, -1) * WIDTH**-0.5, self.build(q, k, *data)
        fill = torch.finfo(q.dtype).min if self.lowest else -torch.inf
        scores = scores.masked_fill(~mask, fill) if mask.dtype is torch.bool else scores + mask
        return torch.softmax(scores, -1).to(v.dtype) @ v


def drawn(family: Family, lengths: tuple[int, int], dtype: torch.dtype, training: bool) -> tuple[Tensor, ...]:
    """Operands, with gradients in ``training``, and the family's own data, which need none."""
    rows, keys = lengths[0], lengths[0] if family.square else lengths[1]
    torch.manual_seed(rows)
    operands = [torch.randn(2, HEADS, n, WIDTH, device=DEVICE, dtype=dtype) for n in (rows, keys, keys)]
    return (*(x.requires_grad_(training) for x in operands), *(x.to(DEVICE) for x in family.data(rows, keys)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("training", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_within_the_budget_of_eager(name: str, training: bool, dynamic: bool, dtype: str) -> None:
    family = FAMILIES[name]
    model = Attention(family, name in EMPTY)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="fxopt", dynamic=dynamic, options={"lower": "triton", "strict": True})
    with backend.collecting() as (outcomes, failures):
        for lengths in LENGTHS if dynamic else LENGTHS[:1]:
            check(compiled, model, drawn(family, lengths, DTYPES[dtype], training), training)
    assert not failures
    assert len(outcomes) == 1, "lengths must not be compiled for one by one"
    (decision,) = outcomes[0].decisions
    assert decision.chosen.startswith("triton")


def check(compiled: Any, model: Attention, inputs: tuple[Tensor, ...], training: bool) -> None:
    """The result, or with it all gradients, against float64."""
    if training:
        results = evaluate(compiled, *inputs), evaluate(model, *inputs), oracle_gradients(model, *inputs)
        assert_within_budget(*results, floor=1.0)
        return
    with torch.no_grad():
        assert_within_budget(compiled(*inputs), model(*inputs), oracle(model, *inputs))
