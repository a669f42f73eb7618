"""Lowering of linear attention: candidates with reasons, and a lowered program that computes the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fxopt.codegen.meanings  # noqa: F401 - canonical operators get their meaning
from fxopt.errors import FxoptWarning
from fxopt.frontend.export import from_export
from fxopt.ir.linear_attention import LinearSpec
from fxopt.ir.operators import overload
from fxopt.ir.program import Program
from fxopt.lowering import linear_attention
from fxopt.lowering.attention import candidates
from fxopt.lowering.kernels import kernel_sources
from fxopt.lowering.lower import lower

SPEC = str(LinearSpec(side=7))


def window(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    out: Tensor = overload("linear_attention")(q, k, v, positions, None, weight, bias, SPEC)
    return out


def operands() -> tuple[Tensor, ...]:
    q, k, v = (torch.randn(4, 2, 49, 16) for _ in range(3))
    return q, k, v, torch.randn(2, 49, 16), torch.randn(16, 5, 5), torch.randn(16)


def captured() -> Program:
    return from_export(window, operands())


def test_on_the_cpu_it_runs_as_it_is() -> None:
    program = captured()
    (site,) = program.graph.find_nodes(op="call_function", target=overload("linear_attention"))
    found, refused = candidates(site, training=False)
    assert [candidate.name for candidate in found] == ["aten"]
    assert "not on cpu" in refused["triton"] and "softmax" in refused["sdpa"]
    lowered, (decision,) = lower(program, training=False)
    assert decision.chosen == "aten"
    given = operands()
    torch.testing.assert_close(lowered.module(*given)[0], window(*given))


def test_forcing_what_can_not_serve_is_said() -> None:
    with pytest.warns(FxoptWarning, match="lower='triton' can't serve this site"):
        lower(captured(), training=False, option="triton")


def on_device(monkeypatch: pytest.MonkeyPatch, training: bool) -> Program:
    """Lowered as on a device, to the first configuration; what launches kernels on the CPU is plain PyTorch."""
    monkeypatch.setattr(linear_attention, "triton_objection", lambda operands, widths: None)
    return lower(captured(), training=training, option="triton")[0]


@pytest.mark.parametrize("training", [False, True])
def test_the_first_candidate_computes_the_same(monkeypatch: pytest.MonkeyPatch, training: bool) -> None:
    lowered = on_device(monkeypatch, training)
    given = tuple(x.requires_grad_() for x in operands())
    out, expected = lowered.module(*given)[0], window(*given)
    torch.testing.assert_close(out, expected)
    if training:
        cotangent = torch.randn_like(out)
        found, wanted = (torch.autograd.grad(x, given, cotangent) for x in (out, expected))
        torch.testing.assert_close(found, wanted)


def test_its_source_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = kernel_sources(on_device(monkeypatch, training=False))
    (text,) = sources.values()
    assert "def forward_kernel(" in text and "grid=0+7x7" in text
