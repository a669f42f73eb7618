"""`fxopt.convert`: statistics from data, plain forms, verification, and what the report says."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.errors import FxoptWarning, PassError, PreparationError, VerificationError
from fxopt.passes import RepBatchNorm, UnifiedNorm
from fxopt.passes.norm.channel_affine import ChannelAffine
from fxopt.passes.norm.rep_module import RepNorm
from fxopt.testing import assert_within_budget, oracle
from tests.norm.models import CHANNELS, SHORT, encoder, inputs, optimizer_of, train, trained

both = pytest.mark.parametrize("chosen", SHORT.values(), ids=SHORT)


@both
def test_the_converted_model_is_the_unfolded_student_in_float64(chosen: fxopt.Pass) -> None:
    student = fxopt.prepare(encoder().double(), (inputs(1)[0].double(),), passes=[chosen]).train()
    train(student, optimizer_of(student), [x.double() for x in inputs(8)])
    fast = fxopt.convert(student)
    x = inputs(1, seed=5)[0].double()
    expected = student.eval()(x)
    torch.testing.assert_close(fast(x), expected, rtol=1e-12, atol=1e-12 * float(expected.detach().abs().max()))


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_converted_model_is_as_exact_as_the_student(chosen: fxopt.Pass, dtype: torch.dtype) -> None:
    student = trained(chosen).to(dtype).eval()
    x = inputs(1, seed=5)[0].to(dtype)
    fast = fxopt.convert(student)
    with torch.no_grad():
        assert_within_budget(fast(x), student(x), oracle(student, x))


@both
def test_the_student_stays_as_it_is(chosen: fxopt.Pass) -> None:
    student = trained(chosen)
    before = copy.deepcopy(student.state_dict())
    fxopt.convert(student, inputs(3))
    assert student.training
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    train(student, optimizer_of(student), inputs(1))


def test_names_of_parameters_are_those_of_the_model() -> None:
    fast = fxopt.convert(trained(SHORT["rep-batch-norm"]))
    model = encoder()
    new = {"blocks.0.root.bias", "blocks.1.root.bias"}  # an RMSNorm has no bias, a scale and shift has
    assert set(fast.state_dict()) == {*model.state_dict(), *new}
    for name, parameter in trained(SHORT["rep-batch-norm"]).named_parameters():
        if "norm" not in name and "root" not in name and "last" not in name:
            assert torch.equal(fast.state_dict()[name], parameter)


def test_the_report_says_of_every_exchanged_norm_what_became_of_it() -> None:
    report = fxopt.convert(trained(SHORT["rep-batch-norm"])).report
    norms = [site for site in report.sites if site.kind == "norm"]
    assert {site.source.module for site in norms} == {
        "blocks.0.norm", "blocks.0.root", "blocks.1.norm", "blocks.1.root", "last",
    }  # fmt: skip
    assert all("models.py" in site.source.location for site in norms), "the lines that were exchanged"
    (last,) = [site for site in norms if site.source.module == "last"]
    assert last.status == "kept"  # nothing that it could fold into stands behind it
    assert (
        last.reason == "it stays: before it, aten.add is no linear layer; behind it, it is also a result of the model"
    )


class Written(nn.Module):
    """A norm that is a module between two that are calls."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.layer_norm(self.linear(x), (8,)).relu()
        x = self.linear(self.norm(x)).relu()
        y: Tensor = nn.functional.layer_norm(x, (8,)).relu()
        return y


class Patches(nn.Module):
    """A norm behind a convolution whose result is transposed, as Swin has it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, CHANNELS, 2, 2), nn.LayerNorm(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x).flatten(2).transpose(1, 2))
        return y.relu()


def test_a_folded_norm_is_not_said_to_stay_too() -> None:
    x = torch.randn(2, 3, 8, 8)
    student = fxopt.prepare(Patches(), (x,), passes=[RepBatchNorm(steps=0)])
    (site,) = [site for site in fxopt.convert(student, [x]).report.sites if site.kind == "norm"]
    assert (site.status, site.reason) == ("rewritten", "folded into the linear layer before it")


class Heads(nn.Module):
    """A norm of each head, transposed afterwards, as Qwen has it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(CHANNELS, 2 * CHANNELS), nn.RMSNorm(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.linear(x).unflatten(-1, (2, CHANNELS))).transpose(1, 2)
        return y.relu()


