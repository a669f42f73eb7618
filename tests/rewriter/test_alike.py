"""Work that is done once for all that is alike: results of fake calls, and patterns by the operators they end in."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn import functional as F

import fxopt
from fxopt.ir.alike import Unlike, likeness, metadata
from fxopt.ir.fake import call_fake
from fxopt.passes import exact_pipeline
from fxopt.rewriter import passes
from fxopt.rewriter.pipeline import run_pipeline

aten = torch.ops.aten


def test_calls_alike_share_a_value_and_others_do_not() -> None:
    mode = FakeTensorMode()
    with mode:
        x, y, wide, whole = torch.empty(3, 4), torch.empty(3, 4), torch.empty(3, 5), torch.empty(3, 4).long()
        turned, learned = torch.empty(4, 3).t(), torch.empty(3, 4).requires_grad_()
    first = call_fake(aten.sum.dim_IntList, (x, [1]), {}, mode)
    assert call_fake(aten.sum.dim_IntList, (y, [1]), {}, mode) is first
    for other in (wide, whole, turned, learned):
        assert call_fake(aten.sum.dim_IntList, (other, [1]), {}, mode) is not first
    assert call_fake(aten.sum.dim_IntList, (x, [0]), {}, mode).shape == (4,)
    assert call_fake(aten.sum.dim_IntList, (x, [1], True), {}, mode).shape == (3, 1)
    assert call_fake(aten.sum.dim_IntList, (x, [1]), {"dtype": torch.double}, mode).dtype is torch.double


def test_gradients_switched_off_are_another_call() -> None:
    mode = FakeTensorMode()
    with mode:
        x = torch.empty(3, requires_grad=True)
    recorded = call_fake(aten.exp.default, (x,), {}, mode)
    with torch.no_grad():
        assert not call_fake(aten.exp.default, (x,), {}, mode).requires_grad
    assert recorded.requires_grad


def test_results_go_with_their_mode() -> None:
    mode = FakeTensorMode()
    with mode:
        x = torch.empty(3, 4)
    kept = weakref.ref(call_fake(aten.exp.default, (x,), {}, mode))
    assert kept() is call_fake(aten.exp.default, (x,), {}, mode)
    del mode, x
    gc.collect()
    assert kept() is None


def test_what_a_result_depends_on_besides_operands_is_told_apart() -> None:
    mode = FakeTensorMode()
    with mode:
        x, weight, counts = torch.empty(3, 4), torch.empty(4, 4), torch.empty(3).long()
    with torch.autocast("cpu", torch.bfloat16):
        assert call_fake(aten.linear.default, (x, weight), {}, mode).dtype is torch.bfloat16
    assert call_fake(aten.linear.default, (x, weight), {}, mode).dtype is torch.float32
    assert call_fake(aten.div.Tensor, (counts, 2), {}, mode).dtype is torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert call_fake(aten.div.Tensor, (counts, 2), {}, mode).dtype is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_sizes_of_a_result_s_own_are_not_shared() -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    x = mode.from_tensor(torch.ones(3, 4), static_shapes=True)
    first, second = (call_fake(aten.nonzero.default, (x + n,), {}, mode) for n in range(2))
    assert str(first.shape[0]) != str(second.shape[0])


def test_symbolic_sizes_are_like_nothing() -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    x = mode.from_tensor(torch.empty(3, 4), static_shapes=False)
    assert call_fake(aten.exp.default, (x,), {}, mode) is not call_fake(aten.exp.default, (x,), {}, mode)
    for value in (x, x.shape[0], torch.empty(2), object()):
        with pytest.raises(Unlike):
            likeness([value], metadata)


def test_constants_are_told_apart_by_kind() -> None:
    alike = [0, 0.0, -0.0, False, None, "0", (0,), [0], {0: 0}, slice(0, None)]
    assert len({likeness(value, metadata) for value in alike}) == len(alike)


class _Block(nn.Module):
    """Norms, activations, products and attention in spellings that many rules look at."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)
        self.weight = nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        normal = (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).to(torch.float32) * self.weight
        gate = self.gate(normal)
        hidden = gate * torch.sigmoid(gate) * self.up(normal)
        y = self.down(0.5 * hidden * (1 + torch.erf(hidden / 2**0.5)))
        centred = (y - y.mean(-1, keepdim=True)) / torch.sqrt(y.var(-1, keepdim=True, unbiased=False) + 1e-5)
        scores = (centred @ centred.mT * 0.25).softmax(-1)
        found: Tensor = F.silu(scores @ centred) * (y / 3 + 1) + x.square().neg() - 2 * x
        return found


def _outcome(program: Any) -> Any:
    result = run_pipeline(program, exact_pipeline())
    names = [
        [(r.rule, r.spelling, r.site, r.operator) for r in record.result.replacements] for record in result.records
    ]
    return names, [record.result.near_misses for record in result.records]


def test_roots_leave_out_nothing_that_matches_or_nearly_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    program = fxopt.capture(_Block().eval(), (torch.randn(2, 5, 16),))
    found = _outcome(program)

    def everywhere(rules: Any) -> dict[object, list[Any]]:
        attempts = [passes._Attempt(rule, name, p) for rule in rules for name, p in rule.patterns.items()]
        return {None: attempts}

    monkeypatch.setattr(passes, "_by_root", everywhere)
    assert _outcome(program) == found
    rewritten = {rule for rules in found[0] for rule, *_ in rules}
    assert {"attention", "by-hand", "erf", "silu"} <= rewritten
