"""`fxopt.prepare`: which norms are exchanged, which are kept and why, and what stays as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.errors import OptionError, PreparationError
from fxopt.passes import RepBatchNorm, UnifiedNorm
from fxopt.passes.norm.rep_module import RepNorm
from fxopt.testing import assert_within_budget, oracle
from tests.norm.models import CHANNELS, SHORT, Encoder, One, encoder, inputs, optimizer_of, train

transformers = pytest.importorskip("transformers")
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaRMSNorm  # noqa: E402
from transformers.models.t5.modeling_t5 import T5LayerNorm  # noqa: E402


class ByHand(nn.Module):
    """LayerNorm with parameters of its own names."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.randn(channels)), nn.Parameter(torch.randn(channels))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-6) * self.gamma + self.beta


class Constant(nn.Module):
    """LayerNorm whose bias, or weight too, is a buffer."""

    def __init__(self, channels: int, *, learns: bool) -> None:
        super().__init__()
        weight = torch.randn(channels)
        if learns:
            self.gamma = nn.Parameter(weight)
        else:
            self.register_buffer("gamma", weight)
        self.register_buffer("beta", torch.randn(channels), persistent=learns)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:], self.gamma, self.beta)  # type: ignore[arg-type]


#: Modules of any class, and the parameters that they have.
NORMS: dict[str, Callable[[], nn.Module]] = {
    "LayerNorm": lambda: nn.LayerNorm(CHANNELS),
    "LayerNorm without bias": lambda: nn.LayerNorm(CHANNELS, bias=False),
    "LayerNorm without parameters": lambda: nn.LayerNorm(CHANNELS, elementwise_affine=False),
    "RMSNorm": lambda: nn.RMSNorm(CHANNELS),
    "RMSNorm with eps": lambda: nn.RMSNorm(CHANNELS, eps=1e-3),
    "by hand": lambda: ByHand(CHANNELS),
    "with a constant bias": lambda: Constant(CHANNELS, learns=True),
    "with constants": lambda: Constant(CHANNELS, learns=False),
    "Llama": lambda: LlamaRMSNorm(CHANNELS),
    "T5": lambda: T5LayerNorm(CHANNELS),  # type: ignore[no-untyped-call] # transformers leaves it untyped
    "Gemma": lambda: Gemma2RMSNorm(CHANNELS),
}


