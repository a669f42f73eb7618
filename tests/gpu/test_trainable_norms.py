"""Trainable norms on a GPU: compiled by Inductor, under autocast, and converted after a move from the CPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import fxopt
from tests.norm.models import SHORT, encoder, inputs, optimizer_of, train
from tests.norm.test_token_mask import MASKS, PASSES, Encoder, Run, plainly, reentrant, replayed

pytestmark = [
    pytest.mark.gpu,
    # What TorchDynamo says of itself when it traces an autograd.Function.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]
both = pytest.mark.parametrize("chosen", SHORT.values(), ids=SHORT)


def student_of(chosen: fxopt.Pass) -> torch.nn.Module:
    """Prepared on the CPU, then moved."""
    return fxopt.prepare(encoder(), (inputs(1)[0],), passes=[chosen]).train().cuda()


@both
def test_compiled_training_follows_eager(chosen: fxopt.Pass) -> None:
    batches = [x.cuda().double() for x in inputs(7)]
    eager, student = student_of(chosen).double(), student_of(chosen).double()
    torch._dynamo.reset()
    compiled = torch.compile(student, fullgraph=True)
    losses = train(eager, optimizer_of(eager), batches)
    assert train(compiled, optimizer_of(student), batches) == pytest.approx(losses, rel=1e-9)
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(student.state_dict()[name], value, rtol=1e-7, atol=1e-7)


@both
def test_training_under_autocast_and_conversion_after_a_move(chosen: fxopt.Pass) -> None:
    student = student_of(chosen)
    optimizer = optimizer_of(student)
    batches = [x.cuda() for x in inputs(8)]
    for x in batches:
        with torch.autocast("cuda", torch.bfloat16):
            loss = (student(x) - x.cos()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert loss.isfinite()
    fast = fxopt.convert(student, batches[:3])
    (x,) = inputs(1, seed=5)
    with torch.no_grad():
        assert fast(x.cuda()).isfinite().all()
    assert {parameter.device.type for parameter in fast.parameters()} == {"cuda"}


@pytest.mark.parametrize("run", [replayed, reentrant])
@pytest.mark.parametrize("chosen", PASSES.values(), ids=PASSES)
def test_calls_in_checkpoints_keep_their_masks_on_the_threads_of_a_device(chosen: fxopt.Pass, run: Run) -> None:
    masks = [mask.cuda() for mask in MASKS]
    batches = [x.cuda().double() for x in inputs(2)]
    student = fxopt.prepare(Encoder().cuda().double().eval(), (batches[0], masks[0]), passes=[chosen]).train()
    found = []
    for how in (plainly, run):
        twin: Any = copy.deepcopy(student)
        twin.run = how
        leaves = [x.clone().requires_grad_() for x in batches]
        losses = [twin(x, mask).square().mean() for x, mask in zip(leaves, masks, strict=True)]
        torch.stack(losses).sum().backward()
        found.append({name: parameter.grad for name, parameter in twin.named_parameters()})
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-12)
