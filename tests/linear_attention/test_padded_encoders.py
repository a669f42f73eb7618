"""PyTorch's own encoders and attention over padded sequences, in every way that they take a mask of keys."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.errors import CaptureError, PreparationError
from fxopt.passes import LinearAttention, SimplifiedLinearAttention
from fxopt.passes.linear_attention.module import LinearisedModule
from tests.linear_attention.models import CHANNELS, HEADS, TOKENS, inputs, optimizer_of

KEEP = torch.arange(TOKENS) < torch.tensor([[9], [4], [7], [1]])
CAUSAL = nn.Transformer.generate_square_subsequent_mask(TOKENS, dtype=torch.float64)


class Holder(nn.Module):
    """A module of PyTorch, and how it is called."""

    def __init__(self, inner: nn.Module, call: Callable[[Any, Tensor, Tensor | None], Tensor]) -> None:
        super().__init__()
        self.inner, self.call = inner, call

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.call(self.inner, x, mask)


def layer(**options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(CHANNELS, HEADS, 32, **{"dropout": 0.0, "batch_first": True, **options})


def attention(**options: Any) -> nn.MultiheadAttention:
    return nn.MultiheadAttention(CHANNELS, HEADS, batch_first=True, **options)


def hidden(keep: Tensor) -> Tensor:
    return ~keep


def infinite(keep: Tensor) -> Tensor:
    return torch.zeros(keep.shape, dtype=torch.float64).masked_fill(~keep, -torch.inf)


def lowest(keep: Tensor) -> Tensor:
    return infinite(keep).clamp(min=torch.finfo(torch.float32).min)


def padded(inner: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    y: Tensor = inner(x, src_key_padding_mask=mask)
    return y


def causal(inner: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    y: Tensor = inner(x, CAUSAL, src_key_padding_mask=mask, is_causal=True)
    return y


def swapped(inner: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    y: Tensor = inner(x.transpose(0, 1), src_key_padding_mask=mask).transpose(0, 1)
    return y


def alone(inner: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    y: Tensor = inner(x, x, x, key_padding_mask=mask, need_weights=False)[0]
    return y


def unread(inner: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    y: Tensor = inner(x, x, x, key_padding_mask=mask)[0]
    return y


#: The module, how it is called, its mask for the keys that count, and whether it is causal.
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor], Callable[[Tensor], Tensor], bool]] = {
    "layer": (layer, padded, hidden, False),
    "layer, numbers": (layer, padded, infinite, False),
    "layer, lowest numbers": (layer, padded, lowest, False),
    "layer, norm first, sequence first": (lambda: layer(norm_first=True, batch_first=False), swapped, hidden, False),
    "encoder": (lambda: nn.TransformerEncoder(layer(), 2), padded, hidden, False),
    "encoder, numbers": (lambda: nn.TransformerEncoder(layer(), 2), padded, infinite, False),
    "encoder, causal": (lambda: nn.TransformerEncoder(layer(), 2), causal, infinite, True),
    "attention": (attention, alone, hidden, False),
    "attention, numbers": (attention, alone, infinite, False),
    "attention, weights unread": (attention, unread, hidden, False),
}


def student_of(name: str, steps: int = 0) -> nn.Module:
    """A copy of its own."""
    return copy.deepcopy(_prepared(name, steps))


@functools.cache
def _prepared(name: str, steps: int) -> nn.Module:
    make, call, as_mask, _ = CASES[name]
    torch.manual_seed(0)
    (x,) = inputs(1)
    model = Holder(make().double(), call)
    return fxopt.prepare(model, (x.double(), as_mask(KEEP)), passes=[LinearAttention(steps=steps)])


def by_formula(module: Any, x: Tensor, keep: Tensor, *, causal: bool) -> Tensor:
    packed = nn.functional.linear(x, module.in_proj_weight, module.in_proj_bias)
    q, k, v = packed.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    weights = q.relu() @ k.relu().mT * keep[:, None, None, :]
    weights = weights.tril() if causal else weights
    mixed: Tensor = weights @ v / (weights.sum(-1, keepdim=True) + 1e-6)
    y: Tensor = module.out_proj(mixed.transpose(1, 2).flatten(2))
    return y


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_every_attention_is_the_formula_over_the_keys_that_count(name: str, training: bool) -> None:
    _, _, as_mask, is_causal = CASES[name]
    student = student_of(name).train(training)
    (x,) = (x.double() for x in inputs(1))
    seen: list[tuple[LinearisedModule, Tensor, Tensor]] = []

    def look(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        assert isinstance(module, LinearisedModule)
        own = (args or tuple(kwargs.values()))[0]
        y = out[0]
        swap = not module.batch_first
        seen.append((module, own.transpose(0, 1) if swap else own, y.transpose(0, 1) if swap else y))

    for module in student.modules():
        if isinstance(module, LinearisedModule):
            module.register_forward_hook(look, with_kwargs=True)
    keep = KEEP.flip(0)
    with torch.no_grad():
        student(x, as_mask(keep))
    assert len(seen) == (2 if "encoder" in name else 1)
    for module, own, found in seen:
        torch.testing.assert_close(found, by_formula(module, own, keep, causal=is_causal), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["layer", "encoder", "encoder, causal", "attention, numbers"])
def test_training_converting_and_exporting_agree(name: str) -> None:
    _, _, as_mask, _ = CASES[name]
    student = student_of(name, steps=2).train()
    (x,) = (x.double() for x in inputs(1))
    mask, optimizer = as_mask(KEEP), optimizer_of(student)
    for _ in range(3):
        student(x, mask)[KEEP].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = student.eval()(x, mask)[KEEP]
    with torch.no_grad():
        torch.testing.assert_close(student(x, mask)[KEEP], expected)
        torch.testing.assert_close(fxopt.convert(student)(x, mask)[KEEP], expected)
    torch.testing.assert_close(torch.export.export(student, (x, mask), strict=False).module()(x, mask)[KEEP], expected)
    torch.testing.assert_close(torch.compile(student, backend="aot_eager")(x, mask)[KEEP], expected)
    torch.testing.assert_close(copy.deepcopy(student)(x, mask)[KEEP], expected)


def test_rows_without_any_key_give_nothing_and_finite_gradients() -> None:
    student = student_of("attention").train()
    (x,) = (x.double() for x in inputs(1))
    keep = KEEP.clone()
    keep[2] = False
    y = student(x, ~keep)
    y.square().mean().backward()
    bias = student.get_parameter("inner.out_proj.bias")
    assert torch.equal(y[2], bias.detach().expand_as(y[2]))
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in student.parameters())


def test_numbers_that_are_no_mask_are_an_error_when_they_come() -> None:
    student = student_of("layer, numbers").eval()
    (x,) = (x.double() for x in inputs(1))
    soft = infinite(KEEP).masked_fill(KEEP, -0.5)
    with pytest.raises(RuntimeError, match="holds numbers that are neither 0 nor far below it"):
        student(x, soft)


def test_weights_that_are_read_later_are_not_there() -> None:
    student = student_of("attention, weights unread").eval()
    (x,) = (x.double() for x in inputs(1))
    assert student.get_submodule("inner")(x, x, x, key_padding_mask=~KEEP)[1] is None


def test_two_tensors_where_one_was_given_twice_are_an_error() -> None:
    student = student_of("attention").eval()
    (x,) = (x.double() for x in inputs(1))
    with pytest.raises(CaptureError, match="captured for one tensor given twice"):
        student.get_submodule("inner")(x, x[:, :4], x[:, :4], key_padding_mask=~KEEP, need_weights=False)


def test_masks_of_pairs_are_refused() -> None:
    far = torch.rand(4 * HEADS, TOKENS, TOKENS) < 0.3
    (x,) = inputs(1)

    def pairs(inner: Any, x: Tensor, mask: Tensor | None) -> Tensor:
        y: Tensor = inner(x, x, x, attn_mask=mask, need_weights=False)[0]
        return y

    for mask in (far, far.float()):
        with pytest.raises(PreparationError, match=r"a linear attention can't keep|neither causal nor one of keys"):
            fxopt.prepare(Holder(attention(), pairs), (x, mask), passes=[LinearAttention()])


def test_a_grid_has_no_padding() -> None:
    (x,) = inputs(1)
    for mask in (hidden(KEEP), infinite(KEEP).float()):
        with pytest.raises(PreparationError, match="it has a mask of padded keys"):
            fxopt.prepare(Holder(layer(), padded), (x, mask), passes=[SimplifiedLinearAttention()])
