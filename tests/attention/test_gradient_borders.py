"""Where the user stops gradients they stay stopped, whatever is rewritten around the border."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.testing import draw
from tests.attention.check import compiled

Program = Callable[..., Tensor]


def scores_without(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    with torch.no_grad():
        scores = q @ k.transpose(-2, -1)
    return torch.softmax(scores * 0.5 + slopes, -1) @ v


def weights_without(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    with torch.no_grad():
        weights = torch.softmax(q @ k.transpose(-2, -1) + slopes, -1)
    return weights @ v


def keys_without(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    with torch.no_grad():
        scaled = k * 2
    return torch.softmax(q @ scaled.transpose(-2, -1) + slopes, -1) @ v


def scores_in_inference_mode(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    with torch.inference_mode():
        scores = q @ k.transpose(-2, -1)
    return torch.softmax(scores.clone() + slopes, -1) @ v


def distance(q: Tensor) -> Tensor:
    return torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])


def bias_detached(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-2, -1) + (slopes * distance(q)).detach(), -1) @ v


def bias_without(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    with torch.no_grad():
        bias = slopes * distance(q)
    return torch.softmax(q @ k.transpose(-2, -1) + bias, -1) @ v


def part_of_a_split(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    with torch.no_grad():
        parts = (k * 2).split(2, dim=1)
    return torch.softmax(q[:, :2] @ parts[0].transpose(-2, -1) + slopes[:2], -1) @ v[:, :2]


def all_recorded(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    with torch.no_grad(), torch.enable_grad():
        scores = q @ k.transpose(-2, -1)
    return torch.softmax(scores + slopes * distance(q), -1) @ v


PROGRAMS: tuple[Program, ...] = (
    scores_without, weights_without, keys_without, scores_in_inference_mode, bias_detached, bias_without,
    part_of_a_split, all_recorded,
)  # fmt: skip


class Plain(nn.Module):
    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program

    def forward(self, *args: Tensor) -> Tensor:
        return self.program(*args)


def operands() -> tuple[Tensor, ...]:
    q, k, v = (draw((2, 4, 5, 4), seed=seed).requires_grad_() for seed in range(3))
    return q, k, v, draw((4, 1, 1), seed=3).requires_grad_()


def gradients(program: Callable[..., Tensor]) -> tuple[Tensor | None, ...]:
    args = operands()
    result = program(*args)
    return torch.autograd.grad(result, args, torch.ones_like(result), allow_unused=True)


def assert_same(actual: tuple[Tensor | None, ...], expected: tuple[Tensor | None, ...]) -> None:
    assert [g is None for g in actual] == [g is None for g in expected]
    for got, wanted in zip(actual, expected, strict=True):
        if got is not None and wanted is not None:
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_no_gradient_crosses_a_border(program: Program) -> None:
    torch._dynamo.reset()
    assert_same(gradients(compiled(Plain(program), dynamic=False)), gradients(program))


@pytest.mark.parametrize(
    "program", [p for p in PROGRAMS if p is not scores_in_inference_mode], ids=lambda p: p.__name__
)
def test_nor_in_a_rewritten_module(program: Program) -> None:
    assert_same(gradients(fxopt.rewrite(Plain(program), operands())), gradients(program))


def test_what_is_recorded_throughout_is_one_attention() -> None:
    report = fxopt.explain(all_recorded, *operands())
    assert report.count("attention", "rewritten") == 1


def test_the_report_names_the_border() -> None:
    (site,) = fxopt.explain(scores_without, *operands()).sites
    assert site.status == "kept" and "stops at aten::detach" in site.reason
    (site,) = fxopt.explain(weights_without, *operands()).sites
    assert site.status == "kept" and "aten::detach stands between" in site.reason


def test_inputs_of_a_rewritten_module_may_learn_as_the_examples_do() -> None:
    """A sum with the lowest number lets a gradient through in rows without keys, which a mask does not."""

    def masked(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        bias = torch.where(keep, 0.0, torch.finfo(q.dtype).min)
        return torch.softmax(q @ k.transpose(-2, -1) + bias, -1) @ v

    q, k, v, _ = operands()
    keep = torch.zeros(2, 1, 5, 5, dtype=torch.bool)
    module = fxopt.rewrite(Plain(masked), (q, k, v, keep))
    actual = torch.autograd.grad(module(q, k, v, keep).square().sum(), (q, k, v))
    assert_same(actual, torch.autograd.grad(masked(q, k, v, keep).square().sum(), (q, k, v)))
