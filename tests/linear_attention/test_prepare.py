"""What the passes of linear attention exchange, what they refuse and why, and what the student then computes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.errors import CaptureError, OptionError, PreparationError
from fxopt.passes import LinearAttention, RepBatchNorm, SimplifiedLinearAttention
from fxopt.passes.linear_attention.module import LinearisedModule
from tests.linear_attention.models import (
    CHANNELS,
    HEADS,
    TOKENS,
    Biased,
    Called,
    Capped,
    Causal,
    Heads,
    Mixer,
    Negative,
    Returning,
    Windowed,
    Written,
    inputs,
    mixer,
)

DOUBLE = torch.float64


def prepared(kind: type[Heads], chosen: fxopt.Pass, tokens: int = TOKENS) -> nn.Module:
    return fxopt.prepare(mixer(kind), (inputs(1, tokens=tokens)[0],), passes=[chosen])


def layers(student: nn.Module) -> list[LinearisedModule]:
    return [module for module in student.modules() if isinstance(module, LinearisedModule)]


def by_formula(layer: LinearisedModule, x: Tensor, *, causal: bool = False, keep: Tensor | None = None) -> Tensor:
    """What the module should compute, from the formula."""
    batch, tokens, _ = x.shape
    qkv, proj = layer.get_submodule("qkv"), layer.get_submodule("proj")
    q, k, v = qkv(x).reshape(batch, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
    state = dict(layer.named_parameters())
    k = k + state["key_positions"] if "key_positions" in state else k
    weights = q.relu() @ k.relu().mT
    weights = weights.tril() if causal else weights
    weights = weights if keep is None else weights * keep[:, None, None, :]
    out = weights @ v / (weights.sum(-1, keepdim=True) + 1e-6)
    if "depthwise_weight" in state:
        filters = state["depthwise_weight"]
        grid = v.mT.reshape(batch * HEADS, -1, 3, 3)
        near = nn.functional.conv2d(
            grid, filters[:, None], state["depthwise_bias"], padding=filters.shape[-1] // 2, groups=len(filters)
        )
        out = out + near.reshape(batch, HEADS, -1, tokens).mT
    y: Tensor = proj(out.transpose(1, 2).reshape(batch, tokens, -1))
    return y


def assert_exact(actual: Tensor, expected: Tensor) -> None:
    difference, size = (actual - expected).detach().abs().max(), expected.detach().abs().max()
    assert float(difference) <= 1e-12 * float(size)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", [Written, Called])
def test_the_simplified_attention_is_the_formula(kind: type[Heads], training: bool) -> None:
    student = prepared(kind, SimplifiedLinearAttention()).double().train(training)
    x = inputs(1, batch=7)[0].double()
    for layer in layers(student):
        for parameter in layer.parameters():
            nn.init.normal_(parameter, 0, 0.5)
        assert_exact(layer(x, None), by_formula(layer, x))
    assert len(layers(student)) == 2


def test_causal_attention_of_any_length_is_the_masked_formula() -> None:
    student = prepared(Causal, LinearAttention()).double()
    for x in (*inputs(1, batch=3), *inputs(1, batch=2, tokens=150)):
        for layer in layers(student):
            assert_exact(layer(x.double(), None), by_formula(layer, x.double(), causal=True))


def test_a_mask_of_padded_keys_is_kept() -> None:
    (x,) = inputs(1)
    keep = torch.arange(TOKENS) < torch.tensor([[9], [4], [7], [1]])
    student = fxopt.prepare(mixer(Called), (x, keep), passes=[LinearAttention()]).double()
    for layer in layers(student):
        assert_exact(layer(x.double(), keep), by_formula(layer, x.double(), keep=keep))


def test_dropping_a_bias_is_said() -> None:
    student = prepared(Biased, SimplifiedLinearAttention(drop="bias"))
    sites = [site for site in fxopt.prepared(student).report.sites if site.kind == "attention"]
    assert [site.status for site in sites] == ["rewritten", "rewritten"]
    assert all("without its bias" in site.reason for site in sites)
    (x,) = inputs(1)
    assert_exact(layers(student.double())[0](x.double(), None), by_formula(layers(student)[0], x.double()))


REFUSED = {
    "no grid": (Written, SimplifiedLinearAttention(), 8, "8 tokens are not a square grid"),
    "a class token": (Written, SimplifiedLinearAttention(), 10, "class_tokens=1"),
    "a wrong class token": (Written, SimplifiedLinearAttention(class_tokens=1), 9, "9 tokens are not a square grid"),
    "causal": (Causal, SimplifiedLinearAttention(), 9, "it is causal"),
    "a bias": (Biased, SimplifiedLinearAttention(), 9, "drop='bias' leaves it out"),
    "a bias, other drop": (Biased, LinearAttention(drop="mask"), 9, "drop='bias' leaves it out"),
    "a cap": (Capped, LinearAttention(), 9, "not a positive multiple of q·k"),
    "a negative scale": (Negative, LinearAttention(), 9, "not a positive multiple of q·k"),
    "a window": (Windowed, LinearAttention(), 9, "neither causal nor one of keys; drop='mask'"),
    "returned weights": (Returning, LinearAttention(), 9, "its weights are returned or read elsewhere"),
}


@pytest.mark.parametrize(("kind", "chosen", "tokens", "reason"), REFUSED.values(), ids=REFUSED)
def test_refusals_say_why(kind: type[Heads], chosen: fxopt.Pass, tokens: int, reason: str) -> None:
    with pytest.raises(PreparationError, match=r"found nothing to exchange") as error:
        prepared(kind, chosen, tokens)
    assert reason in str(error.value)


def test_padding_is_refused_on_a_grid() -> None:
    (x,) = inputs(1)
    with pytest.raises(PreparationError, match="it has a mask of padded keys"):
        fxopt.prepare(mixer(Called), (x, torch.ones(4, TOKENS).bool()), passes=[SimplifiedLinearAttention()])


def test_a_window_of_keys_can_be_given_up() -> None:
    student = prepared(Windowed, LinearAttention(drop="mask"))
    (x,) = inputs(1)
    assert_exact(layers(student.double())[0](x.double(), None), by_formula(layers(student)[0], x.double()))


def test_the_model_itself_is_refused() -> None:
    with pytest.raises(PreparationError, match="the model itself computes the attention"):
        fxopt.prepare(Written(), (inputs(1)[0],), passes=[LinearAttention()])


def test_hooks_would_be_lost() -> None:
    model = mixer()
    for layer in model.layers:
        layer.get_submodule("proj").register_forward_hook(lambda module, args, out: out)
    with pytest.raises(PreparationError, match="proj has forward hooks"):
        fxopt.prepare(model, (inputs(1)[0],), passes=[LinearAttention()])


@pytest.mark.parametrize(("options", "reason"), [
    ({"kernel": 4}, "odd"), ({"kernel": 0}, "odd"), ({"class_tokens": -1}, "class_tokens"), ({"steps": -1}, "steps"),
    ({"eps": 0.0}, "eps"), ({"drop": "scale"}, "what can be given up"),
    ({"kernel": 5.0}, "kernel=5.0 is not possible; give an odd side"), ({"kernel": True}, "kernel=True"),
    ({"class_tokens": 1.0}, "class_tokens=1.0"), ({"steps": 1e4}, r"steps=10000.0 .* a whole number"),
    ({"steps": None}, "steps=None"), ({"warmup": "1"}, "warmup='1'"), ({"warmup": True}, "warmup=True"),
    ({"eps": "1e-6"}, "eps='1e-6'"), ({"eps": float("nan")}, "eps=nan"), ({"eps": float("inf")}, "eps=inf"),
    ({"select": 3}, "select=3 is not possible; give one name"), ({"select": None}, "select=None"),
    ({"drop": None}, "drop=None"), ({"drop": ("bias", 1)}, "drop="),
])  # fmt: skip
def test_options_out_of_range(options: dict[str, object], reason: str) -> None:
    with pytest.raises(OptionError, match=reason):
        SimplifiedLinearAttention(**options)  # type: ignore[arg-type]
    if not {"kernel", "class_tokens"} & options.keys():
        with pytest.raises(OptionError, match=reason):
            LinearAttention(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["linear-attention", "simplified-linear-attention"])
def test_they_are_for_prepare_only(name: str) -> None:
    with pytest.raises(OptionError, match="trainable pass"):
        fxopt.rewrite(mixer(), (inputs(1)[0],), passes=[name])


def test_names_stay_and_new_ones_are_clear() -> None:
    model = mixer()
    before, state = set(model.state_dict()), copy.deepcopy(model.state_dict())
    student = fxopt.prepare(model, (inputs(1)[0],), passes=[SimplifiedLinearAttention(kernel=3, select="layers.0")])
    assert type(student) is Mixer
    new = {f"layers.0.{name}" for name in ("key_positions", "depthwise_weight", "depthwise_bias")}
    assert set(student.state_dict()) == before | new
    assert student.get_parameter("layers.0.depthwise_weight").shape == (CHANNELS // HEADS, 3, 3)
    assert torch.equal(student.get_parameter("layers.0.key_positions"), torch.zeros(HEADS, TOKENS, CHANNELS // HEADS))
    assert isinstance(student.get_submodule("layers.1"), Written) and isinstance(model.layers[0], Written)
    for name, value in state.items():
        assert torch.equal(student.state_dict()[name], value)
    student.load_state_dict(student.state_dict())


def test_a_pattern_that_fits_nothing_is_an_error() -> None:
    with pytest.raises(OptionError, match=r"fits no attention; they are in: layers\.0, layers\.1"):
        prepared(Written, LinearAttention(select="encoder.*"))


def test_class_tokens_attend_and_are_not_convolved() -> None:
    student = prepared(Written, SimplifiedLinearAttention(class_tokens=1), tokens=10)
    layer = layers(student)[0]
    (x,) = inputs(1, tokens=10)
    before = layer(x, None)
    with torch.no_grad():
        layer.get_parameter("depthwise_bias").add_(1.0)
    moved = (layer(x, None) - before).abs().amax(-1)
    assert float(moved[:, 0].detach().max()) == 0.0 and float(moved[:, 1:].detach().min()) > 0.0


def test_other_arguments_than_captured_are_an_error() -> None:
    student = prepared(Called, SimplifiedLinearAttention())
    with pytest.raises(CaptureError, match="prepare the model with example arguments"):
        student(inputs(1, tokens=16)[0])
    with pytest.raises(CaptureError, match="prepare the model with example arguments"):
        student(inputs(1)[0], torch.ones(4, TOKENS).bool())


def test_norms_inside_an_exchanged_module_are_kept() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.mixing = nn.LayerNorm(CHANNELS), Written()

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.mixing.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            y: Tensor = self.mixing.proj(self.mixing.mix(q, k, v, None).transpose(1, 2).flatten(2))
            return y

    torch.manual_seed(0)
    model = nn.Sequential(Whole(), nn.LayerNorm(CHANNELS))
    passes: list[fxopt.Pass] = [LinearAttention(), RepBatchNorm(steps=2)]
    report = fxopt.prepared(fxopt.prepare(model, (inputs(1)[0],), passes=passes)).report
    kept = [site for site in report.sites if site.kind == "norm" and site.status == "kept"]
    assert len(kept) == 1 and "a part of the graph that runs in the place of 0" in kept[0].reason
    first = fxopt.prepare(model, (inputs(1)[0],), passes=passes[::-1])
    kept = [site for site in fxopt.prepared(first).report.sites if site.kind == "attention"]
    assert "exchanged already" in kept[0].reason


class Encoder(nn.Module):
    """PyTorch's own layer, which in evaluation computes softmax attention from the weights where it may."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(CHANNELS, 2, 32, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


