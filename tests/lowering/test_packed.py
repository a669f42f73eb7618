"""Attentions of packed projections: which take the whole tensor in training, and what keeps others from it.

There is no GPU here: the objection to other devices is taken away, and the operators compute in plain PyTorch.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fxopt import backend, cache
from fxopt.codegen.attention.packed import Heads, Places, read_places
from fxopt.ir.program import Program
from fxopt.lowering import attention as lowering
from fxopt.lowering.attention import candidates, key_of, prepare
from fxopt.lowering.kernels import kernel_sources
from fxopt.lowering.packed import PACKED
from fxopt.testing import assert_within_budget
from tests.codegen.offline import compiler
from tests.lowering.test_dropout import everywhere  # noqa: F401 - a fixture

HEADS, WIDTH = 4, 16
WHOLE = HEADS * WIDTH
Cut = Callable[[Tensor], Any]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The attention of ``[B, H, S, D]``, as ``[B, S, H·D]``."""
    return ((q @ k.mT * 0.25).softmax(-1) @ v).transpose(1, 2).flatten(2)


def heads(x: Tensor, count: int = HEADS) -> Tensor:
    return x.view(*x.shape[:2], count, -1).transpose(1, 2)


def unbound(x: Tensor) -> Any:
    return x.reshape(*x.shape[:2], 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4).unbind(0)


def selected(x: Tensor) -> Any:
    packed = x.view(*x.shape[:2], 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4)
    return packed[0], packed[1], packed[2]


def split(x: Tensor) -> Any:
    return [heads(part) for part in x.split(WHOLE, -1)]


def chunked(x: Tensor) -> Any:
    return [heads(part) for part in x.chunk(3, -1)]


def sliced(x: Tensor) -> Any:
    return heads(x[..., :WHOLE]), heads(x[..., WHOLE : 2 * WHOLE]), heads(x[..., 2 * WHOLE :])


def in_turn(x: Tensor) -> Any:
    packed = x.view(*x.shape[:2], HEADS, 3, WIDTH)
    return [packed[..., n, :].transpose(1, 2) for n in range(3)]


def in_turn_split(x: Tensor) -> Any:
    return x.view(*x.shape[:2], HEADS, 3 * WIDTH).transpose(1, 2).chunk(3, -1)


def grouped(x: Tensor) -> Any:
    """Four heads of queries, two of keys and two of values."""
    q, k, v = x.split((WHOLE, 2 * WIDTH, 2 * WIDTH), -1)
    return heads(q), heads(k, 2).repeat_interleave(2, 1), heads(v, 2).repeat_interleave(2, 1)


APART = Places(WIDTH, Heads(0, WIDTH, 4), Heads(WHOLE, WIDTH, 4), Heads(2 * WHOLE, WIDTH, 4))
IN_TURN = Places(WIDTH, Heads(0, 3 * WIDTH, 4), Heads(WIDTH, 3 * WIDTH, 4), Heads(2 * WIDTH, 3 * WIDTH, 4))
SHARED = Places(WIDTH, Heads(0, WIDTH, 4), Heads(WHOLE, WIDTH, 2), Heads(WHOLE + 2 * WIDTH, WIDTH, 2))
SPELLINGS: dict[str, tuple[Cut, Places]] = {
    "unbind": (unbound, APART), "select": (selected, APART), "split": (split, APART), "chunk": (chunked, APART),
    "slices": (sliced, APART), "in turn": (in_turn, IN_TURN), "in turn, split": (in_turn_split, IN_TURN),
    "grouped": (grouped, SHARED),
}  # fmt: skip


class Packed(nn.Module):
    """An attention of what ``cut`` makes of a packed projection."""

    def __init__(self, cut: Cut, columns: int = 3 * WHOLE, attention: Callable[..., Tensor] = attend) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(WHOLE, columns)
        self.cut, self.attention = cut, attention

    def forward(self, x: Tensor) -> Any:
        return self.attention(*self.cut(self.qkv(x)))


def compiled(model: Any, x: Tensor, base: str = "aot_eager") -> tuple[Any, list[Program]]:
    """The result of the compiled model, and its lowered programs."""
    torch._dynamo.reset()
    with backend.collecting() as (outcomes, failures):
        run: Any = torch.compile(model, backend="fxopt", options=options(base))
        out = run(x)
    assert not failures
    return out, [outcome.lowered for outcome in outcomes]


