"""Masks that a model holds in buffers: proved of what the buffers hold, and proved again when that changes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt import backend
from fxopt.ir import held
from fxopt.ir.held import Unchanged, contents, doubt_of
from fxopt.testing import assert_within_budget, oracle

SIZE = 12
HELD = 32


def causal(size: int = HELD) -> Tensor:
    return torch.ones(1, 1, size, size).tril()


class Attention(nn.Module):
    """Scores, ``change`` with the buffer, softmax."""

    def __init__(self, change: Callable[[Tensor, Tensor], Tensor], mask: Tensor, persistent: bool = True) -> None:
        super().__init__()
        self.change = change
        self.register_buffer("mask", mask, persistent=persistent)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, keys = q.shape[2], k.shape[2]
        return self.change(q @ k.mT * 0.25, self.get_buffer("mask")[..., :rows, :keys]).softmax(-1) @ v


class Model(nn.Module):
    def __init__(self, *layers: Attention) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for layer in self.layers:
            q = layer(q, k, v)
        return q


def nano(scores: Tensor, held: Tensor) -> Tensor:
    return scores.masked_fill(held == 0, float("-inf"))


def additive(scores: Tensor, held: Tensor) -> Tensor:
    return scores + held


def operands(size: int = SIZE) -> tuple[Tensor, ...]:
    return tuple(torch.randn(2, 3, size, 16) for _ in range(3))


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Compiled:
    """A model optimized, the reasons of the attentions of its last compilation, and how often it was compiled."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.optimized = model, fxopt.optimize(model, base="eager", strict=True)
        self.reasons: list[str] = []
        self.notes: tuple[str, ...] = ()
        self.times = 0

    def check(self, *inputs: Tensor) -> None:
        with backend.collecting() as (outcomes, failures):
            found = self.optimized(*inputs)
        assert not failures
        self.times += len(outcomes)
        if outcomes:
            self.notes = outcomes[-1].report.notes
            self.reasons = [site.reason for site in outcomes[-1].report.sites if site.kind == "attention"]
        assert_within_budget(found, self.model(*inputs), oracle(self.model, *inputs))


