"""Each call of a model has its own mask of tokens: in checkpoints that compute it again, and not after it."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import fxopt
from fxopt.errors import MaskError
from fxopt.passes import RepBatchNorm, UnifiedNorm
from fxopt.passes.norm.rep_module import RepNorm
from fxopt.passes.norm.running import RunningNorm
from fxopt.rewriter.progressive import progressive_modules
from tests.norm.models import CHANNELS, Block, encoder, inputs

pytestmark = [
    # What TorchDynamo says of itself when it traces an autograd.Function, and a block inside of a model.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    # What checkpoints say of a model that runs without gradients.
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning"),
]
PASSES: dict[str, fxopt.Pass] = {
    "naive": RepBatchNorm(steps=0),
    "rep-batch-norm": RepBatchNorm(steps=4, alpha=None),
    "unified-norm": UnifiedNorm(warmup=1, window=2),
}
both = pytest.mark.parametrize("chosen", PASSES.values(), ids=PASSES)
Run = Callable[[nn.Module, Tensor], Tensor]


def plainly(block: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = block(x)
    return y


def reentrant(block: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = checkpoint(block, x, use_reentrant=True)
    return y


def replayed(block: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = checkpoint(block, x, use_reentrant=False)
    return y


def nested(block: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = checkpoint(lambda z: checkpoint(block, z, use_reentrant=False), x, use_reentrant=False)
    return y


def nested_reentrant(block: nn.Module, x: Tensor) -> Tensor:
    def both_halves(z: Tensor) -> Tensor:
        inner = checkpoint(block, z, use_reentrant=True)
        y: Tensor = checkpoint(block, inner, use_reentrant=True)
        return y

    y: Tensor = checkpoint(both_halves, x, use_reentrant=True)
    return y


def twice(block: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = block(block(x))
    return y


class Encoder(nn.Module):
    """Two blocks, run in some way in training; a method beside the forward, and a result of some kind."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.last = nn.LayerNorm(CHANNELS)
        self.run: Run = plainly
        self.wrap: Callable[[Tensor], Any] | None = None
        self.fails = False

    def encode(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.run(block, x) if self.training else block(x)
        return x

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Any:
        y = self.encode(x)
        if self.fails:
            raise RuntimeError("on purpose")
        return self.last(y) if self.wrap is None else self.wrap(y)


def mask_of(*lengths: int) -> Tensor:
    return torch.arange(5) < torch.tensor(lengths)[:, None]


MASKS = mask_of(5, 3, 1, 2), mask_of(4, 4, 5, 5)


_PREPARED: dict[object, nn.Module] = {}


def student_of(chosen: fxopt.Pass, run: Run = plainly, kind: type[Encoder] | None = None) -> Any:
    if (chosen, kind) not in _PREPARED:
        model = (kind or Encoder)()
        model.load_state_dict(encoder().state_dict())
        args = inputs(1)[0].double(), MASKS[0]
        _PREPARED[chosen, kind] = fxopt.prepare(model.double().eval(), args, passes=[chosen])
    student: Any = copy.deepcopy(_PREPARED[chosen, kind]).train()
    student.run = run
    return student


def leaves(seed: int = 1) -> list[Tensor]:
    return [x.double().requires_grad_() for x in inputs(2, seed=seed)]


def one_loss(student: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    loss: Tensor = (student(x, mask) - x.detach().cos()).square().mean()
    return loss


def both_at_once(student: Any, masks: tuple[Tensor | None, ...] = MASKS) -> None:
    a, b = (one_loss(student, x, mask) for x, mask in zip(leaves(), masks, strict=True))
    (a + b).backward()


def both_the_first_first(student: Any) -> None:
    a, b = (one_loss(student, x, mask) for x, mask in zip(leaves(), MASKS, strict=True))
    a.backward()
    b.backward()


def only_the_first_has_a_mask(student: Any) -> None:
    both_at_once(student, (MASKS[0], None))


def only_the_second_has_a_mask(student: Any) -> None:
    both_at_once(student, (None, MASKS[0]))


def with_another_without_gradients(student: Any) -> None:
    x, other = leaves()
    loss = one_loss(student, x, MASKS[0])
    with torch.no_grad():
        student(other, MASKS[1])
    loss.backward()


def with_another_method(student: Any) -> None:
    x, other = leaves()
    loss = one_loss(student, x, MASKS[0])
    (loss + student.encode(other).square().mean()).backward()


LOOPS: list[Callable[[Any], None]] = [
    both_at_once, both_the_first_first, only_the_first_has_a_mask, only_the_second_has_a_mask,
    with_another_without_gradients, with_another_method,
]  # fmt: skip


def after_two_steps(student: Any, loop: Callable[[Any], None]) -> Iterator[tuple[str, Tensor]]:
    """The gradients of each step, and the state in the end."""
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        loop(student)
        for name, parameter in student.named_parameters():
            if parameter.grad is not None:
                yield f"step {step}: {name}", parameter.grad.clone()
        optimizer.step()
    yield from student.state_dict().items()


def differing(a: Any, b: Any, loop: Callable[[Any], None]) -> list[str]:
    found, expected = dict(after_two_steps(a, loop)), dict(after_two_steps(b, loop))
    assert found.keys() == expected.keys()
    return [name for name, value in expected.items() if not close(found[name], value)]


def close(a: Tensor, b: Tensor) -> bool:
    """Equal but for the order in which gradients of several uses are added."""
    return torch.allclose(a, b, rtol=1e-10, atol=1e-12)


@both
@pytest.mark.parametrize("run", [reentrant, replayed, nested])
@pytest.mark.parametrize("loop", LOOPS)
def test_two_calls_before_one_backward_have_their_own_masks(chosen: fxopt.Pass, run: Run, loop: Any) -> None:
    assert differing(student_of(chosen, run), student_of(chosen), loop) == []


@pytest.mark.parametrize("loop", LOOPS)
def test_checkpoints_inside_of_reentrant_ones(loop: Any) -> None:
    chosen = PASSES["naive"]
    assert differing(student_of(chosen, nested_reentrant), student_of(chosen, twice), loop) == []


@both
@pytest.mark.parametrize("again", [reentrant, replayed])
def test_a_checkpoint_may_hold_the_whole_student(chosen: fxopt.Pass, again: Run) -> None:
    def loop(student: Any) -> None:
        pairs = zip(leaves(), MASKS, strict=True)
        losses = [checkpoint(one_loss, student, x, m, use_reentrant=again is reentrant) for x, m in pairs]
        (losses[0] + losses[1]).backward()

    found, expected = (
        dict(after_two_steps(student_of(chosen), loop)),
        dict(after_two_steps(student_of(chosen), both_at_once)),
    )
    assert [name for name, value in expected.items() if not close(found[name], value)] == []


@both
def test_compiled_blocks_in_checkpoints_have_their_calls_masks(chosen: fxopt.Pass) -> None:
    torch._dynamo.reset()
    compiled: dict[nn.Module, Any] = {}

    def run(block: nn.Module, x: Tensor) -> Tensor:
        function = compiled.setdefault(block, torch.compile(block, backend="aot_eager", fullgraph=True))
        y: Tensor = checkpoint(function, x, use_reentrant=False)
        return y

    found, expected = student_of(chosen, run), student_of(chosen)
    for student in (found, expected):
        both_at_once(student)
    for (name, parameter), other in zip(expected.named_parameters(), found.parameters(), strict=True):
        torch.testing.assert_close(other.grad, parameter.grad, rtol=1e-9, atol=1e-12, msg=name)
    norms = [module for module in progressive_modules(found).values() if isinstance(module, RunningNorm)]
    assert [norm.mask.value for norm in norms] == [None] * 5


@both
def test_the_compiled_student_has_its_calls_masks(chosen: fxopt.Pass) -> None:
    torch._dynamo.reset()
    # UnifiedNorm's windows, which the second call writes, are read again where a compiled graph computes again.
    run = plainly if isinstance(chosen, UnifiedNorm) else replayed
    student, expected = student_of(chosen, run), student_of(chosen)
    compiled = torch.compile(student, backend="aot_eager", fullgraph=True)
    for candidate in (compiled, expected):
        both_at_once(candidate)
    for (name, parameter), other in zip(expected.named_parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(other.grad, parameter.grad, rtol=1e-9, atol=1e-12, msg=name)


def broken(block: nn.Module, x: Tensor) -> Tensor:
    def run(z: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return plainly(block, z)

    return replayed(run, x)  # type: ignore[arg-type] # a function is called like a module


@both
def test_checkpoints_that_compiled_students_leave_to_eager_have_their_calls_masks(chosen: fxopt.Pass) -> None:
    torch._dynamo.reset()
    student, expected = student_of(chosen, broken), student_of(chosen)
    both_at_once(torch.compile(student, backend="aot_eager"))
    both_at_once(expected)
    for (name, parameter), other in zip(expected.named_parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(other.grad, parameter.grad, rtol=1e-9, atol=1e-12, msg=name)


class Around(nn.Module):
    """A loss that holds the student."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return one_loss(self.student, x, mask)


def test_what_holds_the_student_is_compiled_as_one_graph() -> None:
    torch._dynamo.reset()
    student, expected = student_of(PASSES["naive"], replayed), student_of(PASSES["naive"])
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(Around(student), backend=counter, fullgraph=True)
    pairs = list(zip(leaves(), MASKS, strict=True))
    sum(compiled(x, mask) for x, mask in pairs).backward()
    both_at_once(expected)
    assert counter.frame_count == 1
    for (name, parameter), other in zip(expected.named_parameters(), student.named_parameters(), strict=True):
        torch.testing.assert_close(other[1].grad, parameter.grad, rtol=1e-9, atol=1e-12, msg=name)


def first_mean(student: Any) -> Tensor:
    norm = student.get_submodule("blocks.0.norm")
    assert isinstance(norm, RepNorm)
    return norm.batch_mean.clone()


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("compiles", [False, True])
def test_other_methods_have_no_mask_after_a_call(fails: bool, compiles: bool) -> None:
    torch._dynamo.reset()
    student = student_of(PASSES["naive"])
    called = torch.compile(student, backend="eager") if compiles else student
    x, other = leaves()
    called(x, MASKS[0])
    student.fails = fails
    if fails:
        with pytest.raises(RuntimeError, match="on purpose"):
            called(x, MASKS[0])
    student.encode(other)
    torch.testing.assert_close(first_mean(student), other.detach().mean((0, 1)))


def test_a_call_inside_of_a_call_leaves_the_outer_mask() -> None:
    class Again(Encoder):
        def forward(self, x: Tensor, attention_mask: Tensor | None = None, again: bool = True) -> Any:
            if again and self.training:
                self(x, MASKS[1], False)
            return super().forward(x, attention_mask)

    student = student_of(PASSES["naive"], kind=Again)
    x, _ = inputs(2)
    student(x.double(), MASKS[0])
    torch.testing.assert_close(first_mean(student), x.double()[MASKS[0]].mean(0))


def test_masks_live_as_long_as_their_graphs() -> None:
    student = student_of(PASSES["naive"], replayed)
    masks = [mask.clone() for mask in MASKS]
    known = [weakref.ref(mask) for mask in masks]
    losses = [one_loss(student, x, mask) for x, mask in zip(leaves(), masks, strict=True)]
    del masks
    gc.collect()
    assert all(ref() is not None for ref in known)
    losses.pop(0).backward()
    gc.collect()
    assert [ref() is None for ref in known] == [True, False]
    losses.pop().backward()
    gc.collect()
    assert [ref() is None for ref in known] == [True, True]


def test_many_calls_before_one_backward() -> None:
    student, expected = student_of(PASSES["naive"], replayed), student_of(PASSES["naive"])
    for candidate in (student, expected):
        x, _ = leaves()
        losses = [one_loss(candidate, x, MASKS[number % 2]) for number in range(140)]
        torch.stack(losses).sum().backward()
    for a, b in zip(student.parameters(), expected.parameters(), strict=True):
        assert (a.grad is None and b.grad is None) or close(a.grad, b.grad)


class Opaque:
    """A result that no one can look into."""

    def __init__(self, y: Tensor) -> None:
        self.y = y


def test_a_mask_that_can_not_be_known_is_an_error() -> None:
    student = student_of(PASSES["naive"])
    student.run, student.wrap = reentrant, Opaque
    x, other = leaves()
    y = student(x, MASKS[0]).y
    student(other, MASKS[1])
    with pytest.raises(MaskError, match="not known for which call of the model"):
        y.sum().backward()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda student: pickle.loads(pickle.dumps(student))])
def test_copies_take_no_mask_along_and_know_their_own(copied: Callable[[nn.Module], Any]) -> None:
    student = fxopt.prepare(encoder(), (inputs(1)[0],), passes=[PASSES["naive"]]).train()
    x, other = inputs(2)
    student(x, MASKS[0]).sum().backward()
    twin = copied(student)
    twin(other, MASKS[1])
    torch.testing.assert_close(first_mean(twin), other[MASKS[1]].mean(0))
    torch.testing.assert_close(first_mean(student), x[MASKS[0]].mean(0))