def options(base: str = "aot_eager") -> dict[str, Any]:
    return {"lower": "triton", "base": base, "strict": True}


def calls(programs: list[Program], target: Any = PACKED) -> list[torch.fx.Node]:
    return [n for program in programs for n in program.graph.find_nodes(op="call_function", target=target)]


def tokens(length: int = 10) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, length, WHOLE, requires_grad=True)


def assert_trains_like_eager(model: nn.Module, x: Tensor, out: Tensor) -> None:
    """Results and gradients of everything within the budget of eager's."""
    leaves = [x, *model.parameters()]
    eager = model(x)
    torch.manual_seed(2)
    cotangent = torch.randn_like(eager)
    found = [out, *torch.autograd.grad(out, leaves, cotangent)]
    expected = [eager, *torch.autograd.grad(eager, leaves, cotangent)]
    wide, doubled = copy.deepcopy(model).double(), x.detach().double().requires_grad_()
    exact = wide(doubled)
    oracle = [exact, *torch.autograd.grad(exact, [doubled, *wide.parameters()], cotangent.double())]
    assert_within_budget(found, expected, oracle)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("name", SPELLINGS)
def test_each_spelling_takes_the_whole_tensor(name: str) -> None:
    cut, places = SPELLINGS[name]
    model, x = Packed(cut, places.columns), tokens()
    out, programs = compiled(model, x)
    (call,) = calls(programs)
    assert read_places([int(str(n)) for n in call.args[3]]) == places  # type: ignore[union-attr]
    assert isinstance(call.args[0], torch.fx.Node) and call.args[0].name == "linear"
    assert list(call.args[0].users) == [call], "no view is left"
    assert_trains_like_eager(model, x, out)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("base", ["eager", "inductor"])
def test_each_base_trains_by_it(base: str) -> None:
    model, x = Packed(unbound), tokens()
    out, programs = compiled(model, x, base)
    assert len(calls(programs)) == 1
    assert_trains_like_eager(model, x, out)


@pytest.mark.usefixtures("everywhere")
def test_lengths_may_change() -> None:
    model = Packed(split)
    torch._dynamo.reset()
    with backend.collecting() as (outcomes, _):
        run = torch.compile(model, backend="fxopt", dynamic=True, options=options())
        for x in (tokens(10), tokens(13)):
            assert_trains_like_eager(model, x, run(x))
    assert len(calls([outcome.lowered for outcome in outcomes])) == 1


@pytest.mark.usefixtures("everywhere")
def test_a_projection_read_twice_and_a_step_that_is_recomputed() -> None:
    """The gradient of another reader of the projection is added to that of the attention."""

    class Model(Packed):
        def forward(self, x: Tensor) -> Tensor:
            packed: Tensor = self.qkv(x)
            return attend(*unbound(packed)) + packed[..., :WHOLE].tanh() * packed.sum(-1, keepdim=True)

    model, x = Model(unbound), tokens()
    out, programs = compiled(model, x)
    assert len(calls(programs)) == 1
    assert_trains_like_eager(model, x, out)
    run = torch.compile(model, backend="fxopt", options=options())
    assert_trains_like_eager(model, x, checkpoint(run, x, use_reentrant=False))


@pytest.mark.usefixtures("everywhere")
def test_gradients_of_captured_tensors() -> None:
    class Biased(Packed):
        def __init__(self) -> None:
            super().__init__(unbound)
            self.bias = nn.Parameter(torch.randn(HEADS, 10, 10))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.cut(self.qkv(x))
            attended: Tensor = (q @ k.mT * 0.25 + self.bias).softmax(-1) @ v
            return attended.transpose(1, 2).flatten(2)

    model, x = Biased(), tokens()
    out, programs = compiled(model, x)
    assert len(calls(programs)) == 1
    assert_trains_like_eager(model, x, out)