def shaken(norm: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(torch.randn_like(parameter))
    return norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", NORMS.values(), ids=NORMS)
def test_a_norm_of_any_class_is_exchanged_and_starts_equal(make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    model = One(shaken(make())).to(dtype).train()
    (x,) = (batch.to(dtype) for batch in inputs(1))
    student = fxopt.prepare(model, (x,), passes=[RepBatchNorm(steps=5)])
    assert isinstance(student.norm, RepNorm)
    assert fxopt.prepared(student).report.count("norm") == 1
    with torch.no_grad():
        assert_within_budget(student.norm(x), model.norm(x), oracle(model.norm, x))
    state = dict(student.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(state[name], parameter), name


@pytest.mark.parametrize("chosen", SHORT.values(), ids=SHORT)
def test_the_students_class_arguments_and_parameter_names_are_the_models(chosen: fxopt.Pass) -> None:
    model = encoder()
    before = copy.deepcopy(model.state_dict())
    student = fxopt.prepare(model, (inputs(1)[0],), passes=[chosen])
    assert type(student) is Encoder
    assert before.keys() <= student.state_dict().keys()
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert not any(p is q for p in model.parameters() for q in student.parameters())


def test_modes_of_submodules_stay() -> None:
    model = encoder().train()
    model.blocks[0].eval()
    student = fxopt.prepare(model, (inputs(1)[0],), passes=[RepBatchNorm(steps=5)])
    assert isinstance(student, Encoder)
    modes = {name: student.get_submodule(name).training for name in ("", "last", "blocks.0.norm")}
    assert modes == {"": True, "last": True, "blocks.0.norm": False}


class Both(nn.Module):
    """A norm called with one more argument."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(CHANNELS))

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return nn.functional.layer_norm(x + residual, (CHANNELS,), self.weight)


class Wider(ByHand):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


class Squared(ByHand):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, (CHANNELS,), self.gamma * self.gamma, self.beta)


class Summed(ByHand):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, (CHANNELS,), self.gamma + self.beta)


class Holds(ByHand):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.register_buffer("seen", torch.zeros(channels))


class Twice(One):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(super().forward(x))
        return y


class Residual(One):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(self.norm(x, x))
        return y


def hooked(kind: str) -> nn.Module:
    norm = nn.LayerNorm(CHANNELS)
    getattr(norm, f"register_{kind}_hook")(lambda module, *found: None)
    return norm


REFUSED: dict[str, tuple[nn.Module, str]] = {
    "tied": (Twice(nn.LayerNorm(CHANNELS)), "it is called 2 times in one forward"),
    "two arguments": (Residual(Both()), "it is called with more than one positional argument"),
    "more than a norm": (One(Wider(CHANNELS)), "its forward does more than normalise its input"),
    "a computed weight": (One(Squared(CHANNELS)), "its weight or bias is computed from its parameters"),
    "a sum of weights": (One(Summed(CHANNELS)), "its weight or bias is computed from its parameters"),
    "further state": (One(Holds(CHANNELS)), "it holds seen, which its norm does not read"),
    "two axes": (One(nn.LayerNorm((5, CHANNELS))), "it normalises over 2 axes together"),
    "hooks": (One(hooked("forward")), "it has hooks, which would be lost"),
    "hooks of gradients": (One(hooked("full_backward")), "it has hooks, which would be lost"),
    "another norm": (One(nn.BatchNorm1d(5)), "it is not a LayerNorm or RMSNorm over the last axis"),
}


@pytest.mark.parametrize(("model", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_norm_that_can_not_be_exchanged_is_kept_with_the_reason(model: nn.Module, reason: str) -> None:
    student = fxopt.prepare(Chain(model, One(nn.LayerNorm(CHANNELS))), (inputs(1)[0],), passes=[RepBatchNorm(steps=5)])
    report = fxopt.prepared(student).report
    kept = [site for site in report.sites if site.status == "kept"]
    assert [site.source.module for site in kept] == ["first.norm"]
    assert reason in kept[0].reason
    assert report.count("norm") == 1
    assert type(student.get_submodule("first.norm")) is type(model.norm)


class Either(nn.LayerNorm):
    """A LayerNorm over the last axis or, with the channels first, over the second, as ConvNeXt has both."""

    def __init__(self, first: bool) -> None:
        super().__init__(CHANNELS)
        self.channels_first = first

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, -1)).transpose(1, -1) if self.channels_first else super().forward(x)


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.linear = Either(True), Either(False), nn.Linear(CHANNELS, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(self.last(self.first(x).transpose(1, -1)))
        return y


def test_a_norm_is_not_judged_by_another_of_its_class() -> None:
    student = fxopt.prepare(Images(), (torch.randn(2, CHANNELS, 5, 4),), passes=[RepBatchNorm(steps=5)])
    sites = {site.source.module: site for site in fxopt.prepared(student).report.sites}
    assert {name: site.status for name, site in sites.items()} == {"first": "kept", "last": "rewritten"}
    assert sites["first"].reason == "its forward does more than normalise its input"


class Chain(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x))
        return y


class Functional(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(super().forward(x), (CHANNELS,))


def test_a_norm_without_a_module_is_kept_with_its_line() -> None:
    model = Functional(One(nn.LayerNorm(CHANNELS)), nn.GELU())
    report = fxopt.prepared(fxopt.prepare(model, (inputs(1)[0],), passes=[RepBatchNorm(steps=5)])).report
    (kept,) = [site for site in report.sites if site.status == "kept"]
    assert "computed by a module of its own" in kept.reason
    assert "layer_norm(super().forward(x)" in kept.source.code


@pytest.mark.parametrize("chosen", SHORT.values(), ids=SHORT)
@pytest.mark.parametrize("learns", [True, False])
def test_constants_of_a_norm_keep_their_names_and_values(chosen: fxopt.Pass, learns: bool) -> None:
    model = One(Constant(CHANNELS, learns=learns))
    (x,) = inputs(1)
    student = fxopt.prepare(model, (x,), passes=[chosen]).train()
    assert set(model.state_dict()) <= set(student.state_dict())
    for name in ("gamma", "beta"):
        assert torch.equal(getattr(student.norm, name), getattr(model.norm, name))
    train(student, optimizer_of(student), inputs(6))
    with torch.no_grad():
        torch.testing.assert_close(fxopt.convert(student, [x])(x), fxopt.convert(student, [x], passes=[])(x))


@pytest.mark.parametrize("chosen", SHORT.values(), ids=SHORT)
@pytest.mark.parametrize("select", ["*", "*norm1"])
def test_an_encoder_does_not_compute_exchanged_norms_by_itself(chosen: Any, select: str) -> None:
    """In evaluation without gradients PyTorch's encoder layers run as one kernel, padded batches as nested tensors."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(CHANNELS, 2, 16, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2).double()
    x, *batches = (batch.double() for batch in inputs(7))
    padding = torch.arange(5) >= torch.tensor([5, 4, 3, 5])[:, None]
    student = fxopt.prepare(model, (x,), passes=[replace(chosen, select=select)]).train()
    train(student, optimizer_of(student), batches)
    student.eval()
    expected = student(x), student(x, src_key_padding_mask=padding)
    with torch.no_grad():
        found = student(x), student(x, src_key_padding_mask=padding)
        torch.testing.assert_close(found, expected)
        converted = fxopt.convert(student, passes=["fold-channel-affine"])
        torch.testing.assert_close(converted(x), expected[0])
    assert model.use_nested_tensor


def test_a_norm_held_in_two_places_is_exchanged_in_both() -> None:
    model = Chain(One(nn.LayerNorm(CHANNELS)), nn.Identity())
    model.alias = model.first.norm
    student = fxopt.prepare(model, (inputs(1)[0],), passes=[RepBatchNorm(steps=5)])
    assert isinstance(student.alias, RepNorm)
    assert student.alias is student.get_submodule("first.norm")


def test_select_takes_names_and_patterns() -> None:
    student = fxopt.prepare(encoder(), (inputs(1)[0],), passes=[RepBatchNorm(steps=5, select=("blocks.1.*", "last"))])
    exchanged = [name for name, module in student.named_modules() if isinstance(module, RepNorm)]
    assert exchanged == ["blocks.1.norm", "blocks.1.root", "last"]
    kept = [site for site in fxopt.prepared(student).report.sites if site.status == "kept"]
    assert [site.source.module for site in kept] == ["blocks.0.norm", "blocks.0.root"]
    assert all("leaves it out" in site.reason for site in kept)


def test_two_passes_share_a_model() -> None:
    passes: list[fxopt.Pass] = [RepBatchNorm(steps=5, select="blocks.*"), UnifiedNorm(select="last")]
    student = fxopt.prepare(encoder(), (inputs(1)[0],), passes=passes)
    report = fxopt.prepared(student).report
    assert report.count("norm", "kept") == 0
    assert {site.rule for site in report.sites} == {"rep-batch-norm", "unified-norm"}
    assert [(p.name, p.tier, p.rewrites) for p in report.passes] == [
        ("rep-batch-norm", "trainable", 4), ("unified-norm", "trainable", 1),
    ]  # fmt: skip


def test_a_pattern_that_fits_nothing_is_an_error_that_lists_the_norms() -> None:
    with pytest.raises(OptionError, match=r"'layer\.\*' fits no norm; the norms are: blocks\.0\.norm, blocks\.0\.root"):
        fxopt.prepare(encoder(), (inputs(1)[0],), passes=[RepBatchNorm(steps=5, select="layer.*")])


@pytest.mark.parametrize("model", [nn.Linear(CHANNELS, CHANNELS), nn.LayerNorm(CHANNELS)], ids=["none", "itself"])
def test_nothing_to_exchange_is_an_error_that_says_why(model: nn.Module) -> None:
    reason = "prepare what holds it" if isinstance(model, nn.LayerNorm) else "it has no norm at all"
    with pytest.raises(PreparationError, match=reason):
        fxopt.prepare(model, (inputs(1)[0],), passes=[RepBatchNorm(steps=5)])


def test_llama_is_exchanged_altogether() -> None:
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    ids = torch.randint(0, 32, (2, 7))
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    student = fxopt.prepare(model, (), call, passes=[RepBatchNorm(steps=5, alpha=0.0, start=0.0)])
    report = fxopt.prepared(student).report
    assert (report.count("norm"), report.count("norm", "kept")) == (5, 0)
    with torch.no_grad():
        torch.testing.assert_close(student.train()(**call).logits, model.train()(**call).logits)


def test_the_report_is_like_any_other() -> None:
    report = fxopt.prepared(fxopt.prepare(encoder(), (inputs(1)[0],), passes=[RepBatchNorm(steps=5)])).report
    assert fxopt.Report.from_json(report.to_json()) == report
    assert "trainable    5 rewrites" in str(report)
    assert "LayerNorm -> RepNorm(8, warmup=0, steps=5)" in str(report)


def test_llamas_padding_does_not_count() -> None:
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, use_cache=False,
    )  # fmt: skip
    ids = torch.randint(0, 32, (2, 7))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    model = transformers.LlamaForCausalLM(config)
    student = fxopt.prepare(model, (), {"input_ids": ids, "attention_mask": mask}, passes=[RepBatchNorm(steps=0)])
    first = student.get_submodule("model.layers.0.input_layernorm")
    assert isinstance(first, RepNorm)
    student.train()(input_ids=ids, attention_mask=mask)
    embedded = model.get_input_embeddings()(ids)[mask.bool()]
    torch.testing.assert_close(first.batch_mean, embedded.mean(0).detach())
