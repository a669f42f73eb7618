"""Gradients of packed projections on a GPU: the kernels write the columns of one tensor, at first and when repeated."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import fresh_cache, run_and_get_code

from benchmarks.packed import Block, Case
from fxopt import backend
from fxopt.codegen.attention.backward import kernel as portable
from fxopt.codegen.attention.backward import operator as backward
from fxopt.codegen.attention.backward.hopper import kernel as hopper
from fxopt.codegen.attention.packed import Heads, Places, attention_packed, attention_packed_backward, unpacked
from fxopt.codegen.attention.portable.kernel import candidates as forward_candidates
from fxopt.lowering.packed import PACKED
from fxopt.testing import assert_within_budget
from tests.codegen.cases import Shape, specification
from tests.codegen.gradients import assert_gradients_within_budget
from tests.gpu.problems import of_any_size
from tests.gpu.test_attention_kernels import on_gpu

pytestmark = pytest.mark.gpu
HALF = torch.bfloat16


def apart(width: int, shared: int = 4) -> Places:
    """``[B, S, (4 + 2·shared)·D]``: four heads of queries, then those of keys, then those of values."""
    keys = Heads(4 * width, width, shared)
    return Places(width, Heads(0, width, 4), keys, Heads((4 + shared) * width, width, shared))


def in_turn(width: int) -> Places:
    """``[B, S, 4, 3, D]``."""
    return Places(width, Heads(0, 3 * width, 4), Heads(width, 3 * width, 4), Heads(2 * width, 3 * width, 4))


PLACES = {
    "D64": apart(64), "D64 in turn": in_turn(64), "D64, heads that share keys": apart(64, 2), "D128": apart(128),
    "D72": apart(72), "D80 in turn": in_turn(80), "D32": apart(32),
}  # fmt: skip


def configs(name: str, places: Places) -> list[str]:
    """The first configuration of each family of backward kernels that can serve."""
    spec = specification(name, shape_of(places), HALF, "zero")
    problem = of_any_size(spec, places.width, places.width, HALF)
    return [str(portable.candidates(problem)[0]), *map(str, hopper.candidates(problem)[:1])]


def shape_of(places: Places) -> Shape:
    return Shape(places.width, places.width, 301, 301, places.k.number, "group", "bshd", batch=3, heads=4)


@pytest.mark.parametrize("order", PLACES)
@pytest.mark.parametrize("name", ["plain", "causal", "padding", "alibi", "swin"])
def test_columns_are_the_gradients_of_the_views(name: str, order: str) -> None:
    torch.manual_seed(0)
    places = PLACES[order]
    spec = specification(name, shape_of(places), HALF, "zero")
    wanted = [c.kind == "float" for c in spec.captures]
    _, captures = on_gpu(name, shape_of(places), spec, HALF)
    forward = str(forward_candidates(of_any_size(spec, places.width, places.width, HALF))[0])
    for config in configs(name, places) if not any(wanted) else configs(name, places)[:1]:
        backward._REPLAYS.clear()
        for _ in range(3):
            whole = torch.randn(3, 301, places.columns, device="cuda").to(HALF)
            out, lse = attention_packed(whole, captures, str(spec), places.numbers(), forward, True)
            dout = torch.randn_like(out)
            given = (captures, places.numbers(), out, lse, dout, None, wanted, str(spec), config)
            gradient, *rest = attention_packed_backward(whole, *given)
            assert gradient.stride() == whole.stride() and len(backward._REPLAYS) == 1
            views = unpacked(whole, places)
            found = [*unpacked(gradient, places), *rest]
            assert_gradients_within_budget(spec, views, captures, found, dout)
        if not config.startswith("hopper"):
            again = backward.attention_backward(*views, captures, out, lse, dout, None, wanted, str(spec), config)
            assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_replays_are_captured_by_graphs() -> None:
    places = PLACES["D64"]
    spec = str(specification("causal", shape_of(places), HALF, "zero"))
    config = f"64x64w4s3/{configs('causal', places)[0]}"
    whole = torch.randn(3, 301, places.columns, device="cuda", dtype=HALF, requires_grad=True)

    def step() -> Tensor:
        out, _ = attention_packed(whole, [], spec, places.numbers(), config, True)
        found: Tensor = torch.autograd.grad(out, whole, torch.ones_like(out))[0]
        return found

    for _ in range(3):
        expected = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    found.fill_(torch.nan)
    graph.replay()
    assert torch.equal(found, expected)


CASES = [
    Case("split", 4, 4, 200, 64, "split", causal=True, bias=False), Case("unbind", 8, 3, 49, 32, "unbind"),
    Case("in turn", 2, 4, 300, 128, "in turn", causal=True),
]  # fmt: skip


@pytest.mark.parametrize("order", ["D64", "D128"])
def test_deterministic_mode_gives_the_same_bits(order: str) -> None:
    """Configurations that sum in any order give way to one that doesn't, in the whole gradient too."""
    places = PLACES[order]
    spec = str(specification("causal", shape_of(places), HALF, "zero"))
    config = f"64x64w4s3/{configs('causal', places)[-1]}"
    whole = torch.randn(3, 301, places.columns, device="cuda", dtype=HALF, requires_grad=True)
    found: list[Tensor] = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(3):
            out, _ = attention_packed(whole, [], spec, places.numbers(), config, True)
            found += torch.autograd.grad(out, whole, torch.ones_like(out))
    finally:
        torch.use_deterministic_algorithms(False)
    assert not found[0].isnan().any() and all(torch.equal(found[0], x) for x in found)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_compiled_blocks_train_within_the_budget(case: Case) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    block = Block(case).to("cuda", HALF)
    x = torch.randn(case.batch, case.length, case.heads * case.dim, device="cuda", dtype=HALF)
    cotangent = torch.randn_like(x)
    exact = step_of(copy.deepcopy(block).double(), x.double(), cotangent.double())()
    eager = step_of(block, x, cotangent)()
    compiled = torch.compile(block, backend="fxopt", options={"lower": "triton", "strict": True})
    with backend.collecting() as (outcomes, _), fresh_cache():
        found, code = run_and_get_code(step_of(compiled, x, cotangent))
    assert_within_budget(list(found), list(eager), list(exact))
    (call,) = outcomes[0].lowered.graph.find_nodes(op="call_function", target=PACKED)
    assert isinstance(call.args[0], torch.fx.Node) and call.args[0].name == "linear"
    (gradients,) = [text for text in code if "attention_packed_backward_launch" in text]
    assert not re.search(r"triton_\w*fused\w*_(cat|stack|clone)", gradients), "nothing is put together"


def step_of(model: Any, x: Tensor, cotangent: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    leaves = [x.detach().requires_grad_(), *model.parameters()]

    def step() -> tuple[Tensor, ...]:
        out = model(leaves[0])
        return (out, *torch.autograd.grad(out, leaves, cotangent))

    return step
