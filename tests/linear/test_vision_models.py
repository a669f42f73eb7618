"""The pass `patch-embedding` in whole vision models: in the exact pipeline, compiled, with any batch, in training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import fxopt
from fxopt import backend
from fxopt.testing import assert_within_budget, evaluate, oracle_gradients

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE = {"image_size": 16, "patch_size": 4}
VIT = SIZES | IMAGE | {"intermediate_size": 48}
SWIN = IMAGE | {"embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4], "window_size": 2}
CONVNEXT = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 4}
#: Class, configuration and number of convolutions that cut patches.
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "ViT": ("ViTModel", VIT, 1),
    "DeiT": ("DeiTModel", VIT, 1),
    "BEiT": ("BeitModel", VIT, 1),
    "CLIP": ("CLIPVisionModel", VIT, 1),
    "SigLIP": ("SiglipVisionModel", VIT, 1),
    "DINOv2": ("Dinov2Model", SIZES | IMAGE, 1),
    "Swin": ("SwinModel", SWIN, 1),
    "ConvNeXt": ("ConvNextModel", CONVNEXT, 2),
}
SMALL = ("ViT", "CLIP", "Swin")


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Every test compiles anew."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _model(name: str) -> nn.Module:
    class_name, options, _ = MODELS[name]
    model_class = getattr(transformers, class_name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = model_class(model_class.config_class(**options))
    return model.eval()


class _Hidden(nn.Module):
    """A model, of whose results only the hidden states are read."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        hidden: Tensor = self.model(image).last_hidden_state
        return hidden


def _images(batch: int = 2, height: int = 16, width: int = 16) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(batch))


def _compiled(model: Callable[..., Any], **options: Any) -> Any:
    """``model`` through the backend, everything but the rewriting left to ATen."""
    dynamic = options.pop("dynamic", None)
    options = {"base": "aot_eager", "strict": True, **options}
    return torch.compile(model, backend="fxopt", fullgraph=True, dynamic=dynamic, options=options)


@pytest.mark.parametrize("name", MODELS)
def test_patch_embedding_fires_in(name: str) -> None:
    model, image = _Hidden(_model(name)), _images()
    report = fxopt.explain(model, image)
    assert (report.count("linear"), report.count("linear", "kept")) == (MODELS[name][2], 0)
    with torch.no_grad():
        expected, actual = model(image), _compiled(model, verify="numeric")(image)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert actual.stride() == expected.stride()


@pytest.mark.parametrize("name", SMALL)
def test_patch_embedding_is_right_in_the_training_of(name: str) -> None:
    model, image = _Hidden(_model(name)), _images().requires_grad_()
    trained = evaluate(_compiled(model, passes=["patch-embedding"]), image)
    # The gradient of a key's bias is zero by cancellation.
    assert_within_budget(trained, evaluate(model, image), oracle_gradients(model, image), floor=1.0)


@pytest.mark.parametrize("name", SMALL)
def test_patch_embedding_takes_any_batch_of(name: str) -> None:
    model = _Hidden(_model(name))
    fast, images = _compiled(model, passes=["patch-embedding"]), _images(5)
    torch._dynamo.mark_dynamic(images, 0)
    with torch.no_grad():
        torch.testing.assert_close(fast(images), model(images), rtol=1e-4, atol=1e-5)
        with torch.compiler.set_stance("fail_on_recompile"):
            for batch in (2, 7):
                torch.testing.assert_close(fast(_images(batch)), model(_images(batch)), rtol=1e-4, atol=1e-5)


def test_patch_embedding_takes_any_size_of_an_image() -> None:
    """Under Dynamo's own symbols; one graph serves all sizes with rows and columns that fill no patch."""
    layer, norm = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8)

    def embed(image: Tensor) -> Tensor:
        tokens: Tensor = norm(layer(image).flatten(2).transpose(1, 2))
        return tokens

    fast = _compiled(embed, passes=["patch-embedding"], dynamic=True)
    with backend.collecting() as (outcomes, _):
        torch.testing.assert_close(fast(_images(5, 18, 23)), embed(_images(5, 18, 23)))
        with torch.compiler.set_stance("fail_on_recompile"):
            for sizes in ((2, 9, 31), (4, 13, 21)):
                torch.testing.assert_close(fast(_images(*sizes)), embed(_images(*sizes)))
        torch.testing.assert_close(fast(_images(7, 16, 24)), embed(_images(7, 16, 24)))
    assert {outcome.report.count("linear") for outcome in outcomes} == {1}


@pytest.mark.parametrize("training", [False, True])
def test_patch_embedding_fires_under_autocast(training: bool) -> None:
    layer = nn.Conv2d(3, 8, 4, 4).requires_grad_(training)

    def embed(image: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            tokens: Tensor = layer(image).flatten(2).transpose(1, 2).relu().sum(1)
        return tokens

    with backend.collecting() as (outcomes, _):
        actual = _compiled(embed, passes=["patch-embedding"])(_images())
    assert [outcome.report.count("linear") for outcome in outcomes] == [1]
    expected = embed(_images())
    assert (actual.dtype, actual.requires_grad) == (expected.dtype, training)
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