def test_a_norm_that_is_transposed_says_why_it_stays() -> None:
    x = inputs(1)[0]
    student = fxopt.prepare(Heads(), (x,), passes=[RepBatchNorm(steps=0)])
    (site,) = [site for site in fxopt.convert(student, [x]).report.sites if site.kind == "norm"]
    assert (site.status, site.source.module) == ("kept", "norm")
    assert "splits or joins the channels" in site.reason
    assert "aten.relu" in site.reason


def test_norms_that_were_not_exchanged_keep_their_lines() -> None:
    x = torch.randn(3, 8)
    student = fxopt.prepare(Written(), (x,), passes=[RepBatchNorm(steps=0)])
    sites = [site for site in fxopt.convert(student, [x]).report.sites if site.kind == "norm"]
    assert len({site.source.location for site in sites}) == 3


def test_what_was_not_prepared_can_not_be_converted() -> None:
    with pytest.raises(PreparationError, match=r"Encoder does not come from fxopt\.prepare"):
        fxopt.convert(encoder())


def test_a_schedule_that_has_not_ended_is_said() -> None:
    student = trained(RepBatchNorm(steps=20, warmup=2), steps=7)
    with pytest.warns(FxoptWarning, match=r"0\.75 of what it computes in training still"):
        fxopt.convert(student)


def test_a_wrapped_student_is_converted() -> None:
    student = trained(SHORT["rep-batch-norm"])
    x = inputs(1, seed=5)[0]
    for wrapped in (torch.compile(student), nn.DataParallel(student)):
        assert isinstance(wrapped, nn.Module)
        torch.testing.assert_close(fxopt.convert(wrapped)(x), student.eval()(x))
        student.train()


def test_a_form_that_is_not_the_students_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    student = trained(SHORT["rep-batch-norm"])

    def without_alpha(norm: RepNorm) -> ChannelAffine:
        assert norm.alpha is not None
        scale, shift = norm.affine(torch.float64)
        dtype = norm.batch_weight.dtype
        return ChannelAffine((scale - norm.alpha).detach().to(dtype), shift.detach().to(dtype))

    monkeypatch.setattr(RepNorm, "converted", without_alpha)
    with pytest.raises(VerificationError, match="differs from the student in float64"):
        fxopt.convert(student)
    assert fxopt.convert(student, verify=False)(inputs(1)[0]).isfinite().all()


def test_passes_may_be_named_and_fail_strictly() -> None:
    student = trained(SHORT["rep-batch-norm"])
    report = fxopt.convert(student, passes=["no-ops"]).report
    assert [summary.name for summary in report.passes] == ["no-ops"]
    with pytest.raises(fxopt.FxoptError, match="there is no pass"):
        fxopt.convert(student, passes=["nothing"])

    class Failing:
        name, tier, requires = "failing", "exact", ()

        def run(self, program: fxopt.Program) -> fxopt.PassResult:
            raise RuntimeError("on purpose")

    with pytest.raises(PassError, match="on purpose"):
        fxopt.convert(student, passes=[Failing()], strict=True)  # type: ignore[list-item]


def hostile(case: str) -> nn.Module:
    student = trained(SHORT["rep-batch-norm"]).double()
    norm = student.get_submodule("blocks.0.norm")
    assert isinstance(norm, RepNorm)
    assert norm.alpha is not None
    with torch.no_grad():
        if case == "zero variance":
            norm.running_var[2] = 0
        if case == "gamma is 0":
            norm.batch_weight.zero_()
        if case == "a is 0":
            norm.batch_weight.copy_(-norm.alpha * (norm.running_var + 1e-5).sqrt())
        if case == "everything is 0":
            for parameter in (norm.batch_weight, norm.batch_bias, norm.alpha):
                parameter.zero_()
    return student


@pytest.mark.parametrize("case", ["zero variance", "gamma is 0", "a is 0", "everything is 0"])
def test_hostile_statistics_and_parameters_convert_exactly(case: str) -> None:
    student = hostile(case)
    x = inputs(1, seed=5)[0].double()
    fast = fxopt.convert(student)
    expected = student.eval()(x)
    size = float(expected.detach().abs().max())
    torch.testing.assert_close(fast(x), expected, rtol=1e-12, atol=1e-12 * size)


