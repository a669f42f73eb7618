"""Linear attention launched on a GPU that isn't there: what is compiled, remembered and built beforehand."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fxopt.codegen.meanings  # noqa: F401 - canonical operators get their meaning
from fxopt import cache
from fxopt.codegen.linear_attention import operator
from fxopt.frontend.export import from_export
from fxopt.ir.nodes import REQUIRES_GRAD
from fxopt.ir.operators import overload
from fxopt.lowering import linear_attention
from fxopt.lowering.attention import candidates, choose, prepare
from tests.codegen.linear_cases import CASES, leaves
from tests.codegen.offline import Compiled, compiler

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
HALF = torch.bfloat16
CONFIGS = {"window": "linear-64x32w4g4", "causal": "linear-64x32w4g1"}


@pytest.fixture
def launching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Compiled]]:
    """A GPU for which kernels are compiled, and where launches do nothing."""
    monkeypatch.setattr(linear_attention, "triton_objection", lambda *_: None)
    cache.clear()
    operator._REPLAYS.clear()
    with compiler(tmp_path, launches=True) as found:
        yield found
    operator._REPLAYS.clear()


@pytest.mark.parametrize("with_sums", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_second_call_is_a_replay(launching: list[Compiled], name: str, with_sums: bool) -> None:
    case = CASES[name]
    given, spec = case.draw(HALF), str(case.spec(HALF, "bshd"))
    first = operator._cuda(*given, spec, CONFIGS[name], with_sums)
    assert len(operator._REPLAYS) == 1
    again = operator._cuda(*given, spec, CONFIGS[name], with_sums)
    assert [(x.shape, x.stride(), x.dtype) for x in again] == [(x.shape, x.stride(), x.dtype) for x in first]
    assert len(operator._REPLAYS) == 1 and {c.name for c in launching} == {"forward_kernel"}


@pytest.mark.parametrize("name", CONFIGS)
def test_fake_results_are_those_of_the_launcher(launching: list[Compiled], name: str) -> None:
    case = CASES[name]
    given, spec = case.draw(HALF), str(case.spec(HALF, "bshd"))
    real = operator._cuda(*given, spec, CONFIGS[name], True)
    fake = operator._fake(*given, spec, CONFIGS[name], True)
    assert [(x.shape, x.stride(), x.dtype) for x in fake] == [(x.shape, x.stride(), x.dtype) for x in real]
    out, attended, sums = real
    arguments = (*given, attended if case.optional.taps else out, sums, torch.empty_like(out), spec, CONFIGS[name])
    found, expected = operator._cuda_backward(*arguments), operator._fake_backward(*arguments)
    assert [(x.shape, x.stride()) for x in found] == [(x.shape, x.stride()) for x in expected]
    assert len(found) == len(leaves(given))


@pytest.mark.parametrize("training", [False, True])
def test_candidates_are_built_before_they_are_measured(launching: list[Compiled], training: bool) -> None:
    case = CASES["window"]

    def attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out: Tensor = overload("linear_attention")(q, k, v, positions, None, weight, bias, str(case.spec(HALF)))
        return out

    program = from_export(attention, tuple(x for x in case.draw(HALF) if x is not None))
    for node in program.graph.find_nodes(op="placeholder"):
        node.meta[REQUIRES_GRAD] = training
    (site,) = program.graph.find_nodes(op="call_function", target=overload("linear_attention"))
    names = [candidate.name for candidate in candidates(site, training)[0]]
    assert names[0] == "triton-linear-64x32w2g1" and names[-1] == "aten"
    prepare([site], training)
    built = {c.name for c in launching}
    gradients = {"queries_kernel", "keys_kernel", "values_kernel", "filters_kernel"}
    assert built == {"forward_kernel"} | (gradients if training else set())
    count = len(launching)
    chosen, decision = choose(site, training, "auto")
    assert decision.reason.startswith("measured") and chosen.name in names
    assert all(compiled.cached for compiled in launching[count:])
