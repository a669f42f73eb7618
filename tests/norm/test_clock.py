"""What moves from step to step follows the optimiser: accumulation, checkpoints, copies, resumed and compiled runs."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import fxopt
from fxopt.passes import RepBatchNorm
from fxopt.rewriter.progressive import Progressive, progressive_modules
from tests.norm.models import SHORT, Encoder, encoder, inputs, optimizer_of, train, trained

# What TorchDynamo says of itself when it traces an autograd.Function.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
both = pytest.mark.parametrize("chosen", SHORT.values(), ids=SHORT)


def student_of(chosen: fxopt.Pass) -> nn.Module:
    return fxopt.prepare(encoder(), (inputs(1)[0],), passes=[chosen]).train()


def steps(model: nn.Module) -> set[int]:
    return {int(module.get_buffer("step")) for module in progressive_modules(model).values()}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal_states(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(value, found[name])] == []


@both
def test_forwards_move_nothing_and_steps_of_the_optimiser_do(chosen: fxopt.Pass) -> None:
    student = student_of(chosen)
    optimizer = optimizer_of(student)
    x, *_ = inputs(1)
    student(x).sum().backward()
    before = {name: value for name, value in state(student).items() if "window" not in name}
    student(x)
    assert_equal_states({name: state(student)[name] for name in before}, before)
    assert steps(student) == {0}
    optimizer.step()
    assert steps(student) == {1}
    assert not torch.equal(state(student)["last.running_" + _moment(chosen)], before["last.running_" + _moment(chosen)])


def _moment(chosen: fxopt.Pass) -> str:
    return "mean" if isinstance(chosen, RepBatchNorm) else "second"


@both
def test_gradient_accumulation_counts_steps(chosen: fxopt.Pass) -> None:
    student = student_of(chosen)
    optimizer = optimizer_of(student)
    for number, x in enumerate(inputs(6), start=1):
        student(x).square().mean().backward()
        if number % 3 == 0:
            optimizer.step()
            optimizer.zero_grad()
    assert steps(student) == {2}


def test_other_optimisers_do_not_count_and_two_count_once() -> None:
    student = student_of(SHORT["rep-batch-norm"])
    elsewhere = optimizer_of(encoder())
    elsewhere.step()
    assert steps(student) == {0}
    clocks = {id(module.clock()) for module in progressive_modules(student).values()}
    with_clocks = torch.optim.SGD([p for p in student.parameters() if id(p) in clocks], lr=0.1)
    without = torch.optim.SGD([p for p in student.parameters() if id(p) not in clocks], lr=0.1)
    with_clocks.step()
    without.step()
    assert steps(student) == {1}


class Holding(torch.optim.Optimizer):
    """An optimiser that has another take its steps, as sharded optimisers do; each is seen by PyTorch's hooks."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner, self.fails = inner, False

    def step(self, closure: Any = None) -> Any:
        if self.fails:
            raise RuntimeError("on purpose")
        self.inner.step()


def test_an_optimiser_inside_of_another_counts_once() -> None:
    student = student_of(SHORT["rep-batch-norm"])
    half = list(student.parameters())[::2]  # the inner one holds only a part, as on one process of several
    outer = Holding(torch.optim.SGD(half, lr=0.1))
    outer.param_groups = [{"params": list(student.parameters()), "lr": 0.1}]
    outer.step()
    assert steps(student) == {1}
    outer.fails = True
    with pytest.raises(RuntimeError, match="on purpose"):
        outer.step()
    assert steps(student) == {1}
    outer.inner.step()
    outer.fails = False
    outer.step()
    assert max(steps(student)) == 3


