"""Lowering of attention with dropout: its candidates, the seed in front of the kernel, and programs that run with it.

There is no GPU here: the objection to other devices is taken away, and the operator computes in plain PyTorch.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch.nn import functional as F

from fxopt import backend, driver
from fxopt.codegen.attention import reference, sdpa
from fxopt.codegen.attention.backward.config import RECOMPUTE
from fxopt.errors import PassError
from fxopt.frontend.export import from_export
from fxopt.ir.attention import AttentionSpec, read_spec
from fxopt.ir.expression import parse
from fxopt.ir.operators import overload
from fxopt.ir.program import Program
from fxopt.lowering import attention as lowering
from fxopt.lowering.attention import candidates
from fxopt.lowering.candidate import DRAW_SEED
from fxopt.lowering.kernels import kernel_sources
from fxopt.lowering.lower import lower
from fxopt.lowering.options import Options

FORWARD = torch.ops.fxopt.attention_forward.default


class Attention(nn.Module):
    """Two attentions that drop weights while training, the second causal."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        p = F.dropout((q @ k.transpose(-2, -1) * 0.25).softmax(-1), 0.25, self.training)
        first = p @ v
        return first, F.scaled_dot_product_attention(q, k, v, dropout_p=0.5 if self.training else 0.0, is_causal=True)


