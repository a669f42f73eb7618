"""Running one canonicalisation on a small function: did it fire, and is the result as close to float64 as eager?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import fxopt.codegen.meanings  # noqa: F401 - gives the canonical operators their meaning
from fxopt.frontend.export import from_export
from fxopt.ir.program import Program
from fxopt.rewriter.passes import NearMiss, Pass, Replacement
from fxopt.rewriter.pipeline import PipelineResult, run_pipeline
from fxopt.testing import assert_operators, assert_within_budget, evaluate, oracle_gradients

#: The symbolic axes of each argument.
Dynamic = tuple[Any, ...] | None
#: The dtypes that every rule is checked in.
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def random(*sizes: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    """A normal draw that requires a gradient."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*sizes, generator=generator) * scale).to(dtype).requires_grad_()


def capture(function: Callable[..., Any], args: tuple[Any, ...], dynamic: Dynamic = None) -> Program:
    """The program of ``function``; ``dynamic`` gives the symbolic axes of each argument."""
    return from_export(function, args, dynamic_shapes=None if dynamic is None else (dynamic,))


def rewrite(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    passes: Pass | Sequence[Pass],
    dynamic: Dynamic = None,
) -> PipelineResult:
    """Capture ``function`` and run ``passes``; a pass that fails raises."""
    program = capture(function, args, dynamic)
    return run_pipeline(program, [passes] if isinstance(passes, Pass) else passes, strict=True)


def assert_fires(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    passes: Pass | Sequence[Pass],
    expected: dict[str, int],
    spelling: str | None = None,
    dynamic: Dynamic = None,
    terms: int = 0,
) -> Replacement:
    """The rewritten graph holds the ``expected`` operators; outputs and gradients are within the budget.

    ``terms`` of about size one are summed in gradients whose own size does not show that.
    """
    result = rewrite(function, args, passes, dynamic)
    assert_operators(result.program.module, expected)
    assert result.replacements, "nothing was rewritten"
    if spelling is not None:
        assert spelling in [r.spelling for r in result.replacements]
    assert_same(result.program.module, _as_graph(function), args, terms)
    return result.replacements[-1]


def assert_same(
    rewritten: Callable[..., Any], original: Callable[..., Any], args: tuple[Any, ...], terms: int = 0
) -> None:
    """Outputs and gradients of ``rewritten`` are as close to float64 as those of ``original``; in float64, to 1e-12."""
    actual, eager = evaluate(rewritten, *args), evaluate(original, *args)
    if any(isinstance(arg, Tensor) and arg.dtype == torch.float64 for arg in args):
        torch.testing.assert_close(actual.outputs, eager.outputs, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(actual.gradients, eager.gradients, rtol=1e-11, atol=1e-11)
        return
    assert_within_budget(actual, eager, oracle_gradients(original, *args), floor=float(terms))


def _as_graph(function: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
    """``function`` with its results as a flat tuple, as a graph module gives them."""
    return lambda *args: tuple(tree_leaves(function(*args)))


def assert_kept(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    passes: Pass,
    reason: str,
    dynamic: Dynamic = None,
) -> NearMiss:
    """Nothing is rewritten, and a near miss tells ``reason``."""
    before = capture(function, args, dynamic)
    result = run_pipeline(before, [passes], strict=True)
    assert not result.replacements, f"rewritten: {result.replacements}"
    assert result.program.code == before.code
    told = [miss for miss in result.near_misses if reason in miss.reason]
    assert told, f"no near miss says {reason!r}; they say {[m.reason for m in result.near_misses]}"
    return told[0]