class Decoder(nn.Module):
    """A head that is the embedding, a norm that two layers read and whose result is wanted too, and the next token."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, CHANNELS)
        self.norm, self.last = nn.LayerNorm(CHANNELS), nn.LayerNorm(CHANNELS)
        self.up, self.gate = nn.Linear(CHANNELS, CHANNELS), nn.Linear(CHANNELS, CHANNELS, bias=False)
        self.head = nn.Linear(CHANNELS, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor, features: bool = False) -> Any:
        x = self.table(ids)
        y = self.norm(x)
        logits = self.head(self.last(x + self.up(y) * torch.sigmoid(self.gate(y))))
        return (logits, logits.argmax(-1), y) if features else (logits, logits.argmax(-1))


@both
@pytest.mark.parametrize("features", [False, True])
def test_tied_embeddings_and_norms_read_twice_or_returned(chosen: fxopt.Pass, features: bool) -> None:
    ids = torch.arange(24).view(3, 8) % 11
    torch.manual_seed(0)
    student = fxopt.prepare(Decoder().double(), (ids, features), passes=[chosen]).train()
    optimizer = optimizer_of(student)
    for _ in range(8):
        nn.functional.cross_entropy(student(ids, features)[0].flatten(0, 1), ids.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    fast = fxopt.convert(student, [(ids, features), (ids.flip(0), features)])
    assert torch.equal(fast.state_dict()["head.weight"], student.get_parameter("table.weight"))
    sites = {site.source.module: site for site in fast.report.sites if site.kind == "norm"}
    assert (sites["norm"].status, sites["last"].status) == ("kept" if features else "rewritten", "rewritten")
    assert "2 linear layers" in sites["norm"].reason or "also a result of the model" in sites["norm"].reason
    again = fxopt.convert(student)
    for found, expected in zip(again(ids, features), student.eval()(ids, features), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@both
def test_the_converted_model_goes_through_export_compile_and_state_dict(chosen: fxopt.Pass) -> None:
    fast = fxopt.convert(trained(chosen))
    x = inputs(1, seed=5)[0]
    expected = fast(x)
    exported = torch.export.export(fast, (x,)).module()
    torch.testing.assert_close(exported(x), expected)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(fast, backend="aot_eager", fullgraph=True)(x), expected)
    other = fxopt.convert(fxopt_student_of_other_weights(chosen))
    assert not torch.equal(other(x), expected)
    other.load_state_dict(fast.state_dict())
    torch.testing.assert_close(other(x), expected)


def fxopt_student_of_other_weights(chosen: fxopt.Pass) -> nn.Module:
    student = fxopt.prepare(encoder(seed=4), (inputs(1)[0],), passes=[chosen]).train()
    train(student, optimizer_of(student), inputs(8))
    return student


def test_batches_of_other_sizes_where_they_are_symbolic() -> None:
    batch = torch.export.Dim("batch", min=2, max=64)
    chosen = UnifiedNorm(warmup=1)
    shapes = {"x": {0: batch}}
    student = fxopt.prepare(encoder(), (inputs(1)[0],), passes=[chosen], dynamic_shapes=shapes).train()
    train(student, optimizer_of(student), inputs(3))
    fast = fxopt.convert(student)
    x = inputs(1, batch=7)[0]
    torch.testing.assert_close(fast(x), student.eval()(x))


def test_what_has_no_weight_is_converted_too() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(CHANNELS, elementwise_affine=False)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.norm(x) * 2
            return y

    student = fxopt.prepare(Plain(), (inputs(1)[0],), passes=[RepBatchNorm(steps=1)]).train()
    train(student, optimizer_of(student), inputs(3))
    x = inputs(1, seed=5)[0]
    torch.testing.assert_close(fxopt.convert(student)(x), student.eval()(x))


def test_the_report_notes_that_names_mean_something_else() -> None:
    fast = fxopt.convert(trained(SHORT["rep-batch-norm"]))
    (note,) = [note for note in fast.report.notes if "state_dict" in note]
    assert note.startswith("weight and bias of blocks.0.norm, blocks.0.root, blocks.1.norm, blocks.1.root, last are")
