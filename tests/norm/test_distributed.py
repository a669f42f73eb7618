"""Two processes with half a batch each train as one process with the whole batch does."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

import fxopt
from fxopt.passes import RepBatchNorm, UnifiedNorm
from tests.norm.models import encoder, inputs

PASSES: dict[str, RepBatchNorm | UnifiedNorm] = {
    "rep-batch-norm": RepBatchNorm(steps=3, warmup=1),
    "unified-norm": UnifiedNorm(warmup=2, window=2),
    "each for itself": RepBatchNorm(steps=0, synchronize=False),
}
STEPS = 5


def mask_of(x: Tensor) -> Tensor:
    """Other lengths in the two halves of a batch, so that the processes count differently many tokens."""
    lengths = torch.tensor([5, 5, 2, 1])
    return torch.arange(x.shape[1]) < lengths[:, None]


def student_of(name: str) -> nn.Module:
    return fxopt.prepare(encoder().double(), (inputs(1)[0].double(),), passes=[PASSES[name]]).train()


def run(model: nn.Module, rows: slice) -> dict[str, Tensor]:
    """Train on ``rows`` of every batch; the loss is a mean over elements, and halves have equally many."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for batch in inputs(STEPS):
        x, mask = batch.double()[rows], mask_of(batch)[rows]
        (model(x, mask) - x.cos()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name.removeprefix("module."): value for name, value in model.state_dict().items()}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    rows = slice(2 * rank, 2 * rank + 2)
    torch.save({name: run(DistributedDataParallel(student_of(name)), rows) for name in PASSES}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    """What each of the two processes had after training with each pass."""
    folder = tmp_path_factory.mktemp("processes")
    spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("name", PASSES)
def test_two_processes_train_as_one(name: str, states: list[dict[str, dict[str, Tensor]]]) -> None:
    first, second = (state[name] for state in states)
    whole = run(student_of(name), slice(0, 4))
    # A process records gradients of its own loss, whose tokens weigh twice as much as in that of the whole batch.
    whole = {key: value * (2 if "gradient_" in key else 1) for key, value in whole.items()}
    apart = [key for key, value in whole.items() if not torch.allclose(first[key], value, rtol=1e-10, atol=1e-10)]
    if not PASSES[name].synchronize:
        assert "blocks.0.norm.running_mean" in apart
        return
    assert apart == []
    assert all(torch.equal(first[key], second[key]) for key in whole)
