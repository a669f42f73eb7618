"""``fxopt::attention_packed``: the attention of columns of one tensor, and one gradient for all of them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._functorch.aot_autograd import aot_function

from fxopt.codegen.attention import packed as operator
from fxopt.codegen.attention import reference
from fxopt.codegen.attention.backward import operator as backward
from fxopt.codegen.attention.packed import Heads, Places, attention_packed, unpacked
from fxopt.codegen.launching import DECOMPOSITIONS
from fxopt.errors import LoweringError
from fxopt.ir.attention import AttentionSpec, Capture
from fxopt.ir.expression import parse
from tests.codegen.cases import PLACES as USUAL
from tests.codegen.offline import compiler

CONFIG = "64x32w4s2"
WIDE = torch.float64
SPEC = AttentionSpec(
    parse("s * 0.3 + c0"), parse("j <= i"), (Capture("-h--", WIDE),), out_dtype=WIDE, out_layout="bshd"
)
#: Also heads that lie apart without filling the tensor in turn.
PLACES = {**USUAL, "values behind pairs": Places(8, Heads(0, 16, 2), Heads(8, 16, 2), Heads(32, 8, 2))}
attention_launch = torch.ops.fxopt.attention_forward_launch.default


def draw(places: Places, dtype: torch.dtype = WIDE, length: int = 7) -> tuple[Tensor, Tensor]:
    """The packed tensor and a bias for each head, both requiring a gradient."""
    torch.manual_seed(0)
    whole = torch.randn(2, length, places.columns).to(dtype).requires_grad_()
    return whole, torch.randn(1, places.q.number, 1, 1).to(dtype).requires_grad_()


def by_views(whole: Tensor, bias: Tensor, places: Places, spec: AttentionSpec, seed: Tensor | None = None) -> Tensor:
    return reference.attention(*unpacked(whole, places), [bias], str(spec), seed)


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("with_lse", [False, True])
def test_opcheck(name: str, with_lse: bool) -> None:
    whole, bias = draw(PLACES[name])
    given = (whole, [bias], str(SPEC), PLACES[name].numbers(), CONFIG, with_lse)
    assert set(torch.library.opcheck(attention_packed, given).values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", PLACES)
def test_results_and_gradients_are_those_of_the_views(name: str) -> None:
    places = PLACES[name]
    whole, bias = draw(places)
    out, lse = attention_packed(whole, [bias], str(SPEC), places.numbers(), CONFIG, True)
    expected = by_views(whole, bias, places, SPEC)
    q, k, _ = unpacked(whole, places)
    expected_lse = torch.logsumexp(reference.logits(SPEC, q, k, [bias]), -1)
    cotangents = [torch.randn_like(out), torch.randn_like(lse)]
    found = torch.autograd.grad([out, lse], [whole, bias], cotangents)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        found, torch.autograd.grad([expected, expected_lse.float()], [whole, bias], cotangents), rtol=1e-6, atol=1e-6
    )
    assert found[0].stride() == whole.stride()


def test_gradients_of_what_was_dropped() -> None:
    places, seed = PLACES["heads of each apart"], torch.tensor([5])
    spec = dataclasses.replace(SPEC, dropout=0.25)
    whole, bias = draw(places)
    out, _ = attention_packed(whole, [bias], str(spec), places.numbers(), CONFIG, True, seed)
    expected = by_views(whole, bias, places, spec, seed)
    cotangent = torch.randn_like(out)
    found = torch.autograd.grad(out, [whole, bias], cotangent)
    torch.testing.assert_close(found, torch.autograd.grad(expected, [whole, bias], cotangent))


@pytest.mark.parametrize("name", PLACES)
def test_gradients_can_be_differentiated_again(name: str) -> None:
    whole, bias = draw(PLACES[name], length=3)

    def attend(whole: Tensor) -> Tensor:
        out: Tensor = attention_packed(whole, [bias.detach()], str(SPEC), PLACES[name].numbers(), CONFIG, True)[0]
        return out

    assert torch.autograd.gradgradcheck(attend, whole)


def test_memory_orders_other_than_contiguous() -> None:
    """The gradient is laid out as the tensor is; columns need not lie side by side."""
    places = PLACES["heads of each apart"]
    whole, bias = draw(places)
    for other in (whole.detach().transpose(0, 1).contiguous().transpose(0, 1), whole.detach().mT.contiguous().mT):
        leaf = other.requires_grad_()
        out, _ = attention_packed(leaf, [bias], str(SPEC), places.numbers(), CONFIG, True)
        (found,) = torch.autograd.grad(out.square().sum(), leaf)
        (expected,) = torch.autograd.grad(by_views(whole, bias, places, SPEC).square().sum(), whole)
        torch.testing.assert_close(found, expected)
        assert found.stride() == other.stride()


@pytest.mark.parametrize("name", PLACES)
def test_base_compilers_launch_without_layers_for_autograd(name: str) -> None:
    """The forward takes views that they know, and there is nothing in the backward that puts gradients together."""
    places = PLACES[name]
    operands = draw(places)
    graphs: list[list[object]] = []

    def attend(whole: Tensor, bias: Tensor) -> Tensor:
        out: Tensor = attention_packed(whole, [bias], str(SPEC), places.numbers(), CONFIG, True)[0]
        return out

    def base(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        graphs.append([node.target for node in gm.graph.nodes if node.op == "call_function"])
        return make_boxed_func(gm.forward)

    compiled = aot_function(attend, fw_compiler=base, bw_compiler=base, decompositions=DECOMPOSITIONS)
    out = compiled(*operands)
    cotangent = torch.randn_like(out)
    found = torch.autograd.grad(out, operands, cotangent)
    torch.testing.assert_close(found, torch.autograd.grad(attend(*operands), operands, cotangent))
    forward, gradients = ([op for op in graph if isinstance(op, torch._ops.OpOverload)] for graph in graphs)
    views = {getattr(torch.ops.aten, name) for name in ("slice", "view", "transpose", "unfold", "detach")}
    assert forward.count(attention_launch) == 1
    assert {op.overloadpacket for op in forward if op is not attention_launch} <= views
    launch = torch.ops.fxopt.attention_packed_backward_launch.default
    assert [op for op in gradients if op is not torch.ops.aten.detach.default] == [launch]


@pytest.mark.parametrize(("numbers", "reason"), [
    ([8, 0, 8, 2, 16, 8, 2], "are 10 numbers, not 7"),
    ([8, 0, 8, 2, 16, 8, 2, 24, 8, 2], "every column, and each once"),
    ([8, 0, 8, 2, 16, 8, 2, 40, 8, 2], "every column, and each once"),
    ([8, 0, 8, 2, 16, 8, 2, 32, 8, 1], "of 40 columns, not of"),
])  # fmt: skip
def test_refusals_say_why(numbers: list[int], reason: str) -> None:
    spec = AttentionSpec(parse("s"))
    with pytest.raises(LoweringError, match=reason):
        attention_packed(torch.randn(1, 4, 48), [], str(spec), numbers, CONFIG, False)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize("config", ["32x32w4s2-32x32w4s2", "hopper:64x128s2"])
def test_launches_are_remembered_and_write_into_the_whole_gradient(config: str, tmp_path: Path) -> None:
    """The kernels are given parts of the gradient that is returned, at the first call and when it is repeated."""
    pytest.importorskip("triton")
    from triton.compiler import CompiledKernel

    launched: list[tuple[Any, ...]] = []
    half = torch.bfloat16
    numbers = [64, 0, 64, 2, 128, 64, 2, 256, 64, 2]
    spec = AttentionSpec(parse("s * 0.125"), parse("j <= i"), out_dtype=half, out_layout="bshd")
    backward._REPLAYS.clear()
    with compiler(tmp_path, launches=True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(CompiledKernel, "run", property(lambda _: lambda *given: launched.append(given)))
        for calls in (1, 2):
            whole, out = torch.randn(3, 70, 384).to(half), torch.randn(3, 70, 2, 64).to(half).transpose(1, 2)
            lse = torch.randn(3, 2, 70)
            given: tuple[Any, ...] = (out, lse, torch.randn_like(out), None, [], str(spec), config)
            launched.clear()
            (found,) = operator.backward_on_cuda(whole, [], numbers, *given)
            bases = [getattr(x, "base", x) for launch in launched for x in launch]
            written = {x.storage_offset(): x.shape for x in bases if isinstance(x, Tensor) and x._base is found}
            assert written == dict.fromkeys((0, 128, 256), (3, 2, 70, 64)), calls
            assert len(backward._REPLAYS) == 1
    backward._REPLAYS.clear()
