"""The canonicalisations on transformers' own models: tiny configurations with random weights, eager attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

import fxopt.codegen.meanings  # noqa: F401 - gives the canonical operators their meaning
from fxopt.frontend.export import from_export
from fxopt.ir.program import Program
from fxopt.passes.canonical.gelu import Gelu
from fxopt.passes.canonical.glu import Glu
from fxopt.passes.canonical.layer_norm import LayerNorm
from fxopt.passes.canonical.no_ops import NoOps
from fxopt.passes.canonical.repeat_heads import RepeatHeads
from fxopt.passes.canonical.rms_norm import RmsNorm
from fxopt.passes.canonical.rotary import Rotary
from fxopt.passes.canonical.silu import Silu
from fxopt.passes.canonical.softmax import Softmax
from fxopt.rewriter.pipeline import run_pipeline
from fxopt.testing import assert_operators

PASSES = (NoOps(), Softmax(), RepeatHeads(), Gelu(), Silu(), LayerNorm(), RmsNorm(), Rotary(), Glu())
DECODER = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
GROUPED = DECODER | {"num_key_value_heads": 2, "pad_token_id": 0}
GPT = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}


def _model(family: str, options: dict[str, Any], name: str = "") -> nn.Module:
    config = getattr(transformers, f"{family}Config")(**options, use_cache=False, attn_implementation="eager")
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, name or f"{family}Model")(config)
    return model.eval()


LLAMA_LIKE = {"fxopt.rms_norm": 5, "fxopt.rotary": 4, "fxopt.glu": 2, "fxopt.repeat_heads": 4, "aten.rsqrt": 0}
CASES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "Llama": (GROUPED, LLAMA_LIKE),
    "Mistral": (GROUPED, LLAMA_LIKE),
    "Qwen2": (GROUPED, LLAMA_LIKE),
    "Qwen3": (GROUPED | {"head_dim": 8}, LLAMA_LIKE | {"fxopt.rms_norm": 9}),
    "Gemma": (GROUPED | {"head_dim": 8}, LLAMA_LIKE),
    "Gemma2": (GROUPED | {"head_dim": 8}, LLAMA_LIKE | {"fxopt.rms_norm": 9}),
    "Phi": (DECODER, {"fxopt.rotary": 4, "aten.layer_norm": 3}),
    "GPT2": (GPT, {"aten.gelu": 2, "aten.tanh": 0, "aten.layer_norm": 5, "aten.softmax": 2}),
    "GPTJ": (GPT | {"rotary_dim": 4}, {"aten.gelu": 2, "aten.tanh": 0, "fxopt.rotary": 4}),
    "GPTNeoX": (DECODER | {"rotary_pct": 0.5}, {"fxopt.rotary": 4, "aten.gelu": 2}),
}


@pytest.mark.parametrize("family", CASES)
def test_canonical_forms_of(family: str) -> None:
    options, expected = CASES[family]
    model = _model(family, options)
    ids = torch.randint(1, 50, (2, 7), generator=torch.Generator().manual_seed(1))
    result = run_pipeline(from_export(model, (ids,)), PASSES, strict=True)
    assert_operators(result.program.module, expected)
    _assert_equal(result.program, model, (ids,))


def test_canonical_forms_of_t5() -> None:
    sizes = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    model = _model("T5", sizes | {"feed_forward_proj": "gated-gelu"}, "T5EncoderModel")
    ids = torch.randint(1, 50, (2, 7), generator=torch.Generator().manual_seed(1))
    result = run_pipeline(from_export(model, (ids,)), PASSES, strict=True)
    assert_operators(result.program.module, {"fxopt.rms_norm": 5, "fxopt.glu": 2, "aten.tanh": 0, "aten.rsqrt": 0})
    _assert_equal(result.program, model, (ids,))


def _assert_equal(program: Program, model: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
    """The program, called with the model's own parameters, gives the model's hidden states."""
    signature = program.signature
    assert signature is not None
    state = dict(model.state_dict(keep_vars=True)) | signature.constants
    inputs = iter(args)
    names = [node.name for node in program.graph.find_nodes(op="placeholder")]
    given = [state[signature.bound[name]] if name in signature.bound else next(inputs) for name in names]
    with torch.no_grad():
        torch.testing.assert_close(program.module(*given)[0], model(*args)[0], rtol=1e-4, atol=1e-5)
