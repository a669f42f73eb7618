"""Folded norms in transformers' own architectures: how many, why not the others, and the same results."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fxopt
from fxopt.testing import assert_within_budget, evaluate, oracle
from tests.norm.support import EXACT

DECODER = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
VIT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
SWIN = {
    "image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4,
}  # fmt: skip
POOLFORMER = {
    "image_size": 32, "hidden_sizes": [16, 24], "depths": [1, 1], "num_encoder_blocks": 2, "patch_sizes": [7, 3],
    "strides": [4, 2], "padding": [2, 1],
}  # fmt: skip
GPT2 = {"vocab_size": 61, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
BERT = {**{k: v for k, v in DECODER.items() if k != "num_key_value_heads"}}

#: Class, configuration, norms that are folded, reasons of those that are kept.
MODELS: dict[str, tuple[str, dict[str, Any], int, dict[str, int]]] = {
    "Llama": ("LlamaForCausalLM", DECODER, 5, {}),
    "Llama with tied embeddings": ("LlamaForCausalLM", DECODER | {"tie_word_embeddings": True}, 5, {}),
    "GPT-2": ("GPT2LMHeadModel", GPT2, 5, {}),
    "BERT": ("BertModel", BERT, 0, {"aten.add at": 4, "also a result": 1}),
    "ViT": ("ViTForImageClassification", VIT, 5, {}),
    "Swin": ("SwinForImageClassification", SWIN, 8, {"aten.layer_norm at": 1}),
    "PoolFormer": ("PoolFormerForImageClassification", POOLFORMER, 3, {"aten.sub at": 2}),
}


class Tensors(nn.Module):
    """A model whose results are a flat tuple."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(leaf for leaf in tree_leaves(self.model(x)) if isinstance(leaf, Tensor))


def _model(name: str) -> tuple[Tensors, Tensor]:
    class_name, options, _, _ = MODELS[name]
    model_class = getattr(transformers, class_name)
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = model_class.config_class(**options)
        if hasattr(config, "use_cache"):
            config.use_cache = False
        model = Tensors(model_class(config)).eval()
    with torch.no_grad():
        for part in model.modules():
            if "Norm" in type(part).__name__:
                for parameter in part.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
    if "image_size" in options:
        return model, torch.randn(2, 3, options["image_size"], options["image_size"], generator=generator)
    return model, torch.randint(61, (2, 12), generator=generator)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_norms_are_folded_in(name: str) -> None:
    model, x = _model(name)
    _, _, folded, kept = MODELS[name]
    report = fxopt.explain_program(fxopt.capture(model, (x,)))
    rules = [site.rule for site in report.sites if site.kind == "norm"]
    assert rules.count("norm-affine") == folded + report.count("norm", "kept")
    reasons = [site.reason for site in report.sites if site.kind == "norm" and site.status == "kept"]
    assert {reason: sum(reason in text for text in reasons) for reason in kept} == kept
    assert len(reasons) == sum(kept.values())


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_folded_results_are_exact_in(name: str) -> None:
    model, x = _model(name)
    double = copy.deepcopy(model).double()
    image = x.double() if x.is_floating_point() else x
    rewritten = fxopt.rewrite(double, (image,), strict=True)
    for new, old in zip(rewritten(image), double(image), strict=True):
        # The model computes some of its angles, masks and RMSNorms in float32.
        tolerance = EXACT if "Llama" not in name else 1e-6
        assert (new - old).abs().max() <= tolerance * old.abs().max()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_folded_results_are_within_the_budget_in(name: str) -> None:
    model, x = _model(name)
    half = copy.deepcopy(model).bfloat16()
    image = x.bfloat16() if x.is_floating_point() else x
    rewritten = fxopt.rewrite(half, (image,), strict=True)
    eager, actual = evaluate(half, image), evaluate(rewritten, image)
    assert_within_budget(actual.outputs, eager.outputs, oracle(half, image))


@pytest.mark.parametrize("name", ["Llama", "Swin"])
@torch.no_grad()
def test_every_fold_is_verified_in(name: str) -> None:
    model, x = _model(name)
    fxopt.rewrite(model, (x,), verify="numeric", strict=True)


@pytest.mark.parametrize("name", ["ViT", "Swin", "GPT-2"])
@torch.no_grad()
def test_a_folded_model_goes_through_the_backend(name: str) -> None:
    model, x = _model(name)
    rewritten = fxopt.rewrite(model, (x,), strict=True)
    torch._dynamo.reset()
    options: dict[str, Any] = {"base": "aot_eager", "strict": True}
    fast = torch.compile(rewritten, backend="fxopt", fullgraph=True, options=options)
    for new, old in zip(fast(x), model(x), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-4)
    report = fxopt.explain(rewritten, x)
    assert report.count("attention", "kept") == 0
    assert report.count("attention") >= 2
