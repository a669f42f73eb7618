"""Calls without the masks of the example call: ``None`` means what it does in the module, or is an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import fxopt
from fxopt.errors import CaptureError
from fxopt.passes import LinearAttention, SimplifiedLinearAttention
from fxopt.passes.linear_attention.missing_masks import choices
from fxopt.passes.linear_attention.module import LinearisedModule
from tests.linear_attention.models import CHANNELS, HEADS, TOKENS, Called, Heads, inputs, optimizer_of

KEEP = torch.arange(TOKENS) < torch.tensor([[9], [4], [7], [1]])
LATER = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()


class Later(Heads):
    """Without a mask of keys it is causal, with one it is not."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        given = None if mask is None else mask[:, None, None, :]
        return scaled_dot_product_attention(q, k, v, given, is_causal=mask is None)


class Both(Heads):
    """Takes a mask of keys, and one of pairs."""

    def forward(self, x: Tensor, keep: Tensor | None = None, pairs: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.mT * 0.5
        if keep is not None:
            scores = scores.masked_fill(~keep[:, None, None, :], -torch.inf)
        if pairs is not None:
            scores = scores.masked_fill(~pairs, -torch.inf)
        y: Tensor = self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return y


class Needing(Heads):
    """Can't do without its mask."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            raise ValueError("where is the mask?")
        return scaled_dot_product_attention(q, k, v, mask[:, None, None, :])


class Layer(nn.Module):
    """One attention in a model, which hands on what it is called with."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, *masks: Tensor | None) -> Tensor:
        y: Tensor = self.layer(x, *masks)
        return y


class Skipping(Layer):
    """Makes a mask that hides nothing only while it is captured, as transformers does."""

    def forward(self, x: Tensor, *masks: Tensor | None) -> Tensor:
        captured = torch.compiler.is_compiling()
        mask = torch.ones(x.shape[0], 1, TOKENS, TOKENS, dtype=torch.bool) if captured else None
        y: Tensor = self.layer(x, mask)
        return y


class Open(Heads):
    """Takes a mask of pairs as it comes; ``causal`` without."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal and mask is None)


def batch() -> Tensor:
    return inputs(1)[0].double()


def drawn(layer: nn.Module, model: type[Layer] = Layer) -> Layer:
    torch.manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model(layer).double()


def layer_of(student: nn.Module) -> LinearisedModule:
    found = student.get_submodule("layer")
    assert isinstance(found, LinearisedModule)
    return found


def by_formula(layer: nn.Module, x: Tensor, seen: Tensor) -> Tensor:
    """Linear attention of the pairs ``seen``, broadcast to ``[B, H, N, N]``."""
    qkv, proj = layer.get_submodule("qkv"), layer.get_submodule("proj")
    q, k, v = qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    weights = q.relu() @ k.relu().mT * seen
    y: Tensor = proj((weights @ v / (weights.sum(-1, keepdim=True) + 1e-6)).transpose(1, 2).flatten(2))
    return y


def check(student: nn.Module, model: nn.Module, masks: tuple[Tensor | None, ...], seen: Tensor) -> None:
    """Softmax attention, that of ``model``, at the start; linear attention of ``seen`` in the end; the mean between."""
    x, layer = batch(), layer_of(student.train())
    linear = by_formula(layer, x, seen)
    layer.step.zero_()
    original = model(x, *masks)
    torch.testing.assert_close(student(x, *masks), original, rtol=1e-12, atol=1e-12)
    layer.step.fill_(1)
    torch.testing.assert_close(student(x, *masks), (original + linear) / 2, rtol=1e-10, atol=1e-12)
    layer.step.fill_(2)
    torch.testing.assert_close(student(x, *masks), linear, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(student.eval()(x, *masks), linear, rtol=1e-10, atol=1e-12)


def test_a_mask_of_keys_may_be_missing() -> None:
    model = drawn(Called())
    student = fxopt.prepare(model, (batch(), KEEP), passes=[LinearAttention(steps=2)])
    check(student, model, (KEEP,), KEEP[:, None, None, :])
    check(student, model, (None,), torch.ones(()))
    every = student(batch(), torch.ones_like(KEEP))
    torch.testing.assert_close(student(batch(), None), every, rtol=1e-12, atol=1e-12)


def test_without_its_mask_a_module_may_be_causal() -> None:
    model = drawn(Later())
    student = fxopt.prepare(model, (batch(), KEEP), passes=[LinearAttention(steps=2)])
    check(student, model, (KEEP,), KEEP[:, None, None, :])
    check(student, model, (None,), LATER)


def test_each_of_two_masks_may_be_missing_and_both() -> None:
    class Causal(Layer):
        """Its mask of pairs is causal where there is one."""

        def forward(self, x: Tensor, *masks: Any) -> Tensor:
            keep, causal = masks
            y: Tensor = self.layer(x, keep, LATER if causal else None)
            return y

    model = drawn(Both(), Causal)
    student = fxopt.prepare(model, (batch(), KEEP, True), passes=[LinearAttention(steps=2)])
    keys = KEEP[:, None, None, :]
    for masks, seen in (
        ((KEEP, True), keys & LATER), ((None, True), LATER), ((KEEP, False), keys), ((None, False), torch.ones(())),
    ):  # fmt: skip
        check(student, model, masks, seen)  # type: ignore[arg-type]


def test_of_many_masks_each_may_be_missing_or_all() -> None:
    assert choices(()) == []
    assert choices((2,)) == [(2,)]
    assert choices((1, 3)) == [(1,), (3,), (1, 3)]
    assert choices((1, 3, 4)) == [(1,), (3,), (4,), (1, 3, 4)]


@pytest.mark.parametrize("steps", [0, 2])
def test_what_a_module_can_not_do_without_is_an_error_that_says_so(steps: int) -> None:
    student = fxopt.prepare(drawn(Needing()), (batch(), KEEP), passes=[LinearAttention(steps=steps)])
    student(batch(), KEEP)
    for training in (True, False):
        with pytest.raises(CaptureError) as error:
            student.train(training)(batch(), None)
        text = str(error.value)
        assert "layer (Needing) is called with None for its positional argument 1, without which it can't be" in text
        assert "where is the mask?" in text and "give it a mask that hides nothing" in text


def test_a_grid_trains_where_only_the_captured_model_makes_a_mask() -> None:
    model = drawn(Open(), Skipping)
    student = fxopt.prepare(model, (batch(),), passes=[SimplifiedLinearAttention(kernel=3, steps=2)]).train()
    torch.testing.assert_close(student(batch()), model(batch()), rtol=1e-12, atol=1e-12)
    optimizer = optimizer_of(student)
    for _ in range(3):
        student(batch()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(student(batch()), student.eval()(batch()), rtol=0, atol=0)


def test_a_grid_that_is_causal_without_its_mask_is_an_error_that_says_so() -> None:
    model = drawn(Open(causal=True), Skipping)
    student = fxopt.prepare(model, (batch(),), passes=[SimplifiedLinearAttention(kernel=3, steps=2)])
    with pytest.raises(CaptureError, match=r"layer \(Open\) is called with None .* without which it is causal, and to"):
        student(batch())


def test_what_differs_from_the_example_call_is_said() -> None:
    student = fxopt.prepare(drawn(Called()), (batch(), None), passes=[LinearAttention(steps=2)])
    with pytest.raises(CaptureError) as error:
        student(batch(), KEEP)
    assert "positional argument 1 was captured for None and got a tensor of sizes [4, 9]" in str(error.value)
    assert "prepare the model with example arguments that it is trained with" in str(error.value)
    with pytest.raises(CaptureError) as error:
        student(batch()[0], None)
    assert "positional argument 0 was captured for a tensor of sizes [None, None, None]" in str(error.value)
    assert "(None: any) and got a tensor of sizes [9, 16]" in str(error.value)


class Encoder(Layer):
    """PyTorch's encoder layer, by names."""

    def forward(self, x: Tensor, *masks: Tensor | None) -> Tensor:
        y: Tensor = self.layer(x, src_key_padding_mask=masks[0])
        return y


def test_an_encoder_of_pytorch_trains_on_whole_sequences_too() -> None:
    made = nn.TransformerEncoderLayer(CHANNELS, HEADS, 32, dropout=0.0, batch_first=True)
    model = drawn(made, Encoder)
    student = fxopt.prepare(model, (batch(), ~KEEP), passes=[LinearAttention(steps=2)]).train()
    for mask in (None, ~KEEP):
        torch.testing.assert_close(student(batch(), mask), model(batch(), mask), rtol=1e-12, atol=1e-12)
    layer = student.get_submodule("layer.self_attn")
    assert isinstance(layer, LinearisedModule)
    for step in (0, 1, 2):
        layer.step.fill_(step)
        for training in (True, False):
            student.train(training)
            every = student(batch(), torch.zeros_like(KEEP))
            torch.testing.assert_close(student(batch(), None), every, rtol=1e-12, atol=1e-12)
