"""Folded weights on the GPU: compiled by Inductor with and without CUDA graphs, moved there, and changed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

import fxopt
from fxopt.passes import CentreResidual, exact_pipeline
from fxopt.testing import assert_within_budget, evaluate, oracle
from tests.norm.support import Net, randomise

pytestmark = pytest.mark.gpu
C = 256


def _run(net: Any, x: Tensor) -> Any:
    tokens = net.bn(net.conv(x)).flatten(2).transpose(1, 2)
    tokens = tokens + net.down(torch.relu(net.up(net.first(tokens))))
    return net.head(net.last(tokens).mean(1))


def _net(dtype: torch.dtype) -> tuple[Net, Tensor]:
    net = Net(
        _run, conv=nn.Conv2d(3, C, 4, 4), bn=nn.BatchNorm2d(C), first=nn.LayerNorm(C), up=nn.Linear(C, 2 * C),
        down=nn.Linear(2 * C, C, bias=False), last=nn.LayerNorm(C), head=nn.Linear(C, 40),
    )  # fmt: skip
    with torch.no_grad():
        for part in (net.up, net.down, net.head, net.conv):
            part.weight.mul_(0.2)
    return net.to("cuda", dtype), torch.randn(8, 3, 64, 64, device="cuda", dtype=dtype)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("centred", [False, True])
@torch.no_grad()
def test_compiled_results_are_within_the_budget(centred: bool, dtype: torch.dtype, mode: str) -> None:
    torch._dynamo.reset()
    net, x = _net(dtype)
    passes: list[Any] = [*exact_pipeline(), CentreResidual()] if centred else list(exact_pipeline())
    rewritten = fxopt.rewrite(net, (x,), passes=passes, strict=True)
    operators = rewritten._modes[False].division.rest.graph  # type: ignore[union-attr]
    assert not operators.find_nodes(op="call_function", target=torch.ops.aten.batch_norm.default)
    fast = torch.compile(rewritten, fullgraph=True, mode=mode)
    eager, reference = evaluate(net, x).outputs, oracle(net, x)
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        assert_within_budget(fast(x).clone(), eager, reference)


@torch.no_grad()
def test_cuda_graphs_see_a_loaded_checkpoint() -> None:
    torch._dynamo.reset()
    net, x = _net(torch.float32)
    rewritten = fxopt.rewrite(net, (x,), strict=True)
    fast = torch.compile(rewritten, fullgraph=True, mode="reduce-overhead")
    for _ in range(3):
        fast(x)
    other = randomise(copy.deepcopy(net).cpu(), 3).cuda()
    rewritten.load_state_dict(other.state_dict())
    assert_within_budget(fast(x).clone(), evaluate(other, x).outputs, oracle(other, x))


@torch.no_grad()
def test_a_module_rewritten_on_the_cpu_moves() -> None:
    net, x = _net(torch.float32)
    rewritten = fxopt.rewrite(net.cpu(), (x.cpu(),), strict=True).cuda()
    assert all(buffer.is_cuda for buffer in rewritten.folded_weights.buffers())
    net.cuda()
    assert_within_budget(rewritten(x), evaluate(net, x).outputs, oracle(net, x))
