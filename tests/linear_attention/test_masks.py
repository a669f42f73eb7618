"""Masks of keys in the ways that models write them: which keys count stays, whoever says it and however."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import fxopt
from fxopt.errors import PreparationError
from fxopt.passes import LinearAttention
from fxopt.passes.linear_attention.module import LinearisedModule
from tests.linear_attention.models import CHANNELS, HEADS, TOKENS, Heads, inputs

KEEP = torch.arange(TOKENS) < torch.tensor([[9], [4], [7], [1]])


class Hiding(Heads):
    """Fills scores of keys that its mask says are padding."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        assert mask is not None
        scores = (q @ k.mT * 0.5).masked_fill(mask[:, None, None, :], -torch.inf)
        return scores.softmax(-1) @ v


class HidingLater(Heads):
    """The same, causal."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        assert mask is not None
        later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
        scores = (q @ k.mT).masked_fill(mask[:, None, None, :] | later, -torch.inf)
        return scores.softmax(-1) @ v


class Added(Heads):
    """Adds a mask to its scores, and computes its softmax in float32 at least."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        assert mask is not None
        scores = q @ k.mT * 0.5 + mask
        wide = torch.promote_types(scores.dtype, torch.float32)
        return scores.softmax(-1, dtype=wide).to(q.dtype) @ v


def filled(keep: Tensor, dtype: torch.dtype) -> Tensor:
    added = torch.zeros(keep.shape, dtype=dtype).masked_fill(~keep, torch.finfo(dtype).min)
    return added[:, None, None, :]


def computed(keep: Tensor, dtype: torch.dtype) -> Tensor:
    return (1.0 - keep[:, None, None, :].to(dtype)) * torch.finfo(dtype).min


class Layers(nn.Module):
    """Two layers of one kind, and what is made of a mask of keys for them."""

    def __init__(self, kind: type[Heads], make: Callable[[Tensor, torch.dtype], Tensor]) -> None:
        super().__init__()
        self.layers, self.make = nn.ModuleList([kind(), kind()]), make

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        mask = self.make(keep, x.dtype)
        for layer in self.layers:
            x = x + layer(x, mask)
        return x


#: The layers, what the model makes of its mask, and whether they are causal.
MASKS: dict[str, tuple[type[Heads], Callable[[Tensor, torch.dtype], Tensor], bool]] = {
    "padding says what hides": (Hiding, lambda keep, dtype: ~keep, False),
    "padding and later keys hide": (HidingLater, lambda keep, dtype: ~keep, True),
    "filled with the lowest number": (Added, filled, False),
    "computed from the mask": (Added, computed, False),
}