def operands(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 12, 16).to(dtype).requires_grad_() for _ in range(3))
    return q, k, v


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Generated kernels are candidates on the CPU as well."""
    monkeypatch.setattr(lowering, "triton_objection", lambda operands, widths: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


def program(*inputs: Tensor) -> Program:
    return driver.rewrite(from_export(Attention().train(), inputs), Options(strict=True)).program


def sites(of: Program) -> list[torch.fx.Node]:
    return of.graph.find_nodes(op="call_function", target=overload("attention"))


@pytest.mark.usefixtures("everywhere")
def test_candidates_in_training_have_a_generated_backward_and_a_seed() -> None:
    site = sites(program(*operands()))[0]
    found, refused = candidates(site, training=True)
    generated = [c for c in found if c.family == "triton"]
    assert generated and all(c.seeded for c in generated) and found[-1].name == "aten"
    assert not any(RECOMPUTE in c.name for c in generated)
    assert refused["sdpa-cpu"] == "it has no dropout"
    assert refused["triton-short"] == "it drops no weights"


@pytest.mark.usefixtures("everywhere")
def test_without_a_generated_backward_there_is_no_generated_candidate_in_training() -> None:
    """The recomputation in plain PyTorch would spend a hundred integer operations on each weight."""
    spec = AttentionSpec(parse("s"), dropout=0.5, out_dtype=torch.bfloat16)
    q, k, v = operands()
    for training, expected in ((True, 0), (False, 1)):
        refused: dict[str, str] = {}
        found = lowering._generated(spec, q, k, v, training, refused)
        assert min(len(found), 1) == expected
        assert ("too coarse" in refused.get("triton-backward", "")) == training
    refused = {}
    found = lowering._generated(dataclasses.replace(spec, dropout=0.0), q, k, v, True, refused)
    assert found and all(c.name.endswith(RECOMPUTE) and not c.seeded for c in found)


@pytest.mark.usefixtures("everywhere")
def test_each_site_draws_a_seed_just_before_its_kernel() -> None:
    lowered, decisions = lower(program(*operands()), training=True, option="triton")
    calls = [n for n in lowered.graph.nodes if n.target in (DRAW_SEED, FORWARD)]
    assert [n.target for n in calls] == [DRAW_SEED, FORWARD] * 2
    assert [n.args[7] for n in calls[1::2]] == calls[::2]
    assert [n.meta["val"].shape for n in calls[::2]] == [(1,)] * 2
    assert all(d.chosen.startswith("triton") for d in decisions)


@pytest.mark.usefixtures("everywhere")
def test_the_sources_of_the_kernels_are_listed() -> None:
    lowered, _ = lower(program(*operands()), training=True, option="triton")
    sources = kernel_sources(lowered)
    assert len(sources) == 4 and sum(name.endswith("_backward") for name in sources) == 2
    assert all("stays(seed, b, h, " in text for text in sources.values())


@pytest.mark.usefixtures("everywhere")
def test_the_program_drops_what_its_seeds_say() -> None:
    q, k, v = operands()
    rewritten = program(q, k, v)
    lowered, _ = lower(rewritten, training=True, option="triton")
    specs = [str(site.args[4]) for site in sites(rewritten)]
    torch.manual_seed(5)
    results = lowered.module(q, k, v)
    torch.manual_seed(5)
    for spec, result in zip(specs, results, strict=True):
        seed = DRAW_SEED(0, 2**63 - 1, [1], dtype=torch.int64, device="cpu")
        torch.testing.assert_close(result, reference.attention(q, k, v, [], spec, seed))
    again = lowered.module(q, k, v)
    assert not any(torch.equal(a, b) for a, b in zip(results, again, strict=True)), "each call draws anew"


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("base", ["eager", "aot_eager", "inductor"])
def test_a_compiled_program_goes_back_over_the_weights_that_it_dropped(base: str) -> None:
    """Values that are an identity show the weights used, of which the gradient of the values is the transpose."""
    torch._dynamo.reset()
    model = Attention().train()
    compiled = torch.compile(model, backend="fxopt", options={"lower": "triton", "base": base, "strict": True})
    q, k, _ = operands()
    v = torch.eye(16)[:12].expand(2, 4, 12, 16).contiguous().requires_grad_()
    drawn = []
    with backend.collecting() as (outcomes, failures):
        for _ in range(2):
            for number in range(2):
                used = compiled(q, k, v)[number]
                cotangent = torch.randn_like(used)
                (found,) = torch.autograd.grad(used, v, cotangent)
                torch.testing.assert_close(found, used[..., :12].mT @ cotangent)
                drawn.append(used.detach() == 0)
    assert not failures and len(outcomes) == 1
    assert not torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[1], drawn[3]), "each call draws anew"
    assert 0.1 < drawn[0][..., :12].float().mean() < 0.4


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("base", ["eager", "aot_eager", "inductor"])
def test_the_same_seed_of_torch_drops_the_same(base: str) -> None:
    torch._dynamo.reset()
    model = Attention().train()
    compiled = torch.compile(model, backend="fxopt", options={"lower": "triton", "base": base, "strict": True})
    results = []
    for seed in (1, 1, 1, 2):
        q, k, v = operands()
        torch.manual_seed(seed)
        results.append(compiled(q, k, v))
    for first, second, third, other in zip(*results, strict=True):
        assert torch.equal(first, second) and torch.equal(second, third) and not torch.equal(second, other)


@pytest.mark.parametrize("option", ["aten", "auto"])
def test_on_the_cpu_the_generator_drops_as_eager_does(option: str) -> None:
    q, k, v = operands()
    model = Attention().train()
    before = torch.get_rng_state()
    lowered, decisions = lower(program(q, k, v), training=True, option=option)
    assert [d.chosen for d in decisions] == ["aten"] * 2
    torch.set_rng_state(before)
    expected = model(q, k, v)
    for seed, same in ((before, True), (None, False)):
        if seed is not None:
            torch.set_rng_state(seed)
        found = lowered.module(q, k, v)[0]
        assert torch.allclose(found, expected[0]) == same


@pytest.mark.usefixtures("everywhere")
def test_lowering_leaves_the_generator_as_it_was() -> None:
    """Whether decisions were measured or cached, the program draws the same numbers."""
    rewritten = program(*operands())
    torch.manual_seed(3)
    before = torch.get_rng_state()
    lower(rewritten, training=True)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("backend_name", "reason"), [
    ("flash", "rounds the probability"), ("cudnn", "not known"), ("efficient", None), ("cpu", "no dropout"),
])  # fmt: skip
def test_kernels_of_pytorch_drop_with_the_probability_asked_for_or_not_at_all(
    backend_name: str, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sdpa, "BACKENDS", dict.fromkeys(sdpa.BACKENDS, "cpu"))
    spec = AttentionSpec(parse("s * 0.25"), dropout=0.1, out_dtype=torch.bfloat16)
    found = sdpa.objection(spec, *operands(torch.bfloat16), backend_name)
    assert (found is None) if reason is None else reason in str(found)
    certain = dataclasses.replace(spec, dropout=1.0)
    assert sdpa.objection(certain, *operands(torch.bfloat16), backend_name) is not None


def test_rewrites_are_verified_with_the_same_weights_dropped() -> None:
    """Numerically too: original, rewrite and oracle draw the same mask from the same state of the generator."""
    with_dropout = driver.rewrite(from_export(Attention().train(), operands()), Options(strict=True, verify="numeric"))
    specs = [read_spec(str(site.args[4])) for site in sites(with_dropout.program)]
    assert [spec.dropout for spec in specs] == [0.25, 0.5]


@pytest.mark.parametrize("wrong", [
    lambda spec, weights, seed: weights * (1 - spec.dropout), lambda spec, weights, seed: F.dropout(weights, 0.3),
])  # fmt: skip
def test_a_rewrite_that_drops_otherwise_is_found(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "dropped", wrong)
    with pytest.raises(PassError, match="error budget"):
        driver.rewrite(from_export(Attention().train(), operands()), Options(strict=True, verify="numeric"))
