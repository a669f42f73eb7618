"""Two processes with half a batch each train linear attention as one process with the whole batch does."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

import fxopt
from fxopt.passes import LinearAttention, RepBatchNorm, SimplifiedLinearAttention
from tests.linear_attention.models import Called, Causal, Heads, inputs, mixer

SIMPLIFIED = SimplifiedLinearAttention(kernel=3, steps=3, warmup=1)
#: What is trained: schedules that end, and are under way, within the steps; and norms that are exchanged beside.
CASES: dict[str, tuple[type[Heads], list[fxopt.Pass]]] = {
    "simplified": (Called, [SIMPLIFIED]),
    "simplified at once": (Called, [SimplifiedLinearAttention(kernel=3)]),
    "causal": (Causal, [LinearAttention(steps=8)]),
    "simplified, with norms": (Called, [SIMPLIFIED, RepBatchNorm(steps=3, warmup=1)]),
    "norms apart": (Called, [SIMPLIFIED, RepBatchNorm(steps=0, synchronize=False)]),
}
STEPS = 5


@functools.cache
def _prepared(name: str) -> nn.Module:
    kind, passes = CASES[name]
    return fxopt.prepare(mixer(kind).double(), (inputs(1)[0].double(),), passes=passes)


def student_of(name: str) -> nn.Module:
    """A copy of its own, in training."""
    return copy.deepcopy(_prepared(name)).train()


def run(model: nn.Module, rows: slice) -> dict[str, Tensor]:
    """Train on ``rows`` of every batch; the loss is a mean over elements, and halves have equally many."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in inputs(STEPS):
        x = batch.double()[rows]
        (model(x) - x.cos()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name.removeprefix("module."): value for name, value in model.state_dict().items()}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    rows = slice(2 * rank, 2 * rank + 2)
    torch.save({name: run(DistributedDataParallel(student_of(name)), rows) for name in CASES}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    """What each of the two processes had after training."""
    folder = tmp_path_factory.mktemp("processes")
    spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def unlike(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    return [key for key in one if not torch.allclose(one[key], other[key], rtol=1e-10, atol=1e-10)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one(name: str, states: list[dict[str, dict[str, Tensor]]]) -> None:
    first, second = (state[name] for state in states)
    whole = run(student_of(name), slice(0, 4))
    if name == "norms apart":
        assert "norms.0.running_mean" in unlike(whole, first)
        return
    assert unlike(whole, first) == []
    assert all(torch.equal(first[key], second[key]) for key in whole)


@pytest.mark.parametrize("name", CASES)
def test_half_of_the_batch_alone_trains_something_else(name: str) -> None:
    """What the comparison above tells apart."""
    assert "layers.0.qkv.weight" in unlike(run(student_of(name), slice(0, 4)), run(student_of(name), slice(0, 2)))
