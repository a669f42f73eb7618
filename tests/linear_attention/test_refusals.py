"""Modules whose attention the passes of linear attention can't exchange where it stands, and what they say of each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import fxopt
from fxopt.errors import CaptureError, OptionError, PreparationError
from fxopt.passes import LinearAttention, SimplifiedLinearAttention
from fxopt.passes.linear_attention.module import LinearisedModule
from tests.linear_attention.models import (
    CHANNELS,
    HEADS,
    TOKENS,
    Called,
    Heads,
    Written,
    inputs,
    mixer,
    optimizer_of,
    train,
)


class Crossed(Heads):
    """Attends to twice as many keys as there are queries."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return scaled_dot_product_attention(q, torch.cat((k, k), 2), torch.cat((v, v), 2))


class Looking(Heads):
    """Looks at its values in training."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        scale = float(q.abs().max()) if self.training else 1.0
        return scaled_dot_product_attention(q, k, v) * scale


class Bypassed(Heads):
    """Computes no attention in training."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return v if self.training else scaled_dot_product_attention(q, k, v)


class Capping(Heads):
    """Bounds its scores in training."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        scores = q @ k.mT
        return (scores.tanh() if self.training else scores).softmax(-1) @ v


REFUSED: dict[str, tuple[type[Heads], fxopt.Pass, str]] = {
    "more keys than queries": (Crossed, SimplifiedLinearAttention(), "its 9 queries and 18 keys are not the tokens"),
    "not in training": (Looking, LinearAttention(), "it can't be captured alone: "),
    "none in training": (Bypassed, LinearAttention(), "it computes another attention in training than in evaluation"),
    "another in training": (Capping, LinearAttention(), "it computes another attention in training than in evaluation"),
}


@pytest.mark.parametrize(("kind", "chosen", "reason"), REFUSED.values(), ids=REFUSED)
def test_refusals_say_why(kind: type[Heads], chosen: fxopt.Pass, reason: str) -> None:
    model = mixer(kind)
    modes = [module.training for module in model.modules()]
    with pytest.raises(PreparationError, match="found nothing to exchange") as error:
        fxopt.prepare(model, (inputs(1)[0],), passes=[chosen])
    assert reason in str(error.value)
    assert [module.training for module in model.modules()] == modes


class Told(Written):
    """Is called with an object that no graph holds."""

    def forward(self, x: Tensor, how: Any = None) -> Tensor:
        return super().forward(x)


class Prompted(Written):
    """Reads what the module around it left there for this call."""

    def __init__(self) -> None:
        super().__init__()
        self.left: list[float] = []

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, mask) * self.left.pop()


class Prompting(nn.Module):
    """Leaves something for each call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Prompted()

    def forward(self, x: Tensor) -> Tensor:
        self.layer.left.append(2.0)
        y: Tensor = self.layer(x)
        return y


class Core(nn.Module):
    """Attention alone, without parameters."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v)


class Around(nn.Module):
    """Projections around an attention that is a module of its own, and what else it is called with."""

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.qkv, self.core = nn.Linear(CHANNELS, 3 * CHANNELS), core

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        y: Tensor = self.core(q, k, v).transpose(1, 2).flatten(2)
        return y


class Several(nn.Module):
    """One attention for sequences of two lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Called()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x) + self.layer(x[:, :4]).mean(1, keepdim=True)
        return y


class Passing(nn.Module):
    """Calls an attention with an object."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Told()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x, how=object())
        return y


def refusal(model: nn.Module, chosen: fxopt.Pass) -> str:
    with pytest.raises(PreparationError) as error:
        fxopt.prepare(model, (inputs(1)[0],), passes=[chosen])
    return str(error.value)


def test_an_object_in_the_call_is_refused() -> None:
    assert "it is called with a object, which a graph can't hold" in refusal(Passing(), LinearAttention())


def test_arguments_of_several_kinds_are_refused() -> None:
    assert "it is called with arguments of several kinds in one forward" in refusal(Several(), LinearAttention())


def test_what_needs_the_module_around_it_is_refused() -> None:
    assert "it can't be captured alone: " in refusal(Prompting(), LinearAttention())


class Frozen(nn.Module):
    """Attention whose weights are no parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qkv", torch.randn(3 * CHANNELS, CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        packed = nn.functional.linear(x, self.get_buffer("qkv")).unflatten(-1, (3, HEADS, -1))
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
        return scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def test_without_a_parameter_there_is_no_schedule() -> None:
    model = nn.Sequential(Frozen(), nn.Linear(CHANNELS, CHANNELS))
    assert "it holds no parameter whose optimiser could drive" in refusal(model, LinearAttention(steps=3))
    student = fxopt.prepare(model, (inputs(1)[0],), passes=[LinearAttention()])
    layer = student.get_submodule("0")
    assert isinstance(layer, LinearisedModule) and layer.clock().numel() == 0


