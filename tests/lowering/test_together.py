"""Lowering of an attention together with what reads its weights: what is one call, and what stays apart."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import fxopt.codegen.meanings  # noqa: F401 - canonical operators get their meaning
from fxopt import cache, driver
from fxopt.frontend.export import from_export
from fxopt.ir.decision import Decision
from fxopt.ir.program import Program
from fxopt.lowering import attention, decisions, together, weights
from fxopt.lowering.kernels import kernel_sources
from fxopt.lowering.lower import lower
from fxopt.lowering.options import Options
from fxopt.testing import assert_within_budget, evaluate, oracle_gradients

JOINT = "fxopt.attention_and_weights_forward"
Results = tuple[Tensor, ...]


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device for which kernels are generated, on which nothing is measured in truth; a cache that knows nothing."""
    for module in (attention, weights, together):
        monkeypatch.setattr(module, "triton_objection", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(attention, "build", lambda *_: None)
    monkeypatch.setattr(together, "build", lambda *_: None)
    monkeypatch.setattr(decisions, "_OF_THIS_PROCESS", {})
    cache.clear()


def operands(dtype: torch.dtype = torch.bfloat16, rows: int = 300, keys: int = 300) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(1, 2, n, 64, dtype=dtype, requires_grad=True) for n in (rows, keys, keys))


def weights_of(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT * 0.125).float().softmax(-1)


def several(q: Tensor, k: Tensor, v: Tensor) -> Results:
    p = weights_of(q, k)
    return p.to(v.dtype) @ v, p[:, :, 0, 1:], p.sum(2), p.diagonal(dim1=-2, dim2=-1)


def causal_last_row(q: Tensor, k: Tensor, v: Tensor) -> Results:
    kept = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    p = (q @ k.mT * 0.125).masked_fill(~kept, float("-inf")).float().softmax(-1)
    return p.to(v.dtype) @ v, p[:, :, -1], p[:, :, 4:10:3]


def padded_whole(q: Tensor, k: Tensor, v: Tensor) -> Results:
    kept = k[:, :1, None, :, 0] > -2
    p = (q @ k.mT * 0.125).masked_fill(~kept, float("-inf")).float().softmax(-1)
    return p.to(v.dtype) @ v, p


def rewritten(function: Callable[..., Results], given: tuple[Tensor, ...]) -> Program:
    return driver.rewrite(from_export(function, given), Options(strict=True)).program


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("function", "tokens"), [(several, 300), (several, 197), (causal_last_row, 300), (padded_whole, 49)]
)
def test_one_call_gives_the_output_and_what_is_read(
    function: Callable[..., Results], tokens: int, training: bool
) -> None:
    given = operands(rows=tokens, keys=tokens)
    lowered, (decision,) = lower(rewritten(function, given), training=training, option="triton")
    operators = lowered.operators()
    assert operators[JOINT] == 1 and not any("attention_weights" in name for name in operators)
    assert "with what reads the weights" in decision.reason and len(decision.nodes) >= 2
    lowered.graph.lint()
    found = evaluate(lowered.module, *given) if training else lowered.module(*given)
    eager = evaluate(function, *given) if training else function(*given)
    exact = oracle_gradients(function, *given)
    assert_within_budget(found, eager, exact if training else exact.outputs)


def test_its_kernels_are_shown() -> None:
    lowered, _ = lower(rewritten(several, operands()), training=False, option="triton")
    names = [name.partition("forward")[2].removeprefix("_default") for name in kernel_sources(lowered)]
    assert names == ["", "_weights_0", "_weights_1", "_weights_2"]
    assert all("lse" in text for text in kernel_sources(lowered).values())
    (one,) = kernel_sources(
        lower(rewritten(several, operands(rows=197, keys=197)), training=False, option="triton")[0]
    ).values()
    assert "want_2" in one and "add_parts_kernel" in one


def test_few_keys_are_tried_in_one_pass_and_by_walks() -> None:
    program = rewritten(several, operands(rows=197, keys=197))
    (group,) = together.groups(program)
    chosen = {site: attention.candidates(site, False)[0][0] for site in group.members}
    names = [candidate.name for candidate in together.candidates(group, chosen, training=False)]
    assert names[0].startswith("triton-short:") and "|" not in names[0]
    assert names[-1].count("|") == 1 and names[-1].count(",") == 2
    single = rewritten(several, operands(torch.float32, 49, 49))
    (group,) = together.groups(single)
    assert not together.groups(rewritten(several, operands(torch.float32, 300, 300)))
    chosen = {site: attention.candidates(site, False)[0][0] for site in group.members}
    names = [candidate.name for candidate in together.candidates(group, chosen, training=False)]
    assert names and not any("|" in name for name in names), "a log-sum-exp does not tell weights of float32"


