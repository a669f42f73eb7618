"""What has a value for each row and key is said at its site, however it came there; and constants are proved first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

import fxopt
from fxopt import driver
from fxopt.frontend.export import from_export
from fxopt.ir.attention import AttentionSpec, read_spec
from fxopt.lowering.options import Options
from fxopt.testing import assert_within_budget, oracle

SIZE = 23
LOADED = "is loaded for each row and key"


class Spelling(nn.Module):
    """Scores, ``change``, softmax; a tensor that the module has, and one that a call brings."""

    change: Callable[..., Tensor]

    def __init__(self, change: Callable[..., Tensor], held: Tensor | None = None, buffer: bool = False) -> None:
        super().__init__()
        self.change = change
        if buffer:
            self.register_buffer("held", held)
        else:
            self.held = held

    def forward(self, q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
        held = None if self.held is None else self.held[:, :, : q.shape[2], : k.shape[2]]
        return self.change(q @ k.mT * 0.25, held, given).softmax(-1) @ v


def operands(size: int = SIZE) -> tuple[Tensor, ...]:
    return tuple(torch.randn(2, 3, size, 16) for _ in range(3))


def site_of(model: nn.Module, *inputs: Tensor, shapes: Any = None) -> tuple[AttentionSpec, str, Any]:
    """The specification of the one attention, the reason that is reported, and the rewritten program."""
    result = driver.rewrite(from_export(model, inputs, None, shapes), Options(strict=True))
    (site,) = [n for n in result.program.graph.nodes if str(n.target) == "fxopt.attention.default"]
    (reason,) = [r.site.reason for r in result.replacements if r.site.kind == "attention"]
    return read_spec(str(site.args[4])), reason, result.program


def fill(scores: Tensor, masked: Tensor) -> Tensor:
    return scores.masked_fill(masked, torch.finfo(scores.dtype).min)


def causal() -> Tensor:
    return torch.ones(1, 1, 64, 64).tril()


#: What is done to the scores, what the module holds, what is given, and the sizes of the planes that are loaded.
PLANES: dict[str, tuple[Callable[..., Tensor], Tensor | None, Tensor, list[str]]] = {
    "buffer == 0": (lambda s, held, given: fill(s, held == 0), causal(), torch.empty(0), ["[23, 23] (2.07 KiB)"]),
    "~buffer": (lambda s, held, given: fill(s, ~held), causal().bool(), torch.empty(0), ["[23, 23] (529 B)"]),
    "buffer": (lambda s, held, given: fill(s, held), causal().bool().logical_not(), torch.empty(0),
               ["[1, 1, 23, 23] (529 B)"]),
    "a mask for each of the batch": (lambda s, held, given: fill(s, ~given), None,
                                     torch.rand(2, 1, SIZE, SIZE) < 0.8, ["[2, 23, 23] (1.03 KiB)"]),
    "a bias": (lambda s, held, given: s + given, None, torch.randn(SIZE, SIZE), ["[23, 23] (2.07 KiB)"]),
    "a product": (lambda s, held, given: s + torch.einsum("bi,bj->bij", given, given)[:, None], None,
                  torch.randn(2, SIZE), ["[2, 1, 23, 23] (4.13 KiB)"]),
    "beside a vector": (lambda s, held, given: fill(s + given[0], given[:, :1] > 0), None, torch.randn(SIZE, SIZE),
                        []),
    "two": (lambda s, held, given: fill(s + given, held == 0), causal(), torch.randn(3, SIZE, SIZE),
            ["[23, 23] (2.07 KiB)", "[3, 23, 23] (6.2 KiB)"]),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANES)
def test_planes_are_said_with_their_sizes(name: str) -> None:
    change, held, given, sizes = PLANES[name]
    model = Spelling(change, held, buffer=True).eval()
    inputs = (*operands(), given)
    spec, reason, program = site_of(model, *inputs)
    planes = [f"c{n} = " for n, capture in enumerate(spec.captures) if {"i", "j"} <= set(capture.dims)]
    assert reason.count(LOADED) == len(planes) == len(sizes), reason
    assert all(name in reason for name in planes), reason
    assert all(f" {text} {LOADED}: it is run-time data" in reason for text in sizes), reason
    assert_within_budget(program.module(*held_by(model), *inputs)[0], model(*inputs), oracle(model, *inputs))


def held_by(model: nn.Module) -> list[Tensor]:
    return list(model.buffers())


def test_an_additive_mask_of_pytorch_s_layer_is_said() -> None:
    layer = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    x = torch.randn(2, SIZE, 32)
    report = fxopt.explain(
        lambda x, mask: layer(x, x, x, attn_mask=mask, need_weights=False)[0], x, torch.randn(SIZE, SIZE)
    )
    (site,) = [site for site in report.sites if site.kind == "attention"]
    assert site.reason.count(LOADED) == 1 and "[1, 1, 23, 23] (2.07 KiB)" in site.reason


def test_scaled_dot_product_attention_says_them_alike() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)

    report = fxopt.explain(attention, *operands(), torch.rand(2, 1, SIZE, SIZE) < 0.8)
    (site,) = [site for site in report.sites if site.kind == "attention"]
    assert site.reason.endswith(f"c0 = arg3_1 [2, 1, 23, 23] (1.03 KiB) {LOADED}: it is run-time data; mask: c0")


def test_sizes_that_may_change_are_names() -> None:
    length = Dim("length", min=2, max=64)
    model = Spelling(lambda s, held, given: s + given).eval()
    inputs = (*operands(), torch.randn(3, SIZE, SIZE))
    along = {2: length}
    _, reason, _ = site_of(model, *inputs, shapes=(along, along, along, {1: length, 2: length}))
    assert reason.count(LOADED) == 1 and " B)" not in reason and "[3, s" in reason


@pytest.mark.parametrize("change", [
    lambda s, held, given: s + given[:1], lambda s, held, given: fill(s, given[:, :1] > 0),
    lambda s, held, given: s + (torch.arange(SIZE)[:, None] - torch.arange(SIZE)).abs().float().sqrt(),
    lambda s, held, given: s * given[0, 0] + given[:, :1],
], ids=["keys", "rows", "band", "a number and rows"])  # fmt: skip
def test_vectors_and_bands_are_no_planes(change: Callable[..., Tensor]) -> None:
    spec, reason, _ = site_of(Spelling(change).eval(), *operands(), torch.randn(SIZE, SIZE))
    assert spec.captures and LOADED not in reason


#: A constant, how it becomes what is hidden, and the proof.
CONSTANTS: dict[str, tuple[Tensor, Callable[[Tensor], Tensor], str]] = {
    "== 0": (causal(), lambda held: held == 0, "j <= i"),
    "!= 1": (causal(), lambda held: held != 1, "j <= i"),
    "~": (causal().bool(), lambda held: ~held, "j <= i"),
    "< 0.5": (causal().triu(-7), lambda held: held < 0.5, "0 <= i - j < 8"),
    "integers": (causal().long() * 3, lambda held: held == 0, "j <= i"),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_what_compares_a_constant_is_proved(name: str) -> None:
    held, hidden, form = CONSTANTS[name]
    model = Spelling(lambda s, held, given: fill(s, hidden(held)), held).eval()
    inputs = (*operands(), torch.empty(0))
    spec, reason, program = site_of(model, *inputs)
    assert not spec.captures and reason.endswith(f"mask: {form}") and LOADED not in reason
    assert_within_budget(program.module(*inputs)[0], model(*inputs), oracle(model, *inputs))


def test_a_constant_beside_what_a_call_brings_is_proved() -> None:
    model = Spelling(lambda s, held, given: fill(s, (held == 0) | given[:, None, None]), causal()).eval()
    spec, reason, _ = site_of(model, *operands(), torch.rand(2, SIZE) < 0.3)
    assert [c.dims for c in spec.captures] == ["b--j"] and "j <= i" in reason and LOADED not in reason


def test_a_constant_that_is_nearly_causal_is_not() -> None:
    held = causal()
    held[..., 5, 9] = 1
    model = Spelling(lambda s, held, given: fill(s, held == 0), held).eval()
    inputs = (*operands(), torch.empty(0))
    spec, reason, program = site_of(model, *inputs)
    assert [c.dims for c in spec.captures] == ["--ij"]
    assert f"(2.07 KiB) {LOADED}: it depends on no input, but has no structure that is known" in reason
    assert_within_budget(program.module(*inputs)[0], model(*inputs), oracle(model, *inputs))


def test_a_buffer_may_change_and_is_read() -> None:
    """The structure of what it holds today is none of the program's."""
    model = Spelling(lambda s, held, given: fill(s, held == 0), causal(), buffer=True).eval()
    inputs = (*operands(), torch.empty(0))
    rewritten = fxopt.rewrite(model, inputs)
    with torch.no_grad():
        rewritten.get_buffer("held").fill_(1)
        model.get_buffer("held").fill_(1)
        assert_within_budget(rewritten(*inputs), model(*inputs), oracle(model, *inputs))
