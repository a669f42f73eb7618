"""fuse-sdpa: each argument of scaled_dot_product_attention reaches the specification."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fxopt import driver
from fxopt.frontend.export import from_export
from fxopt.ir.attention import AttentionSpec, read_spec
from fxopt.ir.expression import parse
from fxopt.lowering.options import Options
from fxopt.passes import FuseSdpa
from fxopt.testing import assert_within_budget, oracle


def spec_of(function: Any, *inputs: Tensor) -> AttentionSpec:
    """The specification that a function with one SDPA call is rewritten to; its numbers are checked too."""
    result = driver.rewrite(from_export(function, inputs), Options(strict=True, verify="numeric"))
    assert_within_budget(result.program.module(*inputs)[0], function(*inputs), oracle(function, *inputs))
    (site,) = [n for n in result.program.graph.nodes if "fxopt.attention" in str(n.target)]
    assert any(r.rule == "sdpa" for r in result.replacements) and FuseSdpa.name == "fuse-sdpa"
    return read_spec(str(site.args[4]))


def inputs(heads: int = 4, rank: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    shape = (2, 4, 6, 8) if rank == 4 else (2, 6, 8)
    kv = (2, heads, 6, 8) if rank == 4 else shape
    return torch.randn(shape), torch.randn(kv), torch.randn(kv)


def test_default_scale() -> None:
    assert spec_of(scaled_dot_product_attention, *inputs()).score == parse(f"s * {8**-0.5!r}")


def test_scale_and_causal() -> None:
    spec = spec_of(lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5), *inputs())
    assert spec.score == parse("s * 0.5") and spec.mask == parse("j <= i") and spec.empty_rows == "zero"


def test_boolean_mask_is_a_mask_and_additive_mask_a_bias() -> None:
    keep, bias = torch.rand(2, 1, 1, 6) > 0.3, torch.randn(4, 6, 6)
    boolean = spec_of(lambda q, k, v, m: scaled_dot_product_attention(q, k, v, attn_mask=m), *inputs(), keep)
    assert boolean.mask == parse("c0") and boolean.captures[0].dims == "b--j"
    additive = spec_of(lambda q, k, v, m: scaled_dot_product_attention(q, k, v, attn_mask=m), *inputs(), bias)
    assert additive.mask is None and additive.captures[0].dims == "-hij"


def test_a_bias_that_is_a_product_is_not_taken_for_the_scores() -> None:
    def by_position(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, q @ positions.mT)

    def of_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, torch.bmm(k[0], k[0].mT), scale=1.0)

    spec = spec_of(by_position, *inputs(), torch.randn(6, 8))
    assert spec.score == parse(f"s * {8**-0.5!r} + c0") and spec.captures[0].dims == "bhij"
    spec = spec_of(of_keys, *inputs())
    assert spec.score == parse("s + c0") and spec.captures[0].dims == "-hij"


def test_grouped_heads_and_rank_3() -> None:
    grouped = spec_of(lambda q, k, v: scaled_dot_product_attention(q, k, v, enable_gqa=True), *inputs(heads=2))
    assert grouped.kv_map == "group"
    spec_of(scaled_dot_product_attention, *inputs(rank=3))


def test_a_call_of_rank_5_is_kept_with_the_reason() -> None:
    def deeper(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q[None], k[None], v[None])[0]

    result = driver.rewrite(from_export(deeper, inputs()), Options(strict=True))
    assert not any(r.rule == "sdpa" for r in result.replacements)
    assert any("rank" in miss.reason for miss in result.near_misses)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_dropout_is_carried(dropout: float) -> None:
    torch.manual_seed(0)

    def drop(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, dropout_p=dropout)

    result = driver.rewrite(from_export(drop, inputs()), Options(strict=True))
    (site,) = [n for n in result.program.graph.nodes if "fxopt.attention" in str(n.target)]
    assert read_spec(str(site.args[4])).dropout == dropout