#: What is done with the buffer, what that holds, and the proof.
HOLD: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Tensor, str]] = {
    "tril == 0": (nano, causal(), "j <= i"),
    "where": (lambda s, m: torch.where(m, s, torch.finfo(s.dtype).min), causal().bool(), "j <= i"),
    "uint8": (lambda s, m: s.masked_fill(m.logical_not(), float("-inf")), causal().to(torch.uint8), "j <= i"),
    "added": (additive, torch.zeros(HELD, HELD).masked_fill(causal()[0, 0] == 0, float("-inf")), "j <= i"),
    "arithmetic": (lambda s, m: s + (1 - m) * torch.finfo(s.dtype).min, causal(), "j <= i"),
    "window": (nano, causal().triu(-3), "0 <= i - j < 4"),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", HOLD)
def test_masks_in_buffers_are_proved(name: str, dynamic: bool) -> None:
    change, mask, form = HOLD[name]
    compiled = Compiled(Model(Attention(change, mask), Attention(change, mask.clone(), persistent=False)).eval())
    inputs = operands()
    for tensor in inputs * dynamic:
        torch._dynamo.mark_dynamic(tensor, 2)
    with torch.no_grad():
        compiled.check(*inputs)
        assert [reason.rpartition("; ")[2] for reason in compiled.reasons] == [f"mask: {form}"] * 2
        assert not any("loaded" in reason for reason in compiled.reasons)
        assert "2 buffers of the model (layers.0.mask, layers.1.mask) held" in compiled.notes[0]
        if dynamic:
            compiled.check(*operands(SIZE + 5))
        assert compiled.times == 1


def test_gradients_flow_as_before() -> None:
    compiled = Compiled(Model(Attention(nano, causal())))
    inputs = tuple(x.requires_grad_() for x in operands())
    compiled.check(*inputs)
    assert compiled.reasons[0].endswith("mask: j <= i")


def _almost() -> Tensor:
    mask = causal()
    mask[..., 5, 9] = 1
    return mask


@pytest.mark.parametrize("mask", [_almost(), torch.rand(1, 1, HELD, HELD).round()], ids=["almost causal", "random"])
def test_buffers_without_structure_are_loaded_and_free_to_change(mask: Tensor) -> None:
    mask[..., 0] = 1
    compiled = Compiled(Model(Attention(nano, mask)).eval())
    inputs = operands()
    compiled.check(*inputs)
    assert "it depends on no input, but has no structure that is known" in compiled.reasons[0] and not compiled.notes
    with torch.no_grad():
        mask.copy_(causal())
    compiled.check(*inputs)
    assert compiled.times == 1


def _fill(model: Model) -> None:
    model.layers[0].get_buffer("mask").fill_(1)


def _through_a_view(model: Model) -> None:
    model.layers[0].get_buffer("mask")[..., 2, 7] = 1


def _detached(model: Model) -> None:
    model.layers[0].get_buffer("mask").detach().triu_(-2)


def _load(model: Model) -> None:
    model.load_state_dict({"layers.0.mask": causal().triu(-2)})


def _replace(model: Model) -> None:
    model.layers[0].register_buffer("mask", causal().triu(-2))


def _swap_data(model: Model) -> None:
    model.layers[0].get_buffer("mask").data = causal().triu(-2)


@pytest.mark.parametrize("skipping", [False, True])
@pytest.mark.parametrize("edit", [_fill, _through_a_view, _detached, _load, _replace, _swap_data])
def test_a_change_is_noticed_and_proved_anew(edit: Callable[[Model], None], skipping: bool) -> None:
    model = Model(Attention(nano, causal())).eval()
    compiled = Compiled(model)
    inputs = operands()
    # Guards on what is below a module may be skipped as long as its dictionaries are those of before.
    with torch._dynamo.config.patch(use_recursive_dict_tags_for_guards=skipping):
        compiled.check(*inputs)
        with torch.no_grad():
            edit(model)
        compiled.check(*inputs)
        compiled.check(*inputs)
    assert compiled.times == 2 and not compiled.reasons[0].endswith("mask: j <= i")


def test_what_holds_the_same_is_not_compiled_anew() -> None:
    model = Model(Attention(nano, causal())).eval()
    compiled = Compiled(model)
    inputs = operands()
    compiled.check(*inputs)
    model.load_state_dict({"layers.0.mask": causal()})
    compiled.check(*inputs)
    model.layers[0].register_buffer("mask", causal())
    compiled.check(*inputs)
    assert compiled.times == 1


def test_what_changes_again_and_again_is_read_at_each_call() -> None:
    model = Model(Attention(nano, causal())).eval()
    compiled = Compiled(model)
    inputs = operands()
    for window in range(2, 9):
        with torch.no_grad():
            model.layers[0].get_buffer("mask").copy_(causal().triu(-window))
        compiled.check(*inputs)
    assert compiled.times == held.LOOKS + 1
    assert "it is run-time data (the buffer layers.0.mask: it changed several times" in compiled.reasons[0]


def test_what_is_replaced_again_and_again_is_read_at_each_call() -> None:
    model = Model(Attention(nano, causal())).eval()
    compiled = Compiled(model)
    inputs = operands()
    for window in range(2, 9):
        model.layers[0].register_buffer("mask", causal().triu(-window))
        compiled.check(*inputs)
    assert compiled.times == 5 and "its code was compiled 4 times before" in compiled.reasons[0]


def test_instances_of_a_class_share_what_was_compiled() -> None:
    layers = [Attention(nano, causal()).eval() for _ in range(6)]
    inputs = operands()
    with backend.collecting() as (outcomes, _):
        for layer in layers:
            assert_within_budget(fxopt.optimize(layer, base="eager")(*inputs), layer(*inputs), oracle(layer, *inputs))
    assert len(outcomes) == 1


def test_instances_that_hold_other_masks_have_their_own() -> None:
    layers = [Attention(nano, causal().triu(-3 * (n % 2) - 1)).eval() for n in range(4)]
    inputs = operands()
    with backend.collecting() as (outcomes, _):
        for layer in layers * 2:
            assert_within_budget(fxopt.optimize(layer, base="eager")(*inputs), layer(*inputs), oracle(layer, *inputs))
    assert len(outcomes) == 2


class Counting(Attention):
    """Edits its buffer in the call."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = super().forward(q, k, v)
        self.get_buffer("mask").mul_(1)
        return out


def test_what_the_model_edits_itself_is_read_at_each_call() -> None:
    compiled = Compiled(Counting(nano, causal()).eval())
    inputs = operands()
    for _ in range(3):
        compiled.check(*inputs)
    assert compiled.times == 1 and "is loaded for each row and key: it is run-time data" in compiled.reasons[0]


def test_parameters_and_arguments_are_read_at_each_call() -> None:
    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mask = nn.Parameter(causal(SIZE), requires_grad=False)

        def forward(self, q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
            return (nano(q @ k.mT, self.mask) + given).softmax(-1) @ v

    with torch.no_grad():
        compiled = Compiled(Learned().eval())
        compiled.check(*operands(), torch.zeros(SIZE, SIZE))
    assert compiled.reasons[0].count("it is run-time data") == 2 and not compiled.notes


def test_numbers_in_buffers_are_read_at_each_call() -> None:
    """A temperature that a schedule sets may change at each step."""

    class Tempered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("heat", torch.tensor(1.0))

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return (q @ k.mT * self.get_buffer("heat")).softmax(-1) @ v

    model = Tempered().eval()
    compiled = Compiled(model)
    inputs = operands()
    for heat in (1.0, 0.5, 0.25):
        model.get_buffer("heat").fill_(heat)
        compiled.check(*inputs)
    assert compiled.times == 1 and not compiled.notes


def test_the_report_of_rewrite_says_that_buffers_are_read() -> None:
    reason = fxopt.rewrite(Model(Attention(nano, causal())).eval(), operands()).report.sites[0].reason
    assert "the buffer layers.0.mask: a program that is not compiled by fxopt.optimize reads it at each call" in reason


def test_unchanged_tells_contents_dtypes_and_shapes_apart() -> None:
    tensor = causal()
    digest = contents(tensor)
    assert digest is not None
    unchanged = Unchanged(digest)
    for check in (unchanged, pickle.loads(pickle.dumps(unchanged)), copy.deepcopy(unchanged)):
        assert check(tensor) and check(tensor.clone()) and check(tensor.mT.contiguous().mT)
        assert not check(tensor.double()) and not check(tensor[0]) and not check(tensor.triu(-3))


def test_what_is_not_counted_is_documented() -> None:
    """A write through ``.data`` and one through NumPy; everything else is counted (see `fxopt.ir.held`)."""
    tensor = causal()
    digest = contents(tensor)
    assert digest is not None
    unchanged = Unchanged(digest)
    assert unchanged(tensor)
    tensor.data.fill_(0)
    assert "``.data``" in str(held.__doc__) and "NumPy" in str(held.__doc__)
    assert unchanged(tensor)


def test_doubt() -> None:
    with torch.inference_mode():
        unversioned = torch.ones(3)
    cases: list[tuple[Any, str]] = [
        (torch.ones(3), ""), (nn.Parameter(torch.ones(3), requires_grad=False), "no plain tensor"),
        (torch.ones(3, requires_grad=True), "learned"), (unversioned, "inference mode"),
        (torch.ones(3, device="meta"), "no plain tensor"), (torch.ones(3, dtype=torch.complex64), "no plain numbers"),
        (torch.eye(3).to_sparse(), "no plain numbers"), (torch.ones(1).expand(2**27), "larger than 256 MiB"),
    ]  # fmt: skip
    for tensor, doubt in cases:
        assert doubt in doubt_of(tensor) and bool(doubt) == bool(doubt_of(tensor))
        assert (contents(tensor) is None) == bool(doubt)
