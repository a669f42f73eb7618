"""Students with linear attention: schedules, resumed and compiled training, export, conversion."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import fxopt
from fxopt.errors import FxoptWarning
from fxopt.passes import LinearAttention, RepBatchNorm, SimplifiedLinearAttention
from fxopt.passes.linear_attention.module import LinearisedModule
from tests.linear_attention.models import Causal, Written, inputs, mixer, optimizer_of, train

PASSES: dict[str, fxopt.Pass] = {
    "simplified": SimplifiedLinearAttention(kernel=3, steps=3, warmup=1),
    "sequence": LinearAttention(steps=3),
    "at once": SimplifiedLinearAttention(kernel=3),
}
each = pytest.mark.parametrize("chosen", PASSES.values(), ids=PASSES)


_STUDENTS: dict[tuple[str, int], nn.Module] = {}


def student_of(chosen: fxopt.Pass, seed: int = 0) -> nn.Module:
    """A copy of its own, in training."""
    key = repr(chosen), seed
    if key not in _STUDENTS:
        _STUDENTS[key] = fxopt.prepare(mixer(Written, seed), (inputs(1)[0],), passes=[chosen])
    return copy.deepcopy(_STUDENTS[key]).train()


def layer_of(student: nn.Module) -> LinearisedModule:
    found = student.get_submodule("layers.0")
    assert isinstance(found, LinearisedModule)
    return found


def test_training_starts_as_the_original() -> None:
    model = mixer(Causal).train()
    student = fxopt.prepare(model, (inputs(1)[0],), passes=[LinearAttention(steps=4, warmup=2)])
    (x,) = inputs(1, batch=3)
    torch.testing.assert_close(student(x), model(x))
    assert float((student.eval()(x) - model(x)).detach().abs().max()) > 1e-3


def test_the_share_falls_with_the_steps() -> None:
    student = student_of(PASSES["simplified"])
    shares = [float(layer_of(student).share)]
    optimizer = optimizer_of(student)
    for x in inputs(5):
        train(student, optimizer, [x])
        shares.append(layer_of(student).remaining())
    assert shares == pytest.approx([1, 1, 2 / 3, 1 / 3, 0, 0])


def test_the_blend_is_that_of_both() -> None:
    (x,) = inputs(1)
    student = fxopt.prepare(mixer(Causal), (x,), passes=[LinearAttention(steps=4)])
    layer, original = layer_of(student), mixer(Causal).layers[0]
    linear = layer.eval()(x, None)
    layer.train().step.fill_(1)
    torch.testing.assert_close(layer(x, None), 0.75 * original(x) + 0.25 * linear)


@each
def test_a_resumed_run_is_the_uninterrupted_one(chosen: fxopt.Pass) -> None:
    batches = inputs(6)
    whole = student_of(chosen)
    losses = train(whole, optimizer_of(whole), batches)
    first = student_of(chosen)
    optimizer = optimizer_of(first)
    before = train(first, optimizer, batches[:3])
    saved = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, saved)
    saved.seek(0)
    loaded = torch.load(saved)
    second = student_of(chosen, seed=9)
    second.load_state_dict(loaded["model"])
    optimizer = optimizer_of(second)
    optimizer.load_state_dict(loaded["optimizer"])
    assert before + train(second, optimizer, batches[3:]) == losses
    for name, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], value)


def test_compiled_training_is_one_graph_and_follows_eager() -> None:
    model = mixer(Causal)
    model, batches = model.double(), [x.double() for x in inputs(5)]
    passes = [LinearAttention(steps=3)]
    eager, student = (fxopt.prepare(model, (batches[0],), passes=passes).train() for _ in range(2))
    torch._dynamo.reset()
    compiled = torch.compile(student, fullgraph=True, backend="aot_eager")
    assert train(compiled, optimizer_of(student), batches) == pytest.approx(train(eager, optimizer_of(eager), batches))


def test_the_backend_sees_the_canonical_operator() -> None:
    student = student_of(PASSES["at once"])
    report = fxopt.explain(student, inputs(1, batch=2)[0])
    decided = [decision for decision in report.decisions if "linear_attention" in decision.nodes[0]]
    assert len(decided) == 2 and {decision.chosen for decision in decided} == {"aten"}
    assert all("CUDA" in decision.reason for decision in decided)
    sites = [site for site in report.sites if site.kind == "attention"]
    assert [site.reason for site in sites] == ["canonical fxopt.linear_attention"] * 2


def test_recomputed_activations_change_nothing() -> None:
    student = student_of(LinearAttention())
    (x,) = inputs(1)
    plain = torch.autograd.grad(student.eval()(x).sum(), list(student.parameters()))
    again = torch.utils.checkpoint.checkpoint(student, x, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(again.sum(), list(student.parameters())), plain, strict=True):
        assert torch.equal(a, b)


@each
def test_conversion_is_the_evaluation_and_folds_across(chosen: fxopt.Pass) -> None:
    student = student_of(chosen)
    train(student, optimizer_of(student), inputs(5))
    (x,) = inputs(1, seed=3)
    fast = fxopt.convert(student)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), student.eval()(x))
    attention = [site for site in fast.report.sites if site.kind == "attention"]
    assert [site.reason for site in attention] == ["canonical fxopt.linear_attention"] * 2
    assert all("self.mix(q, k, v, mask)" in site.source.code for site in attention), "the line that was exchanged"
    folded = [site for site in fast.report.sites if site.kind == "norm"]
    assert {site.status for site in folded} == {"rewritten"}
    assert set(student.state_dict()) - set(fast.state_dict()) <= {f"layers.{n}.step" for n in range(2)}


def test_conversion_before_the_schedule_ends_is_said() -> None:
    with pytest.warns(FxoptWarning, match="before its schedule ended"):
        fxopt.convert(student_of(PASSES["simplified"]))


def test_export_keeps_the_operator_and_copies_are_independent() -> None:
    student = student_of(PASSES["at once"]).eval()
    (x,) = inputs(1)
    exported = torch.export.export(student, (x,), strict=False)
    torch.testing.assert_close(exported.module()(x), student(x))
    twin = copy.deepcopy(student)
    with torch.no_grad():
        layer_of(twin).get_parameter("key_positions").add_(1.0)
    assert float((twin(x) - student(x)).detach().abs().max()) > 1e-4


def test_norms_are_exchanged_beside_it_in_one_call() -> None:
    passes: list[fxopt.Pass] = [SimplifiedLinearAttention(kernel=3), RepBatchNorm(steps=2)]
    student = fxopt.prepare(mixer(), (inputs(1)[0],), passes=passes).train()
    train(student, optimizer_of(student), inputs(4))
    fast = fxopt.convert(student, inputs(2))
    assert {site.kind for site in fast.report.sites if site.status == "rewritten"} == {"attention", "norm"}