def test_an_encoder_layer_of_pytorch_computes_what_it_was_trained_with() -> None:
    (x,) = inputs(1)
    torch.manual_seed(0)
    model = Encoder()
    student = fxopt.prepare(model, (x,), passes=[LinearAttention()])
    trained = student.train()(x)
    student.eval()
    torch.testing.assert_close(student(x), trained)
    with torch.no_grad():
        torch.testing.assert_close(student(x), trained)
        assert (model.eval()(x) - trained).abs().max() > 1e-3, "softmax attention is something else"
        torch.testing.assert_close(fxopt.convert(student)(x), trained)


class Normalised(Written):
    """With a norm of its own that gathers running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(CHANNELS)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y: Tensor = self.norm(super().forward(x, mask).transpose(1, 2)).transpose(1, 2)
        return y


class Stepping(Written):
    """With a buffer of the name that schedules count in."""

    step: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("step", torch.ones(CHANNELS))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, mask) * self.step


@pytest.mark.parametrize(("kind", "reason"), [
    (Normalised, "in training it writes buffers of its own"), (Stepping, "it holds 'step', a name"),
])  # fmt: skip
def test_modules_with_state_that_would_be_lost_are_refused(kind: type[Heads], reason: str) -> None:
    with pytest.raises(PreparationError, match=reason):
        fxopt.prepare(mixer(kind), (inputs(1)[0],), passes=[LinearAttention(steps=5)])
