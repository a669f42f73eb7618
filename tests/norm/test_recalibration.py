"""Statistics from the data that `fxopt.convert` is given, and what it says of data that does not do."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.errors import FxoptWarning, MaskError, OptionError, PreparationError
from fxopt.passes import RepBatchNorm, UnifiedNorm
from fxopt.passes.norm.rep_module import RepNorm
from fxopt.passes.norm.unified_module import UnifiedNormalisation
from fxopt.rewriter.progressive import progressive_modules
from tests.norm.models import CHANNELS, SHORT, encoder, inputs, train, trained

both = pytest.mark.parametrize("chosen", SHORT.values(), ids=SHORT)


def first_norm(student: nn.Module) -> nn.Module:
    return student.get_submodule("blocks.0.norm")


@pytest.mark.parametrize("masked", [False, True])
def test_recalibrated_statistics_are_those_of_all_tokens_together(masked: bool) -> None:
    student = trained(SHORT["rep-batch-norm"]).double()
    data = [x.double() for x in (*inputs(3, seed=8), *inputs(1, seed=9, batch=2, length=11))]
    masks = [torch.rand(x.shape[:2]) > 0.3 for x in data]
    calls: list[Any] = [{"x": x, "attention_mask": m} for x, m in zip(data, masks, strict=True)] if masked else data
    _, statistics = recalibrated(student, calls)
    tokens = torch.cat([x[m] if masked else x.flatten(0, 1) for x, m in zip(data, masks, strict=True)])
    torch.testing.assert_close(statistics["running_mean"], tokens.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(statistics["running_var"], tokens.var(0, correction=0), rtol=1e-12, atol=1e-12)


def recalibrated(student: nn.Module, data: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """The converted model, and the statistics that its first norm was made from."""
    seen: dict[str, Tensor] = {}
    keep = RepNorm.keep

    def remember(norm: RepNorm, found: Any) -> None:
        keep(norm, found)
        if not seen:
            seen.update({name: getattr(norm, name).clone() for name in ("running_mean", "running_var")})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RepNorm, "keep", remember)
        fast = fxopt.convert(student, data)
    return fast, seen


def test_norms_behind_others_see_what_training_would_show_them() -> None:
    student = trained(SHORT["rep-batch-norm"]).double()
    x = inputs(1, seed=8)[0].double()
    fast = fxopt.convert(student, [x])
    for module in student.modules():
        if isinstance(module, RepNorm):
            module.step.fill_(10**6)
    # With the schedule over, training normalises by the batch, which is all there is to gather from.
    torch.testing.assert_close(fast(x), student.train()(x), rtol=1e-9, atol=1e-9)


def test_unified_norms_gather_second_moments() -> None:
    student = trained(SHORT["unified-norm"]).double()
    x = inputs(1, seed=8)[0].double()
    norm = first_norm(student)
    assert isinstance(norm, UnifiedNormalisation)
    fast = fxopt.convert(student, [x])
    expected = norm.clock() / (x.square().mean((0, 1)) + 1e-5).sqrt()
    torch.testing.assert_close(fast.state_dict()["blocks.0.norm.weight"], expected.detach(), rtol=1e-12, atol=0)


def test_no_more_batches_are_taken_than_wanted() -> None:
    taken = []

    def batches() -> Iterator[Tensor]:
        for x in inputs(10, seed=4):
            taken.append(x)
            yield x

    fxopt.convert(trained(RepBatchNorm(steps=4, recalibrate=3)), batches())
    assert len(taken) == 3


def test_no_data_at_all_is_an_error() -> None:
    with pytest.raises(PreparationError, match="data is empty"):
        fxopt.convert(trained(SHORT["rep-batch-norm"]), [])


@pytest.mark.parametrize("data", [inputs(1)[0], {"x": inputs(1)[0]}, "x"], ids=["tensor", "dict", "text"])
def test_data_that_is_a_call_itself_is_an_error(data: Any) -> None:
    with pytest.raises(OptionError, match=r"would be taken for calls; give data=\[…\]"):
        fxopt.convert(trained(SHORT["rep-batch-norm"]), data)


@both
def test_statistics_that_never_moved_are_said_unless_data_moves_them(chosen: fxopt.Pass) -> None:
    student = trained(chosen, steps=0)
    for module in progressive_modules(student).values():
        module.get_buffer("step").fill_(10**6)  # the schedule alone is over
    with pytest.warns(FxoptWarning, match=r"blocks\.0\.norm, blocks\.0\.root, .*: the statistics are still those"):
        fxopt.convert(student)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fxopt.convert(student, inputs(1))
        fxopt.convert(trained(chosen))


def test_norms_that_an_optimiser_without_them_left_alone_are_said() -> None:
    student = fxopt.prepare(encoder(), (inputs(1)[0],), passes=[RepBatchNorm(steps=0)]).train()
    train(student, torch.optim.SGD(student.get_submodule("blocks.0.up").parameters(), lr=0.1), inputs(3))
    with pytest.warns(FxoptWarning, match="or call fxopt.advance after each step"):
        fxopt.convert(student)


def test_data_that_counts_no_token_leaves_statistics_untouched_and_is_said() -> None:
    student = fxopt.prepare(encoder(), (inputs(1)[0],), passes=[UnifiedNorm()])
    none = torch.zeros(4, 5, dtype=torch.bool)
    with pytest.warns(FxoptWarning, match="the statistics are still those"):
        fxopt.convert(student, [(inputs(1)[0], none)])


class WithLabels(nn.Module):
    """Takes one argument; the usual loader yields labels beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(self.norm(x))
        return y


