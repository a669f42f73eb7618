"""Every family of masks at an attention site, static and dynamic: what it is proved to be, and its numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim
from torch.nn import functional as F

import fxopt
from fxopt import driver
from fxopt.frontend.export import from_export
from fxopt.ir.attention import AttentionSpec, read_spec
from fxopt.ir.expression import parse
from fxopt.lowering.options import Options
from fxopt.rewriter.pipeline import PipelineResult
from fxopt.testing import assert_within_budget, oracle
from tests.analysis.mask_families import FAMILIES, NEARLY_CAUSAL, Build

HEADS, WIDTH = 3, 8
Attention = Callable[..., Tensor]


def eager(build: Build) -> Attention:
    """Scores, softmax, product; a boolean mask by a lowest finite number."""

    def attention(q: Tensor, k: Tensor, v: Tensor, *data: Tensor) -> Tensor:
        scores, mask = q @ k.transpose(-2, -1) * WIDTH**-0.5, build(q, k, *data)
        if mask.dtype is torch.bool:
            return torch.softmax(scores.masked_fill(~mask, -torch.inf), -1) @ v
        return torch.softmax(scores + mask, -1) @ v

    return attention


def fused(build: Build) -> Attention:
    """One call of scaled_dot_product_attention."""
    return lambda q, k, v, *data: F.scaled_dot_product_attention(q, k, v, attn_mask=build(q, k, *data))


def operands(rows: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * 100 + keys)
    return tuple(torch.randn(2, HEADS, n, WIDTH, generator=generator) for n in (rows, keys, keys))  # type: ignore[return-value]


def rewritten(attention: Attention, inputs: tuple[Tensor, ...], shapes: Any) -> tuple[PipelineResult, AttentionSpec]:
    """The rewritten program and its one specification."""
    result = driver.rewrite(from_export(attention, inputs, None, shapes and (shapes,)), Options(strict=True))
    (site,) = [n for n in result.program.graph.nodes if str(n.target) == "fxopt.attention.default"]
    return result, read_spec(str(site.args[4]))


def check_numbers(attention: Attention, result: PipelineResult, inputs: tuple[Tensor, ...]) -> None:
    assert_within_budget(result.program.module(*inputs)[0], attention(*inputs), oracle(attention, *inputs))


def planes(spec: AttentionSpec) -> list[str]:
    return [c.dims for c in spec.captures if {"i", "j"} <= set(c.dims)]


#: What stays of the score, besides ``s``, and the mask, by family; the mask may read ``Sq`` or ``Sk``.
MASKS = {
    "all-true": "None", "causal-compare": "j <= i", "causal-negated": "j <= i", "causal-tril": "j <= i",
    "causal-triu": "j <= i", "causal-arithmetic": "j <= i", "causal-packed": "j <= i",
    "causal-truth-of-fill": "j <= i", "window": "0 <= i - j < 5",
    "window-both-sides": "-2 <= i - j < 3", "window-additive": "0 <= i - j < 3", "strictly-causal": "j <= (i + -1)",
    "anti-causal": "j >= i", "prefix": "(j <= i) | (j <= 3)", "chunked": "(j <= i) & ((i // 4) == (j // 4))",
    "dilated": "(j <= i) & (((i - j) % 3) == 0)", "padding": "(j <= i) & c0",
    "documents": "(j <= i) & (c0 == c1)",
}  # fmt: skip
#: Rows that a mask may leave without keys give NaN eagerly, which no budget covers.
EMPTY = frozenset({"strictly-causal", "anti-causal", "padding", "window", "window-both-sides", "dilated", "chunked"})


@pytest.mark.parametrize("spelling", [eager, fused], ids=["eager", "sdpa"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", FAMILIES)
def test_family(name: str, dynamic: bool, spelling: Callable[[Build], Attention]) -> None:
    family = FAMILIES[name]
    attention = spelling(family.build)
    square = family.square or name in EMPTY
    sizes = [(7, 7 if square else 9), (12, 12 if square else 15)]
    inputs = [(*operands(*size), *family.data(*size)) for size in sizes]
    shapes: Any = None
    if dynamic:
        rows = Dim("rows", min=4, max=64)
        keys = rows if square else Dim("keys", min=4, max=64)
        along_keys = tuple({1: keys} if len(x.shape) == 2 else None for x in inputs[0][3:])
        shapes = ({2: rows}, {2: keys}, {2: keys}, *along_keys)
    result, spec = rewritten(attention, inputs[0], shapes)
    assert not planes(spec), spec
    described = {
        r.site.reason.partition("mask: ")[2] or "None" for r in result.replacements if r.site.kind == "attention"
    }
    if name in MASKS:
        assert described == {MASKS[name]}
    for given in inputs if dynamic else inputs[:1]:
        check_numbers(attention, result, given)


@pytest.mark.parametrize("name", NEARLY_CAUSAL)
def test_what_is_nearly_causal_does_not_become_causal(name: str) -> None:
    attention = fused(NEARLY_CAUSAL[name])
    rows = Dim("rows", min=4, max=64)
    result, spec = rewritten(attention, operands(7, 7), ({2: rows}, {2: rows}, {2: rows}))
    assert spec.mask != parse("j <= i")
    for size in (4, 7, 13):
        check_numbers(attention, result, operands(size, size))


@pytest.mark.parametrize("alike", [True, False])
def test_finite_fills_of_rows_that_two_masks_leave_empty(alike: bool) -> None:
    """Alike they make a row of one number, whose weights are the same; different ones stay in the score."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
        lowest = torch.finfo(q.dtype).min
        scores = torch.where(j <= i, q @ k.transpose(-2, -1), lowest)
        return torch.where(j >= 2, scores, lowest if alike else torch.finfo(torch.float16).min).softmax(-1) @ v

    result, spec = rewritten(attention, operands(7, 7), None)
    assert ("where" in str(spec.score)) != alike
    assert (spec.empty_rows == "uniform") == alike
    check_numbers(attention, result, operands(7, 7))


