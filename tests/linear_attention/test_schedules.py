"""Whole schedules on transformers' architectures, which leave masks out when they run that they make when captured."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.passes import LinearAttention, SimplifiedLinearAttention
from fxopt.passes.linear_attention.module import LinearisedModule
from tests.linear_attention.models import optimizer_of

transformers = pytest.importorskip("transformers")
SIZES: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 97,
}  # fmt: skip
#: Of a batch of 3 the first is whole.
KEEP = (torch.arange(8) < torch.tensor([[8], [5], [3]])).long()
Inputs = dict[str, Any]


def _model(name: str, kind: str, config: dict[str, Any]) -> nn.Module:
    model_class = getattr(transformers, f"{name}{kind}")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made: nn.Module = model_class(model_class.config_class(**config))
    for module in made.modules():
        for rate in ("p", "dropout", "dropout_prob", "attention_dropout", "drop_prob"):
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.0)
    return made.double().eval()


def _pixels(seed: int) -> Inputs:
    return {"pixel_values": torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(seed)).double()}


def _ids(seed: int, **others: Any) -> Inputs:
    return {"input_ids": torch.randint(97, (3, 8), generator=torch.Generator().manual_seed(seed)), **others}


def _padded(seed: int, **others: Any) -> Inputs:
    return _ids(seed, attention_mask=KEEP, **others)


def _decoded(seed: int) -> Inputs:
    return _ids(seed, use_cache=False)


def _decoded_padded(seed: int) -> Inputs:
    return _padded(seed, use_cache=False)


def _whole(seed: int) -> Inputs:
    return _ids(seed, attention_mask=torch.ones_like(KEEP))


ENCODED = (_ids, _padded, _whole)
SEQUENCE = LinearAttention(steps=2, warmup=1)
#: The architecture, its settings, the pass, and its kinds of inputs; the first is the example.
MODELS: dict[str, tuple[str, dict[str, Any], fxopt.Pass, tuple[Callable[[int], Inputs], ...]]] = {
    "Bert": ("Model", SIZES, SEQUENCE, ENCODED),
    "Bert, eager": ("Model", {"attn_implementation": "eager", **SIZES}, SEQUENCE, ENCODED),
    "Roberta": ("Model", SIZES, SEQUENCE, ENCODED),
    "Electra": ("Model", SIZES, SEQUENCE, ENCODED),
    "DistilBert": (
        "Model", {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24, "vocab_size": 97}, SEQUENCE, ENCODED,
    ),
    "T5": (
        "EncoderModel", {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 97},
        LinearAttention(drop="bias", steps=2, warmup=1), ENCODED,
    ),
    "Llama": ("Model", {"num_key_value_heads": 1, **SIZES}, SEQUENCE, (_decoded, _decoded_padded)),
    "GPT2": (
        "Model", {"vocab_size": 97, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2},
        SEQUENCE, (_decoded, _decoded_padded),
    ),
    "ViT": (
        "Model", {"image_size": 16, "patch_size": 8, **SIZES},
        SimplifiedLinearAttention(kernel=3, class_tokens=1, steps=2, warmup=1), (_pixels,),
    ),
    "DeiT": (
        "Model", {"image_size": 16, "patch_size": 8, **SIZES},
        SimplifiedLinearAttention(kernel=3, class_tokens=2, steps=2, warmup=1), (_pixels,),
    ),
    "Swin": (
        "Model",
        {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [2], "num_heads": [2], "window_size": 4,
         "drop_path_rate": 0.0},
        SimplifiedLinearAttention(kernel=3, drop=("bias", "mask"), steps=2, warmup=1), (_pixels,),
    ),
}  # fmt: skip
DECODERS = ("Llama", "GPT2")
each = pytest.mark.parametrize("name", MODELS)


def model_of(name: str) -> nn.Module:
    kind, config, _, _ = MODELS[name]
    return _model(name.partition(",")[0], kind, config)


@functools.cache
def _prepared(name: str) -> nn.Module:
    _, _, chosen, draws = MODELS[name]
    return fxopt.prepare(model_of(name), (), draws[0](0), passes=[chosen])


def student_of(name: str) -> nn.Module:
    """A copy of its own, in training."""
    return copy.deepcopy(_prepared(name)).train()


def exchanged(student: nn.Module) -> list[LinearisedModule]:
    return [module for module in student.modules() if isinstance(module, LinearisedModule)]


def at_steps(student: nn.Module) -> Iterator[int]:
    """Through the warm-up, between, and after the end."""
    for step in (0, 2, 3):
        for module in exchanged(student):
            module.step.fill_(step)
        yield step


def states(model: nn.Module, inputs: Inputs) -> Tensor:
    found: Tensor = model(**inputs).last_hidden_state
    return found


def gradients(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    model.zero_grad()
    (states(model, inputs).sin() * (torch.arange(16) + 1.0)).mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@each
def test_training_starts_as_the_original_with_and_without_masks(name: str) -> None:
    student, model = student_of(name), model_of(name)
    # Llama's norms and rotations are computed in float32, whatever the model's dtype.
    rtol = 1e-5 if name in ("Llama", "T5") else 1e-9
    for draw in MODELS[name][3]:
        inputs = draw(5)
        for training in (True, False):
            torch.testing.assert_close(states(student, inputs), states(model.train(training), inputs))
        found, expected = gradients(student, inputs), gradients(model, inputs)
        for key, gradient in expected.items():
            torch.testing.assert_close(found[key], gradient, rtol=rtol, atol=rtol)


def run(student: nn.Module, name: str, batches: range, model: Any = None) -> list[float]:
    """One optimiser step a batch, of every kind of inputs in turn."""
    model, optimizer, losses = student if model is None else model, optimizer_of(student), []
    draws = MODELS[name][3]
    for number in batches:
        loss = (states(model, draws[number % len(draws)](number)) - 1).square().mean()
        loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@each
def test_the_whole_schedule_trains_and_ends_as_the_evaluation(name: str) -> None:
    student = student_of(name)
    shares = [exchanged(student)[0].remaining()]
    begun = {key: p.detach().clone() for key, p in exchanged(student)[0].named_parameters()}
    for number in range(4):
        run(student, name, range(number, number + 1))
        shares.append(exchanged(student)[0].remaining())
    assert shares == [1.0, 1.0, 0.5, 0.0, 0.0]
    # A bias of keys moves no softmax.
    still = [key for key, p in exchanged(student)[0].named_parameters() if torch.equal(p, begun[key])]
    assert not [key for key in still if "relative_attention_bias" not in key and "relative_position" not in key]
    for draw in MODELS[name][3]:
        trained, evaluated = states(student.train(), draw(9)), states(student.eval(), draw(9))
        assert torch.equal(trained, evaluated)
    inputs = MODELS[name][3][0](9)
    with torch.no_grad():
        torch.testing.assert_close(fxopt.convert(student)(**inputs).last_hidden_state, states(student, inputs))


def calls_of(student: nn.Module, inputs: Inputs) -> list[tuple[LinearisedModule, tuple[Any, ...], dict[str, Any]]]:
    """How its model calls each exchanged module."""
    calls = []

    def remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(module, LinearisedModule)
        calls.append((module, args, kwargs))

    hooks = [m.register_forward_pre_hook(remember, with_kwargs=True) for m in exchanged(student)]
    with torch.no_grad():
        student(**inputs)
    for hook in hooks:
        hook.remove()
    return calls


@each
def test_the_blend_moves_evenly_from_one_attention_to_the_other(name: str) -> None:
    student = student_of(name)
    for draw in MODELS[name][3]:
        for module, args, kwargs in calls_of(student, draw(7)):
            found = []
            for step in (1, 2, 3):
                module.step.fill_(step)
                y = module(*args, **kwargs)
                found.append(y[0] if isinstance(y, tuple) else y)
            original, between, linear = found
            assert float((original - linear).detach().abs().max()) > 1e-4
            torch.testing.assert_close(between, (original + linear) / 2, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["Bert", "Bert, eager", "DistilBert", "T5", "Llama", "GPT2"])
def test_padding_has_no_influence_at_any_step(name: str) -> None:
    student = student_of(name)
    inputs = next(draw for draw in (_decoded_padded, _padded) if draw in MODELS[name][3])(3)
    seen = KEEP.bool()
    changed = {**inputs, "input_ids": torch.where(seen, inputs["input_ids"], 5)}
    for _ in at_steps(student):
        one, other = states(student, inputs), states(student, changed)
        assert torch.equal(one[seen], other[seen])
        assert not torch.equal(one[~seen], other[~seen])


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_stay_causal_without_a_mask_at_any_step(name: str) -> None:
    student = student_of(name)
    assert all(not any(isinstance(x, Tensor) and x.dim() == 4 for x in (*args, *kwargs.values()))
               for _, args, kwargs in calls_of(student, _decoded(3)))  # fmt: skip
    inputs = _decoded(3)
    changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][:, 5:] = 7
    for training in (True, False):
        for _ in at_steps(student.train(training)):
            moved = (states(student, inputs) - states(student, changed)).detach().abs().amax(-1)
            assert float(moved[:, :5].max()) == 0.0 and float(moved[:, 5:].max()) > 0.0


@pytest.mark.parametrize("name", ["Bert", "DistilBert", "T5", "ViT", *DECODERS])
def test_no_mask_is_the_mask_that_hides_nothing(name: str) -> None:
    student = student_of(name)
    size = 5 if name == "ViT" else 8
    mask = torch.ones(3, 1, size, size, dtype=torch.bool)
    mask = mask.tril() if name in DECODERS else mask
    for module, args, kwargs in calls_of(student, MODELS[name][3][0](3)):
        known = "mask" if "mask" in kwargs else "attention_mask"
        place = None if known in kwargs else next(n for n, x in enumerate(args) if x is None)
        given = args if place is None else (*args[:place], mask, *args[place + 1 :])
        named = {**kwargs, known: mask} if place is None else kwargs
        for training in (True, False):
            module.train(training)
            for _ in at_steps(student):
                without, full = module(*args, **kwargs), module(*given, **named)
                torch.testing.assert_close(without, full, rtol=1e-6, atol=1e-8)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("name", ["Bert", "Llama", "ViT"])
def test_compiled_schedules_follow_eager_ones(name: str) -> None:
    eager, student = student_of(name), student_of(name)
    torch._dynamo.reset()
    compiled = torch.compile(student, backend="eager")
    assert run(student, name, range(4), compiled) == pytest.approx(run(eager, name, range(4)), rel=1e-9)


@pytest.mark.parametrize("name", ["Bert", "GPT2"])
def test_a_schedule_resumes_in_the_middle(name: str) -> None:
    first = student_of(name)
    run(first, name, range(2))
    second = student_of(name)
    second.load_state_dict(first.state_dict())
    assert [module.remaining() for module in exchanged(second)] == [0.5]
    assert run(second, name, range(2, 5)) == run(first, name, range(2, 5))
