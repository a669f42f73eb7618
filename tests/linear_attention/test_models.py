"""transformers' own architectures as students with linear attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.errors import PreparationError
from fxopt.passes import LinearAttention, SimplifiedLinearAttention

transformers = pytest.importorskip("transformers")
SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 97,
}  # fmt: skip
GRID = SimplifiedLinearAttention(class_tokens=1)


def _model(name: str, **config: Any) -> nn.Module:
    model_class = getattr(transformers, f"{name}Model")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made: nn.Module = model_class(model_class.config_class(**config)).eval()
        return made


def _pixels(batch: int) -> dict[str, Any]:
    return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))}


def _ids(batch: int, **others: Any) -> dict[str, Any]:
    return {"input_ids": torch.randint(97, (batch, 12), generator=torch.Generator().manual_seed(batch)), **others}


def _keep(batch: int) -> Tensor:
    """The first sequence is whole, each other one is padded."""
    lengths = torch.arange(12, 12 - batch, -1)
    return (torch.arange(12) < lengths[:, None]).long()


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], dict[str, Any]], fxopt.Pass]] = {
    "vit": (lambda: _model("ViT", image_size=32, patch_size=8, **SIZES), _pixels, GRID),
    "swin": (
        lambda: _model("Swin", image_size=32, patch_size=2, embed_dim=16, depths=[2], num_heads=[2], window_size=4),
        _pixels,
        SimplifiedLinearAttention(drop=("bias", "mask")),
    ),
    "gpt2": (
        lambda: _model("GPT2", vocab_size=97, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2),
        lambda batch: _ids(batch, use_cache=False),
        LinearAttention(),
    ),
    "llama": (
        lambda: _model("Llama", num_key_value_heads=1, **SIZES),
        lambda batch: _ids(batch, use_cache=False),
        LinearAttention(),
    ),
    **{
        # In training these modules return weights after dropout, which nobody reads.
        f"{name}, eager": (
            lambda name=name: _model(name, attn_implementation="eager", **SIZES),  # type: ignore[misc]
            lambda batch: _ids(batch, attention_mask=_keep(batch)),
            LinearAttention(),
        )
        for name in ("Bert", "Roberta", "Electra", "DistilBert")
    },
}


def states(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    found: Tensor = model(**inputs).last_hidden_state
    return found


@pytest.mark.parametrize("name", MODELS)
def test_every_attention_is_exchanged_and_trains_with_other_batches(name: str) -> None:
    make, draw, chosen = MODELS[name]
    student = fxopt.prepare(make(), (), draw(2), passes=[chosen])
    sites = [site for site in fxopt.prepared(student).report.sites if site.kind == "attention"]
    assert len(sites) == 2 and {site.status for site in sites} == {"rewritten"}
    states(student.train(), draw(3)).square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())
    new = [p for n, p in student.named_parameters() if n.endswith(("key_positions", "depthwise_weight"))]
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in new)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_decoders_stay_causal_at_every_length(name: str) -> None:
    make, draw, chosen = MODELS[name]
    student = fxopt.prepare(make(), (), draw(2), passes=[chosen]).eval()
    inputs = draw(3)
    inputs["input_ids"] = torch.cat((inputs["input_ids"], inputs["input_ids"]), 1)[:, :17]
    changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][:, 9:] = 5
    moved = (states(student, inputs) - states(student, changed)).detach().abs().amax(-1)
    assert float(moved[:, :9].max()) == 0.0 and float(moved[:, 9:].max()) > 0.0


def test_padding_is_left_out_and_may_be_absent() -> None:
    keep = torch.ones(2, 12, dtype=torch.int64)
    keep[1, 7:] = 0
    student = fxopt.prepare(
        _model("Bert", **SIZES), (), _ids(2, attention_mask=keep), passes=[LinearAttention()]
    ).eval()
    inputs = _ids(2, attention_mask=keep)
    changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][1, 7:] = 5
    moved = (states(student, inputs) - states(student, changed)).detach().abs().amax(-1)
    assert float(moved[:, :7].max()) == 0.0
    whole = _ids(3, attention_mask=torch.ones(3, 12, dtype=torch.int64))
    torch.testing.assert_close(states(student, whole)[:2], states(student, {k: v[:2] for k, v in whole.items()}))


def test_eager_attention_becomes_what_sdpa_becomes() -> None:
    inputs = _ids(3, attention_mask=_keep(3))
    students = [
        fxopt.prepare(_model("Bert", attn_implementation=how, **SIZES), (), inputs, passes=[LinearAttention()])
        for how in ("eager", "sdpa")
    ]
    for training in (True, False):
        eager, sdpa = (_without_dropout(student, training) for student in students)
        torch.testing.assert_close(states(eager, inputs), states(sdpa, inputs))


def _without_dropout(model: nn.Module, training: bool) -> nn.Module:
    for module in model.train(training).modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def test_hooks_that_collect_weights_keep_eager_attention() -> None:
    inputs = _ids(3, attention_mask=_keep(3), output_attentions=True)
    model = _model("Bert", attn_implementation="eager", **SIZES)
    with pytest.raises(PreparationError, match="it has forward hooks, which would be lost"):
        fxopt.prepare(model, (), inputs, passes=[LinearAttention()])