@pytest.mark.usefixtures("everywhere")
def test_dropout_goes_back_over_the_weights_that_it_dropped() -> None:
    """With values of 1 the result is the sum of a row's weights, and the gradient of each value that of a column's."""

    def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = nn.functional.dropout((q @ k.mT * 0.25).softmax(-1), 0.25, training=True)
        return weights @ v

    model = Packed(unbound, attention=dropped)
    with torch.no_grad():
        model.qkv.weight[2 * WHOLE :] = 0
        model.qkv.bias[2 * WHOLE :] = 1
    used, programs = compiled(model, tokens())
    (call,) = calls(programs)
    assert len(call.args) == 7, "the seed is the last argument"
    assert not torch.allclose(used, torch.ones_like(used))
    cotangent = torch.randn(1, HEADS, 1, WIDTH).expand_as(used).contiguous()
    (found,) = torch.autograd.grad(used, model.qkv.bias, cotangent)
    torch.testing.assert_close(found[2 * WHOLE :].view(HEADS, WIDTH), (used.detach() * cotangent).sum((0, 2)))


def rotated(x: Tensor) -> Any:
    q, k, v = unbound(x)
    return q.roll(1, -1), k, v


def with_more_columns(x: Tensor) -> Any:
    return unbound(x[..., : 3 * WHOLE])


def transposed(x: Tensor) -> Any:
    """Rows first, as projections of ``[S, B, C]`` have them."""
    return [part.view(*part.shape[:2], HEADS, -1).permute(1, 2, 0, 3) for part in x.split(WHOLE, -1)]


def copied(x: Tensor) -> Any:
    return x.view(*x.shape[:2], 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4).contiguous().unbind(0)


def keys_again(x: Tensor) -> Any:
    q, k, _ = unbound(x)
    return q, k, k


def with_keys(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return attend(q, k, v), k


NEAR: dict[str, tuple[Cut, int, Callable[..., Any]]] = {
    "what is computed lies between": (rotated, 3 * WHOLE, attend),
    "a copy lies between": (copied, 3 * WHOLE, attend),
    "columns that nobody reads": (with_more_columns, 3 * WHOLE + WIDTH, attend),
    "rows before batches": (transposed, 3 * WHOLE, lambda q, k, v: (q @ k.mT * 0.25).softmax(-1) @ v),
    "keys are values": (keys_again, 3 * WHOLE, attend),
    "keys are returned": (unbound, 3 * WHOLE, with_keys),
}


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("name", NEAR)
def test_others_take_views(name: str) -> None:
    cut, columns, attention = NEAR[name]
    _, programs = compiled(Packed(cut, columns, attention), tokens())
    assert not calls(programs)
    assert len(calls(programs, torch.ops.fxopt.attention_forward.default)) == 1


@pytest.mark.usefixtures("everywhere")
def test_nor_do_projections_without_a_gradient_or_in_inference() -> None:
    scale = nn.Parameter(torch.ones(()))
    frozen = Packed(unbound, attention=lambda *qkv: attend(*qkv) * scale).requires_grad_(False)
    _, programs = compiled(frozen, tokens().detach())
    with torch.no_grad():
        _, more = compiled(Packed(unbound), tokens())
    assert programs and more and not calls([*programs, *more])


@pytest.mark.usefixtures("everywhere")
def test_the_sources_of_the_kernels_are_listed() -> None:
    _, programs = compiled(Packed(unbound), tokens())
    sources = kernel_sources(programs[0])
    assert len(sources) == 2 and any(name.endswith("_backward") for name in sources)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
def test_measuring_compiles_nothing_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was compiled together is what is launched, forward and backward; decisions are those of whole tensors."""
    pytest.importorskip("triton")
    torch._dynamo.reset()
    with backend.collecting() as (outcomes, _):
        x = tokens().detach().bfloat16()
        torch.compile(Packed(unbound).bfloat16(), backend="fxopt", options={"lower": "aten", "base": "eager"})(x)
    (site,) = calls([outcomes[0].result.program], torch.ops.fxopt.attention.default)
    monkeypatch.setattr(lowering, "triton_objection", lambda *_: None)
    cache.clear()
    with compiler(tmp_path, launches=True) as made:
        prepare([site], training=True)
        found, _ = candidates(site, training=True)
        before = sum(not one.cached for one in made)
        failed: dict[str, str] = {}
        seconds = lowering._measure(site, True, found, failed)
        assert sum(not one.cached for one in made) == before > 0
    generated = [c.name for c in found if c.target is PACKED]
    assert generated and set(generated) <= set(seconds), failed
    assert "as one" in key_of(site, True, found) and "as one" not in key_of(site, False, found)