def test_new_parameters_drive_a_schedule_too() -> None:
    chosen = SimplifiedLinearAttention(kernel=3, steps=2)
    student = fxopt.prepare(Around(Core()), (inputs(1)[0],), passes=[chosen]).train()
    core = student.get_submodule("core")
    assert isinstance(core, LinearisedModule)
    train(student, optimizer_of(student), inputs(1))
    assert core.remaining() == 0.5


def test_what_another_pass_exchanged_stays_as_it_is() -> None:
    passes: list[fxopt.Pass] = [LinearAttention(select="layers.0"), SimplifiedLinearAttention(kernel=3)]
    student = fxopt.prepare(mixer(), (inputs(1)[0],), passes=passes)
    assert "layers.0.key_positions" not in student.state_dict() and "layers.1.key_positions" in student.state_dict()
    sites = [site for site in fxopt.prepared(student).report.sites if site.kind == "attention"]
    assert [(site.rule, site.status) for site in sites] == [
        ("linear-attention", "rewritten"), ("simplified-linear-attention", "rewritten"),
    ]  # fmt: skip
    again: list[fxopt.Pass] = [LinearAttention(), SimplifiedLinearAttention(kernel=3)]
    report = fxopt.prepared(fxopt.prepare(mixer(), (inputs(1)[0],), passes=again)).report
    assert [summary.rewrites for summary in report.passes] == [2, 0]


class Positioned(Written):
    """Has a parameter of the name that a new one would get."""

    def __init__(self) -> None:
        super().__init__()
        self.key_positions = nn.Parameter(torch.randn(CHANNELS))
        self.register_buffer("seen", torch.ones(()), persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x + self.key_positions * self.get_buffer("seen"), mask)


def test_names_that_are_taken_and_buffers_stay() -> None:
    model = mixer(Positioned)
    student = fxopt.prepare(model, (inputs(1)[0],), passes=[SimplifiedLinearAttention(kernel=3)])
    assert torch.equal(student.get_parameter("layers.0.key_positions"), model.layers[0].get_parameter("key_positions"))
    assert student.get_parameter("layers.0.linear_key_positions").shape == (HEADS, TOKENS, CHANNELS // HEADS)
    layer = student.get_submodule("layers.0")
    assert "seen" in dict(layer.named_buffers()) and "layers.0.seen" not in student.state_dict()


def test_arguments_of_another_structure_are_an_error() -> None:
    student = fxopt.prepare(mixer(Called), (inputs(1)[0],), passes=[LinearAttention()])
    layer = student.get_submodule("layers.0")
    with pytest.raises(CaptureError, match="was captured for arguments of the structure"):
        layer(x=inputs(1)[0], mask=None)


def test_a_graph_alone_can_not_be_trained() -> None:
    program = fxopt.capture(mixer(), (inputs(1)[0],))
    for chosen in (LinearAttention(), SimplifiedLinearAttention()):
        with pytest.raises(OptionError, match=r"give it to fxopt\.prepare, train, then fxopt\.convert"):
            chosen.run(program)


def test_a_module_says_what_it_became() -> None:
    student = fxopt.prepare(mixer(Called), (inputs(1)[0],), passes=[LinearAttention(steps=4, warmup=2)])
    assert "linear attention, warmup=2, steps=4" in str(student.get_submodule("layers.0"))
    at_once = fxopt.prepare(mixer(Called), (inputs(1)[0],), passes=[LinearAttention()])
    assert "steps" not in str(at_once.get_submodule("layers.0"))
