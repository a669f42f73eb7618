"""The zoo: transformers' own architectures, two layers each, with random weights and inputs like real ones.

Every model is made from a small configuration with a fixed seed, in eval mode and float32; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import torch
import transformers
from torch import Tensor, nn

Implementation = Literal["eager", "sdpa"]
Inputs = dict[str, Tensor]

BATCH: Final = 2
LENGTH: Final = 12
VOCABULARY: Final = 97
WIDTH: Final = 32
HEADS: Final = 4
LAYERS: Final = 2
_EOS: Final = 2


@dataclass(frozen=True)
class Zoo:
    """One model of the zoo.

    Attributes:
        name: the architecture, with a suffix for a variant of the inputs.
        implementation: transformers' ``attn_implementation``.
        model: name of the class in transformers.
        config: the configuration's own arguments, over the class's defaults.
        inputs: makes the keyword arguments of the forward call, of the same sizes for every draw.
    """

    name: str
    implementation: Implementation
    model: str
    config: Mapping[str, Any]
    inputs: Callable[[int], Inputs] = field(repr=False)

    def build(self) -> tuple[nn.Module, Inputs]:
        """The model, in eval mode, and the keyword arguments of its forward call."""
        model_class = getattr(transformers, self.model)
        config = model_class.config_class(**self.config)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = model_class._from_config(config, attn_implementation=self.implementation)
        return model.eval(), self.inputs(0)

    def __str__(self) -> str:
        return f"{self.name}-{self.implementation}"


def _ids(seed: int = 0, length: int = LENGTH) -> Tensor:
    ids = torch.randint(5, VOCABULARY, (BATCH, length), generator=torch.Generator().manual_seed(seed))
    ids[:, -1] = _EOS
    return ids


def text(draw: int = 0) -> Inputs:
    """Token ids alone, as for sentences of one length."""
    return {"input_ids": _ids(draw)}


def padded(draw: int = 0) -> Inputs:
    """Token ids with a padding mask: the second sentence is shorter."""
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[1, LENGTH * 2 // 3 :] = 0
    return {"input_ids": _ids(draw) * mask, "attention_mask": mask}


def text_with_weights(draw: int = 0) -> Inputs:
    """Token ids with a padding mask, and the wish to see the attention weights of every layer."""
    return {**padded(draw), "output_attentions": True}  # type: ignore[dict-item]


def image_with_weights(draw: int = 0) -> Inputs:
    """Images, and the wish to see the attention weights of every layer."""
    return {**image(draw), "output_attentions": True}  # type: ignore[dict-item]


def decoder(draw: int = 0) -> Inputs:
    """Token ids for a decoder that keeps no cache."""
    return {"input_ids": _ids(draw), "use_cache": False}  # type: ignore[dict-item]


def padded_decoder(draw: int = 0) -> Inputs:
    """The same with a padding mask on the right."""
    return {**padded(draw), "use_cache": False}  # type: ignore[dict-item]


def text_to_text(draw: int = 0) -> Inputs:
    """Token ids for an encoder and, shorter, for its decoder."""
    return {**decoder(draw), "decoder_input_ids": _ids(draw + 1, LENGTH - 4)}


def padded_text_to_text(draw: int = 0) -> Inputs:
    """The same with a padding mask for the encoder."""
    return {**padded_decoder(draw), "decoder_input_ids": _ids(draw + 1, LENGTH - 4)}


def image(draw: int = 0) -> Inputs:
    """Images of 32 by 32 pixels."""
    return {"pixel_values": torch.randn(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(draw + 2))}


def speech(draw: int = 0) -> Inputs:
    """Log-mel features of 24 frames, and token ids for the decoder."""
    features = torch.randn(BATCH, 16, 24, generator=torch.Generator().manual_seed(draw + 3))
    return {"input_features": features, "decoder_input_ids": _ids(draw + 1, LENGTH - 4), "use_cache": False}  # type: ignore[dict-item]


def image_and_text(draw: int = 0) -> Inputs:
    """Images and token ids with a padding mask."""
    return {**image(draw), **padded(draw)}


_COMMON: Final = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": _EOS}
_ENCODER: Final = {
    **_COMMON, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "intermediate_size": 2 * WIDTH, "max_position_embeddings": 64,
}  # fmt: skip
_GROUPED: Final = {**_ENCODER, "num_key_value_heads": 2}
_GPT: Final = {**_COMMON, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64}
_VISION: Final = {
    "image_size": 32, "patch_size": 8, "hidden_size": WIDTH, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "intermediate_size": 2 * WIDTH,
}  # fmt: skip
_SEQUENCES: Final = {
    "d_model": WIDTH, "encoder_layers": LAYERS, "decoder_layers": LAYERS, "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS, "encoder_ffn_dim": 2 * WIDTH, "decoder_ffn_dim": 2 * WIDTH,
}  # fmt: skip
_T5: Final = {
    **_COMMON, "d_model": WIDTH, "d_kv": 8, "d_ff": 2 * WIDTH, "num_layers": LAYERS, "num_heads": HEADS,
    "decoder_start_token_id": 0,
}  # fmt: skip
_DISTILBERT: Final = {
    **_COMMON, "dim": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": 2 * WIDTH,
    "max_position_embeddings": 64,
}  # fmt: skip
_GPT_NEO: Final = {
    **_COMMON, "hidden_size": WIDTH, "num_layers": LAYERS, "num_heads": HEADS, "window_size": 4,
    "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64, "intermediate_size": 2 * WIDTH,
}  # fmt: skip
_OPT: Final = {**_ENCODER, "ffn_dim": 2 * WIDTH, "word_embed_proj_dim": WIDTH}
_MPT: Final = {
    **_COMMON, "d_model": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "max_seq_len": 64, "expansion_ratio": 2,
}  # fmt: skip
_BLOOM: Final = {**_COMMON, "hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS}
_DEBERTA: Final = {
    **_ENCODER, "relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"],
    "norm_rel_ebd": "layer_norm", "share_att_key": True, "position_biased_input": False,
}  # fmt: skip
_GEMMA2: Final = {**_GROUPED, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}
_SWIN: Final = {
    "image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4,
}  # fmt: skip
_WHISPER: Final = {
    **_SEQUENCES, **_COMMON, "num_mel_bins": 16, "max_source_positions": 12, "max_target_positions": 64,
    "decoder_start_token_id": 1,
}  # fmt: skip
_CLIP: Final = {
    "text_config": {**_ENCODER, "projection_dim": 16}, "vision_config": {**_VISION, "projection_dim": 16},
    "projection_dim": 16,
}  # fmt: skip

_BOTH: Final[tuple[Implementation, ...]] = ("eager", "sdpa")
_EAGER: Final[tuple[Implementation, ...]] = ("eager",)

#: Name, class, configuration, inputs and, if a padding mask is a variant of its own, the inputs with one.
_ENTRIES: Final[tuple[tuple[Any, ...], ...]] = (
    ("bert", "BertModel", _ENCODER, _BOTH, text, padded),
    ("bert_weights", "BertModel", _ENCODER, _EAGER, text_with_weights, None),
    ("roberta", "RobertaModel", _ENCODER, _BOTH, text, padded),
    ("distilbert", "DistilBertModel", _DISTILBERT, _BOTH, text, padded),
    ("electra", "ElectraModel", {**_ENCODER, "embedding_size": 16}, _BOTH, text, padded),
    ("albert", "AlbertModel", {**_ENCODER, "embedding_size": 16}, _BOTH, text, padded),
    ("deberta_v2", "DebertaV2Model", _DEBERTA, _EAGER, text, padded),
    ("mpnet", "MPNetModel", _ENCODER, _EAGER, text, padded),
    ("gpt2", "GPT2Model", _GPT, _BOTH, decoder, padded_decoder),
    ("gpt_neo", "GPTNeoModel", _GPT_NEO, _EAGER, decoder, None),
    ("gptj", "GPTJModel", {**_GPT, "rotary_dim": 4}, _EAGER, decoder, None),
    ("gpt_neox", "GPTNeoXModel", _ENCODER, _BOTH, decoder, None),
    ("opt", "OPTModel", _OPT, _BOTH, decoder, None),
    ("bloom", "BloomModel", _BLOOM, _EAGER, decoder, None),
    ("mpt", "MptModel", _MPT, _EAGER, decoder, None),
    ("llama", "LlamaModel", _GROUPED, _BOTH, decoder, padded_decoder),
    ("mistral", "MistralModel", {**_GROUPED, "sliding_window": 4}, _BOTH, decoder, None),
    ("qwen2", "Qwen2Model", _GROUPED, _BOTH, decoder, None),
    ("gemma", "GemmaModel", {**_GROUPED, "head_dim": 8}, _BOTH, decoder, None),
    ("gemma2", "Gemma2Model", _GEMMA2, _EAGER, decoder, None),
    ("phi", "PhiModel", _GROUPED, _BOTH, decoder, None),
    ("t5", "T5Model", _T5, _BOTH, text_to_text, padded_text_to_text),
    ("bart", "BartModel", {**_SEQUENCES, **_COMMON, "max_position_embeddings": 64}, _BOTH, text_to_text, None),
    ("whisper", "WhisperModel", _WHISPER, _BOTH, speech, None),
    ("vit", "ViTModel", _VISION, _BOTH, image, None),
    ("vit_weights", "ViTModel", _VISION, _EAGER, image_with_weights, None),
    ("deit", "DeiTModel", _VISION, _BOTH, image, None),
    ("swin", "SwinModel", _SWIN, _BOTH, image, None),
    ("clip", "CLIPModel", _CLIP, _BOTH, image_and_text, None),
)


def _entries() -> list[Zoo]:
    zoo: list[Zoo] = []
    for name, model, config, implementations, plain, with_padding in _ENTRIES:
        for implementation in implementations:
            zoo.append(Zoo(name, implementation, model, config, plain))
            if with_padding:
                zoo.append(Zoo(f"{name}_padded", implementation, model, config, with_padding))
    return zoo


ZOO: Final[tuple[Zoo, ...]] = tuple(_entries())
