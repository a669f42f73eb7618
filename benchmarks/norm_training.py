"""Training one model with LayerNorm and with what may take its place, several seeds each, and what came of it."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fxopt
from benchmarks.environment import environment
from benchmarks.progress import Progress

Inputs = tuple[Any, ...]
#: Name to the trainable passes that make a variant, given the steps of the whole training.
Variants = Mapping[str, Callable[[int], list[fxopt.Pass]]]
#: What the others are compared with.
BASELINE: Final = "LayerNorm"
_SHOWN: Final = 5  # points of a curve in the table; the JSON has all
NORMS: Final[Variants] = {
    BASELINE: lambda steps: [],
    "BatchNorm, swapped": lambda steps: [fxopt.passes.RepBatchNorm(steps=0, alpha=None)],
    "RepBatchNorm": lambda steps: [fxopt.passes.RepBatchNorm(steps=steps * 7 // 10, warmup=steps // 10)],
    "UnifiedNorm": lambda steps: [fxopt.passes.UnifiedNorm(warmup=steps // 10)],
}


@dataclass(frozen=True)
class Task:
    """What is trained.

    Attributes:
        model: a fresh model; the generator of PyTorch is seeded before.
        batches: endless batches of the training set for a seed, each the arguments of the model and the targets.
        loss: of the model's output and the targets.
        score: of the trained model: the figure that norms are compared by.
        calibration: arguments of the model to refresh statistics with.
        higher_is_better: about the score.
    """

    model: Callable[[], nn.Module]
    batches: Callable[[int], Iterator[tuple[Inputs, Tensor]]]
    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[nn.Module, int], float]
    calibration: Callable[[int], Iterable[Inputs]]
    higher_is_better: bool = False


@dataclass(frozen=True)
class Settings:
    """How it is trained: steps, largest learning rate, how often the curve gets a point, device, compiled or not."""

    steps: int
    rate: float
    every: int
    device: str
    compiled: bool


@dataclass
class Run:
    """One training: the mean training loss of every ``every`` steps, and the score of the converted model."""

    norm: str
    seed: int
    score: float = float("nan")
    curve: list[float] = field(default_factory=list)
    seconds: float = 0.0


def parser_of(description: str | None, variants: Variants, usual: Sequence[str]) -> argparse.ArgumentParser:
    """The command line that all evidence has in common; ``usual`` are the variants trained where none are named."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small model and few steps, for a CPU")
    parser.add_argument("--steps", type=int, help="optimiser steps of one training")
    parser.add_argument("--rate", type=float, default=1e-3, help="largest learning rate")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--norms", nargs="*", choices=list(variants), default=list(usual))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="where to write the results as JSON")
    return parser


def run_all(task: Task, settings: Settings, variants: Variants, seeds: Sequence[int], clock: Progress) -> list[Run]:
    """Train every variant with every seed; a variant is compiled once, and each seed loads its own first state."""
    runs = []
    for norm, passes in variants.items():
        torch._dynamo.reset()
        student: nn.Module | None = None
        step: Callable[..., Any] | None = None
        for seed in seeds:
            fresh = _student(task, settings, passes(settings.steps), seed)
            if student is None or step is None:
                student = fresh
                step = torch.compile(student) if settings.compiled else student
            student.load_state_dict(fresh.state_dict())
            run = Run(norm, seed)
            start = clock.elapsed
            _train(task, settings, student.train(), step, run)
            is_student = norm != BASELINE
            finished = fxopt.convert(student, task.calibration(seed)) if is_student else student.eval()
            run.score = task.score(finished, seed)
            run.seconds = clock.elapsed - start
            clock.say(f"{norm}, seed {seed}: score {run.score:.4f}, training loss {run.curve[-1]:.4f}")
            runs.append(run)
    return runs


def _student(task: Task, settings: Settings, passes: Sequence[fxopt.Pass], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = task.model().to(settings.device)
    example, _ = next(task.batches(seed))
    return fxopt.prepare(model, example, passes=passes) if passes else model


def _train(task: Task, settings: Settings, student: nn.Module, step: Callable[..., Any], run: Run) -> None:
    optimizer = _optimizer(student, settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _rate(settings.steps))
    torch.manual_seed(run.seed + 1000)
    batches = task.batches(run.seed)
    losses = []
    for number in range(1, settings.steps + 1):
        args, targets = next(batches)
        with torch.autocast("cuda", torch.bfloat16, enabled=settings.device == "cuda"):
            loss = task.loss(step(*args), targets)
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.detach())
        if number % settings.every == 0:
            run.curve.append(float(torch.stack(losses).mean()))
            losses.clear()


def _optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """AdamW; matrices decay, vectors don't."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.rate, betas=(0.9, 0.95), fused=settings.device == "cuda")


def _rate(steps: int) -> Callable[[int], float]:
    """Up in a twentieth of the steps, then down to a twentieth of the largest rate."""
    rising = max(1, steps // 20)
    return lambda step: min((step + 1) / rising, 1 - 0.95 * max(0, step - rising) / max(1, steps - rising))


def report(title: str, runs: Sequence[Run], task: Task, steps: int) -> str:
    """Tables of the variants, over the seeds: score and last training loss, against the baseline's; training loss."""
    by_norm: dict[str, list[Run]] = {}
    for run in runs:
        by_norm.setdefault(run.norm, []).append(run)
    console = Console(width=120)
    with console.capture() as captured:
        console.print(_scores(title, by_norm, task))
        console.print(_curves(by_norm, steps))
    return captured.get()


def _scores(title: str, by_norm: Mapping[str, Sequence[Run]], task: Task) -> Table:
    table = Table(title=title, box=box.MARKDOWN)
    for heading in ("norm", "score", "±", "against LayerNorm", "last training loss", "seconds a run"):
        table.add_column(heading, justify="left" if heading == "norm" else "right")
    base = _mean(run.score for run in by_norm.get(BASELINE, []))
    for norm, group in by_norm.items():
        score = _mean(run.score for run in group)
        spread = max(run.score for run in group) - min(run.score for run in group)
        against = f"{score - base:+.2f} points" if task.higher_is_better else f"{score / base - 1:+.2%}"
        last, seconds = _mean(run.curve[-1] for run in group), _mean(run.seconds for run in group)
        table.add_row(norm, f"{score:.4f}", f"{spread / 2:.4f}", against, f"{last:.4f}", f"{seconds:.1f}")
    return table


def _curves(by_norm: Mapping[str, Sequence[Run]], steps: int) -> Table:
    """The training loss at fifths of the steps: means since the point before, and over the seeds."""
    table = Table(title="Training loss after as many steps", box=box.MARKDOWN)
    points = min(len(run.curve) for group in by_norm.values() for run in group)
    shown = sorted({max(1, round(points * part / _SHOWN)) for part in range(1, _SHOWN + 1)})
    table.add_column("norm")
    for point in shown:
        table.add_column(str(round(steps * point / points)), justify="right")
    for norm, group in by_norm.items():
        table.add_row(norm, *(f"{_mean(run.curve[point - 1] for run in group):.4f}" for point in shown))
    return table


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return statistics.fmean(numbers) if numbers else float("nan")


def save(path: Path, title: str, runs: Sequence[Run], facts: Mapping[str, Any], settings: Settings) -> None:
    """Everything as JSON."""
    data = {
        "title": title,
        "environment": environment(settings.device),
        "settings": asdict(settings) | dict(facts),
        "runs": [asdict(run) for run in runs],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1))
