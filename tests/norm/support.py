"""Folding weights in small modules: did it fire, are the results those of float64, and if not, was the reason told?"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import fxopt
from fxopt import driver
from fxopt.frontend.export import from_export
from fxopt.lowering.options import Options
from fxopt.rewriter.pipeline import PipelineResult
from fxopt.testing import assert_within_budget, evaluate, oracle

#: Relative to the largest value of the result.
EXACT = 1e-12
#: The rules that are tested here.
RULES = {"norm-affine", "channel-affine", "centred"}


class Net(nn.Module):
    """Named parts and a function that runs them; every parameter and statistic is drawn at random."""

    def __init__(self, run: Callable[..., Any], seed: int = 0, **parts: nn.Module | nn.Parameter | Tensor) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if type(part) is Tensor else part)
        randomise(self, seed)
        self.eval()

    def forward(self, *args: Any) -> Any:
        return self.run(self, *args)

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name)


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter, and the statistics of batch norms, so that nothing is 0 or 1 by chance."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        scale = 0.3 if parameter.dim() > 1 else 1.0
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    for name, buffer in module.named_buffers():
        if name.endswith("running_var"):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
        elif name.endswith("running_mean"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator))
    return module


def draw(*sizes: int, seed: int = 7, dtype: torch.dtype = torch.float64) -> Tensor:
    """A normal draw."""
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed)).to(dtype)


def fold(
    module: nn.Module,
    args: tuple[Any, ...],
    passes: Sequence[str | fxopt.Pass],
    *,
    frozen: bool = True,
    dynamic: Any = None,
    verify: str = "structural",
) -> PipelineResult:
    """Run ``passes`` on the program of ``module``."""
    program = replace(from_export(module, args, dynamic_shapes=dynamic), frozen=frozen)
    return driver.rewrite(program, Options(passes=tuple(passes), strict=True, verify=verify))


@torch.no_grad()
def assert_folds(
    module: nn.Module,
    args: tuple[Any, ...],
    passes: Sequence[str | fxopt.Pass],
    sites: int = 1,
    *,
    verified: bool = True,
) -> PipelineResult:
    """``sites`` are folded: exact in float64, within the budget in bfloat16, in float32 verified site by site."""
    single, half = (cast((module, args), dtype) for dtype in (torch.float32, torch.bfloat16))
    result = fold(*single, passes, verify="numeric" if verified else "structural")
    folds = [replacement for replacement in result.replacements if replacement.rule in RULES]
    told = [f"{miss.rule}: {miss.reason}" for miss in result.near_misses]
    assert len(folds) == sites, f"{len(folds)} folded; {told}"
    double, args = cast((module, args), torch.float64)
    assert_exact(fxopt.rewrite(double, args, passes=list(passes), strict=True), double, args)
    rewritten = fxopt.rewrite(*half, passes=list(passes), strict=True)
    eager, actual = evaluate(half[0], *half[1]), evaluate(rewritten, *half[1])
    assert_within_budget(actual.outputs, eager.outputs, oracle(half[0], *half[1]), floor=1.0)
    return result


@torch.no_grad()
def assert_exact(rewritten: Callable[..., Any], module: nn.Module, args: tuple[Any, ...]) -> None:
    """Every result to `EXACT`, relative to its largest value."""
    for new, old in zip(tree_leaves(rewritten(*args)), tree_leaves(module(*args)), strict=True):
        assert (new - old).abs().max() <= EXACT * old.abs().max().clamp(min=1), (new - old).abs().max()


def assert_refused(
    module: nn.Module, args: tuple[Any, ...], passes: Sequence[str | fxopt.Pass], reason: str, **options: Any
) -> None:
    """No weight is folded and ``reason`` is told."""
    result = fold(module, args, passes, **options)
    assert not [done for done in result.replacements if done.rule in RULES]
    told = [miss.reason for miss in result.near_misses if miss.rule in RULES]
    assert [text for text in told if reason in text], f"nothing says {reason!r}; it is said {told}"


def cast(values: tuple[nn.Module, tuple[Any, ...]], dtype: torch.dtype) -> tuple[nn.Module, tuple[Any, ...]]:
    """Copies of a module and its arguments, what is floating in ``dtype``."""
    module, args = values

    def one(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype) if floating else value

    return copy.deepcopy(module).to(dtype), tree_map(one, args)