def test_a_cache_of_any_length_gives_a_causal_mask_from_its_end() -> None:
    def attention(q: Tensor, past: Tensor, k: Tensor) -> Tensor:
        keys = torch.cat([past, k], 2)
        places = torch.arange(q.shape[2]) + past.shape[2]
        keep = torch.arange(keys.shape[2])[None] <= places[:, None]
        return F.scaled_dot_product_attention(q, keys, keys, attn_mask=keep[None, None])

    def inputs(rows: int, past: int) -> tuple[Tensor, ...]:
        return operands(rows, rows)[0], operands(past, past)[1], operands(rows, rows)[1]

    rows, past = Dim("rows", min=2, max=64), Dim("past", min=2, max=64)
    result, spec = rewritten(attention, inputs(5, 7), ({2: rows}, {2: past}, {2: rows}))
    assert not spec.captures and str(spec.mask) in ("(j <= ((i + Sk) - Sq))", "(j <= (i + (Sk - Sq)))")
    for size in ((5, 7), (2, 30), (31, 3)):
        check_numbers(attention, result, inputs(*size))


def test_what_is_loaded_for_each_row_and_key_is_reported() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, plane: Tensor, vector: Tensor) -> Tensor:
        keep = torch.arange(q.shape[2])[:, None] >= torch.arange(k.shape[2])[None]
        scores = (q @ k.transpose(-2, -1) + plane + vector).masked_fill(~keep, -torch.inf)
        return scores.softmax(-1) @ v

    q, k, v = operands(7, 7)
    report = fxopt.explain(attention, q, k, v, torch.randn(7, 7), torch.randn(7))
    (site,) = (site for site in report.sites if site.kind == "attention")
    assert site.reason.count("is loaded for each row and key: it is run-time data") == 1
    assert site.reason.endswith("mask: j <= i")
