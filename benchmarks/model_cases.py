"""The benchmarked models as data: what is built, at which size, on which inputs. Random weights, nothing downloaded."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Inputs = dict[str, torch.Tensor]

_QUICK_BATCH = 2
_QUICK_TOKENS = 16
_TIMM = all(importlib.util.find_spec(package) for package in ("timm", "torchvision"))


@dataclass(frozen=True)
class Case:
    """One model: how to build it and what to feed it.

    ``settings`` go to the transformers configuration, ``quick`` replaces some of them for a smoke test on the CPU.
    ``inputs`` is "tokens", "padded" (tokens of random lengths with an attention mask) or "images"; ``length`` counts
    tokens of a row, or pixels of an image's side. Where timm is importable and ``timm`` names a model, the full size
    is built with it. ``variants`` are further attention implementations that peers may ask for.
    """

    name: str
    title: str
    model_type: str
    inputs: str
    batch: int
    length: int
    settings: Mapping[str, object] = field(default_factory=dict)
    quick: Mapping[str, object] = field(default_factory=dict)
    attention: str = "sdpa"
    auto: str = "AutoModel"
    timm: str = ""
    timm_settings: Mapping[str, object] = field(default_factory=dict)
    variants: tuple[str, ...] = ()

    def source(self, quick: bool) -> str:
        """The library that the model comes from: "timm" or "transformers"."""
        return "timm" if self.timm and _TIMM and not quick else "transformers"

    def build(self, device: torch.device, dtype: torch.dtype, *, quick: bool = False, attention: str = "") -> Any:
        """The model in evaluation mode with random weights; ``attention`` replaces the case's own implementation."""
        torch.manual_seed(0)
        # transformers takes the dtype itself: casting afterwards would round rotary frequencies, which stay float32
        with device:
            model = self._timm_model() if self.source(quick) == "timm" else self._hf_model(dtype, quick, attention)
        _roughen(model)
        if self.source(quick) == "timm":
            model = model.to(dtype)
        return model.to(device).eval()

    def make_inputs(self, device: torch.device, dtype: torch.dtype, *, seed: int, quick: bool = False) -> Inputs:
        """Fresh random inputs of the case's shape, as keyword arguments of the model."""
        generator = torch.Generator().manual_seed(seed)
        batch = _QUICK_BATCH if quick else self.batch
        if self.inputs == "images":
            side = self._configuration(quick)["image_size"] if quick else self.length
            image_BCHW = torch.randn(batch, 3, side, side, generator=generator)
            return {"x" if self.source(quick) == "timm" else "pixel_values": image_BCHW.to(device, dtype)}
        length = _QUICK_TOKENS if quick else self.length
        vocabulary = self._configuration(quick)["vocab_size"]
        tokens = {"input_ids": torch.randint(2, vocabulary, (batch, length), generator=generator)}
        if self.inputs == "padded":
            tokens["attention_mask"] = padding_mask(batch, length, generator)
        return {name: tensor.to(device) for name, tensor in tokens.items()}

    def _configuration(self, quick: bool) -> dict[str, Any]:
        return {**self.settings, **(self.quick if quick else {})}

    def _hf_model(self, dtype: torch.dtype, quick: bool, attention: str) -> Any:
        import transformers

        config = transformers.AutoConfig.for_model(self.model_type, **self._configuration(quick))
        auto = getattr(transformers, self.auto)
        return auto.from_config(config, dtype=dtype, attn_implementation=attention or self.attention)

    def _timm_model(self) -> Any:
        import timm

        return timm.create_model(self.timm, pretrained=False, **self.timm_settings)


def padding_mask(batch: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Right padding ``[B, N]`` of 0/1: log-normal lengths as sentences have them, the longest filling its row."""
    lengths_B = (torch.randn(batch, generator=generator) * 0.6 + math.log(0.55 * length)).exp().round().long()
    lengths_B = lengths_B.clamp(min=min(8, length), max=length)
    lengths_B[0] = length
    return (torch.arange(length) < lengths_B[:, None]).long()


def _roughen(model: torch.nn.Module) -> None:
    """Noise on biases, norm weights and bias tables: at their initial 0 and 1 a dropped one would go unnoticed."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "bias" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)


_TINY_TEXT = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 64}
_TINY_DECODER = {**_TINY_TEXT, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128}
_BERT: dict[str, object] = {"num_hidden_layers": 4, "vocab_size": 30522, "initializer_range": 0.05}
_NO_CACHE: dict[str, object] = {"use_cache": False, "num_hidden_layers": 4, "hidden_size": 2048}

# Cheap models first: when time runs out, the expensive ones are what is missing. The initializer ranges keep the
# scores' standard deviation near 2; at the libraries' defaults every softmax is nearly uniform and hides a wrong mask.
CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case(
            name="bert-sdpa",
            title="BERT-base, 4 layers, sdpa, padding mask",
            model_type="bert",
            inputs="padded",
            batch=32,
            length=512,
            settings=_BERT,
            quick={**_TINY_TEXT, "vocab_size": 128},
        ),
        Case(
            name="bert-eager",
            title="BERT-base, 4 layers, eager attention, padding mask",
            model_type="bert",
            inputs="padded",
            batch=32,
            length=512,
            settings=_BERT,
            quick={**_TINY_TEXT, "vocab_size": 128},
            attention="eager",
        ),
        Case(
            name="t5",
            title="T5-base encoder, 4 layers",
            model_type="t5",
            inputs="tokens",
            batch=16,
            length=1024,
            settings={"d_model": 768, "d_ff": 3072, "num_heads": 12, "num_layers": 4, "vocab_size": 32128},
            quick={"d_model": 32, "d_ff": 64, "d_kv": 16, "num_heads": 2, "num_layers": 2, "vocab_size": 128},
            auto="AutoModelForTextEncoding",
        ),
        Case(
            name="vit",
            title="ViT-B/16, 4 blocks",
            model_type="vit",
            inputs="images",
            batch=128,
            length=224,
            settings={"num_hidden_layers": 4, "initializer_range": 0.05},
            quick={**_TINY_TEXT, "image_size": 32, "patch_size": 8},
            timm="vit_base_patch16_224",
            timm_settings={"depth": 4},
        ),
        Case(
            name="swin",
            title="Swin-T",
            model_type="swin",
            inputs="images",
            batch=64,
            length=224,
            settings={"initializer_range": 0.08},
            quick={"image_size": 32, "embed_dim": 16, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4},
            timm="swin_tiny_patch4_window7_224",
        ),
        Case(
            name="llama",
            title="Llama-like, 4 layers, 32 query / 8 key heads",
            model_type="llama",
            inputs="tokens",
            batch=2,
            length=4096,
            settings={
                **_NO_CACHE,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "intermediate_size": 5632,
                "vocab_size": 32000,
                "max_position_embeddings": 4096,
                "initializer_range": 0.03,
            },
            quick=_TINY_DECODER,
        ),
        Case(
            name="gemma2",
            title="Gemma2-like, 4 layers, head dim 256, soft-cap, window 1024",
            model_type="gemma2",
            inputs="tokens",
            batch=2,
            length=4096,
            settings={
                **_NO_CACHE,
                "num_attention_heads": 8,
                "num_key_value_heads": 4,
                "head_dim": 256,
                "intermediate_size": 9216,
                "vocab_size": 32000,
                "sliding_window": 1024,
                "initializer_range": 0.03,
            },
            quick={**_TINY_DECODER, "sliding_window": 8},
            attention="eager",
            variants=("flex_attention",),
        ),
    )
}