def test_a_step_that_a_scaler_skips_does_not_count() -> None:
    student = student_of(SHORT["rep-batch-norm"])
    optimizer = optimizer_of(student)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for factor, count in ((torch.inf, 0), (1.0, 1)):
        scaler.scale(student(inputs(1)[0]).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert steps(student) == {count}


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_with_infinite_gradients_does_not_count(fused: bool) -> None:
    """A fused optimiser takes the step that the scaler skips, and leaves the parameters alone itself."""
    student = student_of(SHORT["rep-batch-norm"])
    optimizer = torch.optim.AdamW(student.parameters(), fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for x, factor in zip(inputs(3), (1.0, math.inf, 1.0), strict=True):
        scaler.scale(student(x).square().mean() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert steps(student) == {2}


def test_a_loop_without_an_optimiser_says_when_a_step_was_taken() -> None:
    student = student_of(SHORT["rep-batch-norm"])
    fxopt.advance(student)
    assert steps(student) == {1}
    with pytest.raises(fxopt.FxoptError, match=r"does not come from fxopt\.prepare"):
        fxopt.advance(encoder())


def test_a_copy_follows_its_own_optimiser() -> None:
    student = student_of(SHORT["rep-batch-norm"])
    copied = copy.deepcopy(student)
    train(copied, optimizer_of(copied), inputs(2))
    assert (steps(student), steps(copied)) == ({0}, {2})


def test_a_saved_module_follows_its_own_optimiser() -> None:
    file = io.BytesIO()
    torch.save(trained(SHORT["rep-batch-norm"], 2), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    train(loaded, optimizer_of(loaded), inputs(1))
    assert steps(loaded) == {3}


class Checkpointed(Encoder):
    """Blocks whose activations are computed again in the backward pass."""

    reentrant = False

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant) if self.training else block(x)
        y: Tensor = self.last(x)
        return y


@both
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_activation_checkpoints_change_nothing(chosen: fxopt.Pass, reentrant: bool, masked: bool) -> None:
    plain = student_of(chosen)
    model = Checkpointed()
    model.reentrant = reentrant
    model.load_state_dict(encoder().state_dict())
    student = fxopt.prepare(model.eval(), (inputs(1)[0],), passes=[chosen]).train()
    mask = torch.arange(5) < torch.tensor([5, 3, 1, 2])[:, None] if masked else None
    losses = []
    for candidate in (plain, student):
        optimizer = optimizer_of(candidate)
        losses.append([_step(candidate, optimizer, x, mask) for x in inputs(7)])
    assert losses[0] == losses[1]
    assert_equal_states(state(student), state(plain))


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, mask: Tensor | None) -> float:
    loss: Tensor = (model(x.clone().requires_grad_(), mask) - x.cos()).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


@both
@pytest.mark.parametrize("cut", [1, 3, 5])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(chosen: fxopt.Pass, cut: int) -> None:
    batches = inputs(9)
    whole = student_of(chosen)
    losses = train(whole, optimizer_of(whole), batches)

    first = student_of(chosen)
    optimizer = optimizer_of(first)
    begun = train(first, optimizer, batches[:cut])
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file)

    resumed = student_of(chosen)
    resumed.load_state_dict(saved["model"])
    optimizer = optimizer_of(resumed)
    optimizer.load_state_dict(saved["optimizer"])
    assert begun + train(resumed, optimizer, batches[cut:]) == losses
    assert_equal_states(state(resumed), state(whole))


@both
def test_compiled_training_is_one_graph_and_gives_what_eager_gives(chosen: fxopt.Pass) -> None:
    batches = inputs(7)
    eager, student = student_of(chosen).double(), student_of(chosen).double()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(student, fullgraph=True, backend=counter)
    mask = torch.arange(5) < torch.tensor([5, 3, 1, 2])[:, None]
    optimizers = optimizer_of(eager), optimizer_of(student)
    for x in batches:
        wide = x.double()
        losses = [_step(m, o, wide, mask) for m, o in zip((eager, compiled), optimizers, strict=True)]  # type: ignore[arg-type]
        assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    # The hook that reads the mask is a frame of its own, without operations.
    assert len([graph for graph in counter.graphs if len(graph.graph.nodes)]) == 1
    for name, value in state(eager).items():
        torch.testing.assert_close(state(student)[name], value, rtol=1e-9, atol=1e-9)


def test_a_compiled_step_of_the_optimiser_counts() -> None:
    student = student_of(SHORT["rep-batch-norm"])
    optimizer = optimizer_of(student)
    torch._dynamo.reset()
    step = torch.compile(optimizer.step, backend="eager")
    for x in inputs(3):
        student(x).square().mean().backward()
        step()
        optimizer.zero_grad()
    assert steps(student) == {3}


@both
def test_a_student_can_be_exported(chosen: fxopt.Pass) -> None:
    student = trained(chosen).eval()
    (x,) = inputs(1, seed=5)
    exported = torch.export.export(student, (x,)).module()
    torch.testing.assert_close(exported(x), student(x))


@both
def test_the_state_dict_goes_into_another_student_and_without_new_names_into_the_model(chosen: fxopt.Pass) -> None:
    student = trained(chosen)
    other = student_of(chosen)
    other.load_state_dict(student.state_dict())
    (x,) = inputs(1, seed=5)
    assert torch.equal(other.eval()(x), student.eval()(x))
    model = encoder()
    missing, _ = model.load_state_dict(student.state_dict(), strict=False)
    assert missing == []


def test_modules_say_what_they_lack() -> None:
    calls: list[Any] = [Progressive().clock, Progressive().advance, Progressive().remaining, Progressive().converted]
    for call in calls:
        with pytest.raises(NotImplementedError):
            call()


def frozen(model: nn.Module, *names: str) -> nn.Module:
    """With all parameters frozen whose names hold one of ``names``."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in names))
    return model


@both
@pytest.mark.parametrize("when", ["before", "after"])
def test_norms_with_frozen_weights_follow_what_is_trained(chosen: fxopt.Pass, when: str) -> None:
    student = student_of(chosen) if when == "after" else None
    names = ("norm", "root", "last")
    if student is None:
        student = fxopt.prepare(frozen(encoder(), *names), (inputs(1)[0],), passes=[chosen]).train()
    else:
        frozen(student, *names)
    for copied in (student, copy.deepcopy(student)):
        optimizer = torch.optim.AdamW([p for p in copied.parameters() if p.requires_grad], lr=1e-2)
        train(copied, optimizer, inputs(3))
        assert steps(copied) == {3}
    assert not any(module.untouched() for module in progressive_modules(student).values())


def test_a_frozen_norm_counts_the_steps_of_one_optimiser_of_several() -> None:
    student = frozen(student_of(SHORT["unified-norm"]), "norm", "root", "last")
    trained_ones = [p for p in student.parameters() if p.requires_grad]
    halves = [torch.optim.SGD(trained_ones[::2], lr=0.1), torch.optim.SGD(trained_ones[1::2], lr=0.1)]
    for optimizer in halves:
        optimizer.step()
    assert steps(student) == {1}


def test_a_student_without_anything_to_train_follows_an_optimiser_that_holds_it() -> None:
    student = student_of(SHORT["unified-norm"]).requires_grad_(False)
    torch.optim.SGD(student.parameters(), lr=0.1).step()
    assert steps(student) == {1}
