"""Launches of the backward that are remembered give the gradients that a first launch gives, bit by bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fxopt.codegen.attention.backward import operator as backward
from fxopt.codegen.attention.backward.kernel import candidates
from fxopt.codegen.attention.operator import attention_forward
from fxopt.codegen.attention.portable.kernel import candidates as forward_candidates
from fxopt.ir.attention import AttentionSpec
from tests.codegen.cases import Shape, specification
from tests.codegen.gradients import assert_gradients_within_budget
from tests.gpu.problems import of_any_size
from tests.gpu.test_attention_kernels import on_gpu

pytestmark = pytest.mark.gpu
DTYPE = torch.bfloat16
SHAPE = Shape(64, 64, 200, 300, 2, "group", "bshd", batch=3, heads=4)


def draw(name: str, spec: AttentionSpec, shape: Shape = SHAPE) -> tuple[Any, ...]:
    """The tensors that the backward takes, of one layout at every call."""
    (q, k, v), captures = on_gpu(name, shape, spec, DTYPE)
    config = str(forward_candidates(of_any_size(spec, q.shape[3], v.shape[3], DTYPE))[0])
    out, lse = attention_forward(q, k, v, captures, str(spec), config, True)
    return q, k, v, captures, out, lse, torch.randn_like(out)


def call(spec: AttentionSpec, tensors: tuple[Any, ...], dlse: Tensor | None = None) -> list[Tensor]:
    wanted = [c.kind == "float" for c in spec.captures]
    config = str(candidates(of_any_size(spec, 64, 64, DTYPE))[0])
    found: list[Tensor] = backward.attention_backward(*tensors, dlse, wanted, str(spec), config)
    return found


@pytest.mark.parametrize("name", ["plain", "causal", "swin", "causal-band", "row-scale", "alibi", "padding"])
@pytest.mark.parametrize("dlse", [False, True])
def test_replays_give_what_launches_give(name: str, dlse: bool) -> None:
    torch.manual_seed(0)
    spec = specification(name, SHAPE, DTYPE, "zero")
    backward._REPLAYS.clear()
    for turn in range(3):
        tensors = draw(name, spec)
        grad_lse = torch.randn_like(tensors[5]) if dlse else None
        found = call(spec, tensors, grad_lse)
        assert len(backward._REPLAYS) == 1, "the first call is remembered, and serves those that follow"
        if turn:
            kept = dict(backward._REPLAYS)
            backward._REPLAYS.clear()
            anew = call(spec, tensors, grad_lse)
            assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(found, anew, strict=True))
            backward._REPLAYS.update(kept)
        q, k, v, captures, _, _, dout = tensors
        assert_gradients_within_budget(spec, (q, k, v), captures, found, dout, grad_lse)


def test_a_tensor_given_twice_does_not_stand_for_two() -> None:
    spec = specification("plain", SHAPE, DTYPE)
    q, k, v, captures, out, lse, dout = draw("plain", spec)
    expected = call(spec, (q, k, v, captures, out, lse, dout))
    backward._REPLAYS.clear()
    call(spec, (q, k, k, captures, out, lse, dout))
    found = call(spec, (q, k, v, captures, out, lse, dout))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_replays_are_captured_by_graphs() -> None:
    spec = specification("causal-band", SHAPE, DTYPE, "zero")
    tensors = draw("causal-band", spec)
    for _ in range(2):
        expected = call(spec, tensors)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call(spec, tensors)
    for x in found:
        x.fill_(torch.nan)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_compiled_training_launches_without_layers_for_autograd() -> None:
    spec = specification("causal", SHAPE, DTYPE, "zero")
    q, k, v, captures, _, _, dout = draw("causal", spec)
    config = str(forward_candidates(of_any_size(spec, 64, 64, DTYPE))[0])
    tensors = (q, k, v, captures, *attention_forward(q, k, v, captures, str(spec), config, True), dout)
    arguments = (*tensors, None, [], str(spec), "")
    expected = backward.attention_backward(*arguments)
    found = torch.ops.fxopt.attention_backward_launch(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