def test_labels_beside_inputs_are_an_error_that_names_the_batch() -> None:
    x = inputs(1)[0]
    student = fxopt.prepare(WithLabels(), (x,), passes=[RepBatchNorm(steps=0)])
    data = [x, (x, torch.zeros(4, dtype=torch.long))]
    with pytest.raises(
        OptionError, match=r"batch 1 of data does not fit the model's forward\(x\): too many positional"
    ):
        fxopt.convert(student, data)
    with pytest.raises(OptionError, match=r"data=\(inputs for inputs, labels in loader\)"):
        fxopt.convert(student, [{"inputs": x}])


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (torch.tensor([0, 3, 1, 2]), r"one number for each of 4 samples, as labels are"),
        (torch.arange(20).view(4, 5) - 1, "the mask holds negative numbers, as labels do"),
    ],
    ids=["of samples", "of tokens"],
)
def test_labels_are_not_taken_for_a_mask(labels: Tensor, reason: str) -> None:
    student = trained(SHORT["rep-batch-norm"])
    with pytest.raises(MaskError, match=reason):
        fxopt.convert(student, [(inputs(1)[0], labels)])


def test_a_mask_of_whole_samples_is_one() -> None:
    student = trained(SHORT["rep-batch-norm"]).double()
    x = inputs(1, seed=8)[0].double()
    _, statistics = recalibrated(student, [(x, torch.tensor([True, False, True, True]))])
    torch.testing.assert_close(statistics["running_mean"], x[[0, 2, 3]].mean((0, 1)), rtol=1e-12, atol=1e-12)


def test_data_that_can_not_be_iterated_is_an_error() -> None:
    with pytest.raises(OptionError, match="data=5 is not possible; give an iterable of calls"):
        fxopt.convert(trained(SHORT["rep-batch-norm"]), 5)  # type: ignore[arg-type]


def test_fewer_batches_than_wanted_are_said() -> None:
    with pytest.warns(FxoptWarning, match="data holds 2 batches and recalibrate=10 asks for more"):
        fxopt.convert(trained(RepBatchNorm(steps=4, recalibrate=10)), inputs(2))


@both
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_batch_that_is_not_finite_is_an_error_that_names_it(chosen: fxopt.Pass, value: float) -> None:
    data = inputs(3)
    data[1][2, 3, 4] = value
    with pytest.raises(OptionError, match=r"batch 1 of data gives statistics of blocks\.0\.norm that are not finite"):
        fxopt.convert(trained(chosen), data)
    masks = [torch.ones(4, 5, dtype=torch.bool) for _ in data]
    masks[1][2, 3] = False  # what does not count may be anything
    assert fxopt.convert(trained(chosen), list(zip(data, masks, strict=True)))(inputs(1)[0]).isfinite().all()