def by_formula(layer: LinearisedModule, x: Tensor, keep: Tensor, *, causal: bool) -> Tensor:
    q, k, v = layer.get_submodule("qkv")(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    weights = q.relu() @ k.relu().mT * keep[:, None, None, :]
    weights = weights.tril() if causal else weights
    mixed = (weights @ v / (weights.sum(-1, keepdim=True) + 1e-6)).transpose(1, 2).reshape(*x.shape[:2], CHANNELS)
    y: Tensor = layer.get_submodule("proj")(mixed)
    return y


@pytest.mark.parametrize("steps", [0, 4])
@pytest.mark.parametrize("name", MASKS)
def test_keys_that_do_not_count_stay_out(name: str, steps: int) -> None:
    kind, make, causal = MASKS[name]
    torch.manual_seed(0)
    (x,) = (x.double() for x in inputs(1))
    model = Layers(kind, make).double()
    student = fxopt.prepare(model, (x, KEEP), passes=[LinearAttention(steps=steps)])
    layer = student.get_submodule("layers.0")
    assert isinstance(layer, LinearisedModule)
    expected = by_formula(layer, x, KEEP, causal=causal)
    torch.testing.assert_close(layer.eval()(x, make(KEEP, x.dtype)), expected, rtol=1e-12, atol=1e-12)
    if steps:
        torch.testing.assert_close(student.train()(x, KEEP), model(x, KEEP), rtol=1e-12, atol=1e-12)
    else:
        torch.testing.assert_close(layer.train()(x, make(KEEP, x.dtype)), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MASKS)
def test_other_masks_than_the_example_count(name: str) -> None:
    kind, make, _ = MASKS[name]
    torch.manual_seed(0)
    (x,) = inputs(1)
    student = fxopt.prepare(Layers(kind, make), (x, KEEP), passes=[LinearAttention()])
    keep = torch.arange(TOKENS) < torch.tensor([[3], [9], [2], [5]])
    changed = torch.where(keep[..., None], x, 7.0)
    torch.testing.assert_close(student(changed, keep)[keep], student(x, keep)[keep])


def test_a_softmax_in_float32_of_bfloat16_scores_is_exchanged() -> None:
    (x,) = (x.bfloat16() for x in inputs(1))
    student = fxopt.prepare(Layers(Added, filled).bfloat16(), (x, KEEP), passes=[LinearAttention()]).train()
    assert fxopt.prepared(student).report.count("attention") == 2
    y = student(x, KEEP)
    y.float().square().mean().backward()
    assert y.dtype == torch.bfloat16
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in student.parameters())


class Relative(Heads):
    """Adds learned positions to its scores where a mask hides no key, and ``low`` elsewhere, as T5 does."""

    def __init__(self, low: float = -1e9) -> None:
        super().__init__()
        self.bias, self.low = nn.Parameter(torch.randn(1, HEADS, TOKENS, TOKENS)), low

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        assert mask is not None
        return scaled_dot_product_attention(q, k, v, torch.where(mask, self.bias, self.low))


class Summed(Relative):
    """Adds its positions, and a mask of numbers as it comes."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        assert mask is not None
        return (q @ k.mT + self.bias + mask).softmax(-1) @ v


def of_keys(keep: Tensor, dtype: torch.dtype) -> Tensor:
    return keep[:, None, None, :]


def of_later(keep: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.full((TOKENS, TOKENS), -torch.inf, dtype=dtype).triu(1)


def test_positions_are_given_up_beside_a_mask_that_stays() -> None:
    torch.manual_seed(0)
    (x,) = (x.double() for x in inputs(1))
    model = Layers(Relative, of_keys).double()
    student = fxopt.prepare(model, (x, KEEP), passes=[LinearAttention(drop="bias", steps=4)])
    torch.testing.assert_close(student.train()(x, KEEP), model(x, KEEP), rtol=1e-12, atol=1e-12)
    layer = student.get_submodule("layers.0")
    assert isinstance(layer, LinearisedModule)
    expected = by_formula(layer, x, KEEP, causal=False)
    torch.testing.assert_close(layer.eval()(x, of_keys(KEEP, x.dtype)), expected, rtol=1e-12, atol=1e-12)
    sites = fxopt.prepared(student).report.sites
    assert all("without its bias" in site.reason for site in sites if site.kind == "attention")


@pytest.mark.parametrize(("kind", "make", "drop", "reason"), [
    (Relative, of_keys, (), "it has a bias that is added to its scores"),
    # What is not far below hides no key.
    (lambda: Relative(-5.0), of_keys, "bias", "it has a mask that is added to its scores"),
    # Given up as biases, both would leave an attention that sees later keys.
    (Summed, of_later, "bias", "of which none can be told to be its mask, not its bias"),
])  # fmt: skip
def test_a_mask_never_goes_with_a_bias(kind: Any, make: Any, drop: Any, reason: str) -> None:
    (x,) = inputs(1)
    with pytest.raises(PreparationError) as error:
        fxopt.prepare(Layers(kind, make), (x, KEEP), passes=[LinearAttention(drop=drop)])
    assert reason in str(error.value)