def biased(q: Tensor, k: Tensor, v: Tensor) -> Results:
    p = (q @ k.mT * 0.125 + k[:, :, :1].mT.mean() * torch.ones_like(q[..., :1])).float().softmax(-1)
    return p.to(v.dtype) @ v, p.sum(2)


def dropped(q: Tensor, k: Tensor, v: Tensor) -> Results:
    p = weights_of(q, k)
    return torch.dropout(p, 0.5, True).to(v.dtype) @ v, p.sum(2)


def values_of_the_sums(q: Tensor, k: Tensor, v: Tensor) -> Results:
    p = weights_of(q, k)
    sums = p.sum(2)
    return p.to(v.dtype) @ (v * sums[..., None].to(v.dtype)), sums


def of_other_queries(q: Tensor, k: Tensor, v: Tensor) -> Results:
    return weights_of(q, k).to(v.dtype) @ v, (weights_of(q * 2, k).to(v.dtype) @ v)


@pytest.mark.parametrize(("function", "dtype"), [
    (several, torch.float32), (biased, torch.bfloat16), (dropped, torch.bfloat16),
    (values_of_the_sums, torch.bfloat16), (of_other_queries, torch.bfloat16),
])  # fmt: skip
def test_what_stays_apart(function: Callable[..., Results], dtype: torch.dtype) -> None:
    lowered, _ = lower(rewritten(function, operands(dtype)), training=function is dropped, option="triton")
    assert JOINT not in lowered.operators()


def twice(q: Tensor, k: Tensor, v: Tensor) -> Results:
    p, again = weights_of(q, k), weights_of(q, k)
    return p.to(v.dtype) @ v, again.to(v.dtype) @ (v + 1), again.sum(2)


def test_one_of_two_attentions_with_the_same_weights_gives_them() -> None:
    given = operands(rows=49, keys=49)
    lowered, _ = lower(rewritten(twice, given), training=False, option="triton")
    assert lowered.operators()[JOINT] == 1
    assert_within_budget(lowered.module(*given), twice(*given), oracle_gradients(twice, *given).outputs)


def test_what_can_not_be_measured_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("tried to allocate 1 GiB")

    first = lambda site, training, found, failed: {c.name: float(n) for n, c in enumerate(found)}  # noqa: E731
    monkeypatch.setattr(attention, "_measure", first)
    program = rewritten(several, operands(rows=40, keys=40))
    monkeypatch.setattr(together, "run_on", full)
    assert JOINT not in lower(program, training=False)[0].operators()


def test_weights_that_count_rows_otherwise_are_not_those_of_the_attention() -> None:
    program = rewritten(causal_last_row, operands())
    (group,) = together.groups(program)
    assert [want.rows for want in group.wants] == [(299, 300, 1), (4, 10, 3)]
    reader = group.readers[0]
    *others, text = reader.args
    for change in (("(i + 299)", "i"), ("s * 0.125", "s * 0.25"), ("rows=nan", "rows=zero")):
        assert change[0] in str(text)
        reader.args = (*others, str(text).replace(*change))
        (left,) = together.groups(program)
        assert left.readers == group.readers[1:], change


@pytest.mark.parametrize("option", ["aten", "sdpa"])
def test_no_other_lowering_is_joined(option: str) -> None:
    with pytest.warns(match="returns no weights") if option == "sdpa" else nullcontext():
        lowered, _ = lower(rewritten(several, operands()), training=False, option=option)
    assert JOINT not in lowered.operators()


@pytest.mark.parametrize("faster", ["together", "apart"])
def test_the_faster_way_is_taken_and_remembered(faster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []

    def times(group: Any, chosen: Any, found: list[Any], training: bool, failed: Any) -> dict[str, float]:
        measured.append(found[0].name)
        return {together.APART: 2.0, found[0].name: 1.0 if faster == "together" else 3.0}

    monkeypatch.setattr(together, "_measured", times)
    first = lambda site, training, found, failed: {c.name: float(n) for n, c in enumerate(found)}  # noqa: E731
    monkeypatch.setattr(attention, "_measure", first)
    for _ in range(2):
        lowered, found = lower(rewritten(several, operands()), training=False)
        assert (JOINT in lowered.operators()) == (faster == "together")
    chosen: list[Decision] = list(found)
    assert len(measured) == 1 and len(chosen) == (1 if faster == "together" else 4)
    assert faster != "together" or (chosen[0].chosen == measured[0] and chosen[0].seconds[together.APART] == 2.0)


def test_both_ways_are_timed_with_their_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    first = lambda site, training, found, failed: {c.name: float(n) for n, c in enumerate(found)}  # noqa: E731
    monkeypatch.setattr(attention, "_measure", first)
    for training in (False, True):
        _, found = lower(rewritten(several, operands(rows=40, keys=40)), training=training)
        together_with = [d for d in found if together.APART in d.seconds]
        assert all(len(d.seconds) > 1 and min(d.seconds.values()) > 0 for d in together_with)
        assert "failed" not in " ".join(d.reason for d in found)
