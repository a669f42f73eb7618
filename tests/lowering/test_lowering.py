"""Lowering: candidates with reasons, forced and cached decisions, and the mathematics of each candidate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fxopt.codegen.meanings  # noqa: F401 - canonical operators get their meaning
from fxopt import cache, driver
from fxopt.codegen.attention import sdpa
from fxopt.errors import FxoptWarning, LoweringError
from fxopt.frontend.export import from_export
from fxopt.ir.attention import AttentionSpec, Capture, read_spec
from fxopt.ir.expression import parse
from fxopt.ir.program import Program
from fxopt.lowering.attention import candidates, problem_of
from fxopt.lowering.lower import lower
from fxopt.lowering.options import Options
from fxopt.testing import assert_within_budget, oracle


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) * 0.25).softmax(-1) @ v


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (5.0 * torch.tanh(q @ k.transpose(-2, -1) / 5.0)).softmax(-1) @ v


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keep = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril(-1)
    return (q @ k.transpose(-2, -1)).masked_fill(~keep, float("-inf")).softmax(-1) @ v


def rewritten(function: Any, *inputs: Tensor) -> Program:
    return driver.rewrite(from_export(function, inputs), Options(strict=True)).program


def operands(dtype: torch.dtype = torch.float32, width: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return (
        torch.randn(2, 4, 12, 16).to(dtype),
        torch.randn(2, 4, 12, 16).to(dtype),
        torch.randn(2, 4, 12, width).to(dtype),
    )


@pytest.mark.parametrize("function", [plain, masked])
@pytest.mark.parametrize("option", ["auto", "sdpa", "aten"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_lowering_is_within_the_budget(function: Any, option: str, dtype: torch.dtype) -> None:
    inputs = operands(dtype)
    lowered, (decision,) = lower(rewritten(function, *inputs), training=False, option=option)
    if option != "auto":
        assert decision.chosen.startswith(option)
    assert_within_budget(lowered.module(*inputs)[0], function(*inputs), oracle(function, *inputs))


@pytest.mark.parametrize(("option", "dtype"), [
    ("sdpa", torch.float32), ("sdpa", torch.bfloat16), ("aten", torch.float32), ("aten", torch.float16),
])  # fmt: skip
def test_rows_without_keys_give_the_mean_by_each_lowering(option: str, dtype: torch.dtype) -> None:
    def filled(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1)).masked_fill(~keep, torch.finfo(dtype).min).softmax(-1) @ v

    inputs = (*operands(dtype), torch.arange(12) < torch.tensor([7, 0])[:, None, None, None])
    program = rewritten(filled, *inputs)
    assert "rows=uniform" in str(program.code)
    lowered, (decision,) = lower(program, training=False, option=option)
    assert decision.chosen.startswith(option)
    assert_within_budget(lowered.module(*inputs)[0], filled(*inputs), oracle(filled, *inputs))


def test_sdpa_in_float16_would_not_give_the_mean() -> None:
    spec = AttentionSpec(parse("s"), parse("c0"), (Capture("b--j", torch.bool),), empty_rows="uniform")
    q, k, v = operands(torch.float16)
    for backend in ("efficient", "cpu"):
        assert "float16" in str(sdpa.objection(spec, q, k, v, backend)) or q.device.type != sdpa.BACKENDS[backend]
    assert sdpa.objection(spec, *operands(torch.bfloat16), "cpu") is None


def test_a_score_that_is_not_linear_has_no_sdpa_and_says_why() -> None:
    program = rewritten(capped, *operands())
    (site,) = [n for n in program.graph.nodes if "attention" in n.name]
    found, refused = candidates(site, training=False)
    assert [c.family for c in found] == ["aten"]
    assert "not a multiple of q·k" in refused["sdpa-cpu"]
    assert "CUDA" in refused["triton"]


def test_a_forced_lowering_that_cannot_serve_says_why() -> None:
    narrow = rewritten(plain, *operands(width=10))
    with pytest.warns(FxoptWarning, match="head dimensions 16 and 10"):
        _, (decision,) = lower(narrow, training=False, option="sdpa")
    assert decision.chosen == "aten" and "head dimensions 16 and 10" in decision.reason
    with pytest.warns(FxoptWarning, match=r"CUDA.*runs as aten"):
        lower(rewritten(plain, *operands()), training=False, option="triton")
    with pytest.raises(LoweringError, match="use lower='auto'"):
        lower(narrow, training=False, option="sdpa", strict=True)


@pytest.mark.parametrize("dynamic", [False, True])
def test_kernels_are_told_whether_the_number_of_keys_may_change(dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    length = torch.export.Dim("length", min=2, max=64)
    shapes = ({2: length},) * 3 if dynamic else None
    inputs = operands(torch.bfloat16)
    program = driver.rewrite(
        from_export(plain, inputs, dynamic_shapes=(shapes,) if dynamic else None), Options()
    ).program
    (site,) = [n for n in program.graph.nodes if "attention" in n.name]
    q, k, v = (node.meta["val"] for node in site.args[:3])
    problem = problem_of(read_spec(str(site.args[4])), q, k, v, training=False)
    assert (problem.keys, problem.dynamic_keys) == (12, dynamic)


def test_decisions_are_cached_and_damage_is_ignored() -> None:
    program = rewritten(plain, *operands())
    cache.clear()
    _, (first,) = lower(program, training=False)
    _, (second,) = lower(program, training=False)
    assert first.reason == "measured" and "cache" in second.reason
    assert first.seconds == second.seconds
    for entry in (cache.directory() / "decisions").glob("*"):
        entry.write_text('{"seconds": {"rm -rf": 0.0}}')
    with pytest.warns(Warning, match="cache"):
        _, (third,) = lower(program, training=False)
    assert third.reason == "measured"
