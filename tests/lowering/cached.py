"""A process that compiles small programs with operators of fxopt in them: what Inductor's caches made of each.

    python -m tests.lowering.cached CASE...

Prints, as JSON, whether each compilation was found in the caches of graphs and of autograd. Numbers that are not the
program's end the process.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Final
from unittest.mock import patch

import torch
from torch import Tensor
from torch._dynamo.utils import counters

import fxopt.codegen.attention.operator
from fxopt.ir.attention import AttentionSpec
from fxopt.ir.expression import parse
from fxopt.lowering import first_pass

_PLAIN: Final = str(AttentionSpec(parse("s * 0.25")))
_OTHER: Final = str(AttentionSpec(parse("s * 0.5")))


def _attention(spec: str, config: str) -> Callable[..., Tensor]:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = torch.ops.fxopt.attention_forward(q, k, v, [], spec, config, True)[0]
        return out

    return program


def _shifted(by: float) -> Callable[..., Tensor]:
    """A program with a constant tensor in it."""
    numbers = [[by * row - column for column in range(16)] for row in range(16)]

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _attention(_PLAIN, "16x32w4s2")(q, k, v) @ torch.tensor(numbers)

    return program


@dataclass(frozen=True)
class _Case:
    program: Callable[..., Tensor]
    backend: str = "fxopt"
    training: bool = False
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    options: Mapping[str, Any] | None = None


def _other_source() -> AbstractContextManager[Any]:
    return patch.object(first_pass, "source_digest", lambda: "another state of the source")


CASES: Final = {
    "plain": _Case(_attention(_PLAIN, "16x32w4s2")),
    "other specification": _Case(_attention(_OTHER, "16x32w4s2")),
    "other configuration": _Case(_attention(_PLAIN, "32x32w4s2")),
    "other source": _Case(_attention(_PLAIN, "16x32w4s2"), around=_other_source),
    "other pass": _Case(_attention(_PLAIN, "16x32w4s2"), options={"inductor": {"joint_custom_pre_pass": lambda _: 0}}),
    "Inductor alone": _Case(_attention(_PLAIN, "16x32w4s2"), backend="inductor"),
    "constant": _Case(_shifted(1.0)),
    "constant of other numbers": _Case(_shifted(5.0)),
    "training": _Case(_attention(_PLAIN, "16x32w4s2"), training=True),
}


def main(names: list[str]) -> None:
    """Compile the programs ``names`` one after the other."""
    sys.stdout.write(json.dumps({name: _compile(CASES[name]) for name in names}) + "\n")


def _compile(case: _Case) -> dict[str, str]:
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 16, 16, requires_grad=case.training) for _ in range(3))
    with case.around(), torch.set_grad_enabled(case.training):
        compiled = torch.compile(case.program, backend=case.backend, options=dict(case.options or {}) or None)
        _compare(compiled(q, k, v), case.program(q, k, v), [q, k, v])
    return {"graphs": _found("inductor", "fxgraph_cache_"), "autograd": _found("aot_autograd", "autograd_cache_")}


def _compare(actual: Tensor, expected: Tensor, operands: list[Tensor]) -> None:
    torch.testing.assert_close(actual, expected)
    if expected.requires_grad:
        gradients = (torch.autograd.grad(result.square().sum(), operands) for result in (actual, expected))
        torch.testing.assert_close(*gradients)


def _found(kind: str, prefix: str) -> str:
    """How often what was asked for was there, was not, or was not asked for."""
    numbers = ((outcome, counters[kind][prefix + outcome]) for outcome in ("hit", "miss", "bypass"))
    return " ".join(f"{number} {outcome}" for outcome, number in numbers if number)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    assert fxopt.codegen.attention.operator is not None
    main(sys.argv[1:])
