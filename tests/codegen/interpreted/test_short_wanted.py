"""Kernels for few keys that write weights, sums of them and their diagonal too, in the interpreter."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import get_args

import pytest
import torch
from torch import Tensor

from fxopt.cache import import_source
from fxopt.codegen.attention import reference
from fxopt.codegen.attention.portable.kernel import KIND
from fxopt.codegen.attention.short.kernel import source
from fxopt.codegen.attention.weights.reference import exact_weights
from fxopt.codegen.attention.weights.wants import Want
from fxopt.ir.attention import AttentionSpec, EmptyRows
from fxopt.ir.expression import parse
from fxopt.testing import assert_within_budget
from tests.codegen.cases import WITHOUT_BANDS, Shape, operands, specification
from tests.codegen.interpreted.test_short import CASES, DTYPES, drawn

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* encountered.*:RuntimeWarning"),
    pytest.mark.usefixtures("poisoned_outputs"),
]
SINGLE = torch.float32
#: What each kernel is asked for, in turn; every case has a row 0, and rows of a step that may end within it.
WANTS = {
    "class row and sums": (Want("weights", SINGLE, (0, 1, 1)), Want("column_sum", SINGLE)),
    "diagonal and sums": (Want("diagonal", SINGLE), Want("column_sum", torch.float16)),
    "rows": (Want("weights", torch.bfloat16, (6, 7, 1)), Want("weights", SINGLE, (1, 6, 2))),
    "whole": (Want("weights", torch.bfloat16), Want("weights", SINGLE)),
}
CROSS = [
    (name, case, list(DTYPES)[(n + m) % 3], list(WANTS)[(n + m + n // 3) % 4])
    for n, name in enumerate(WITHOUT_BANDS)
    for m, case in enumerate(CASES)
    if (n + m) % 2 == 0
]


def launch(
    spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, captures: Sequence[Tensor], config: str, wants: Sequence[Want]
) -> list[Tensor]:
    """The output and what is wanted."""
    text = source(spec, q.shape[3], v.shape[3], q.dtype, config, wants=tuple(wants))
    out, lse, *found = import_source(KIND, text).launch(q, k, v, captures)
    assert lse.numel() == 0 and all(x.is_contiguous() for x in found)
    return [out, *found]


def meaning(
    spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, captures: Sequence[Tensor], wants: Sequence[Want]
) -> list[Tensor]:
    weights = exact_weights(spec, q, k, captures)
    return [reference.attention(q, k, v, captures, str(spec)), *(want.of(weights) for want in wants)]


def check(
    spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, captures: Sequence[Tensor], config: str, wants: Sequence[Want]
) -> None:
    found, eager = launch(spec, q, k, v, captures, config, wants), meaning(spec, q, k, v, captures, wants)
    wide = [c.double() if c.is_floating_point() else c for c in captures]
    exactly = [dataclasses.replace(want, dtype=torch.float64) for want in wants]
    exact_spec = dataclasses.replace(spec, out_dtype=torch.float64)
    exact = meaning(exact_spec, q.double(), k.double(), v.double(), wide, exactly)
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in eager]
    assert_within_budget(found, eager, exact)


@pytest.mark.parametrize(("name", "case", "dtype", "wanted"), CROSS)
def test_all_that_is_wanted_is_within_the_budget_of_eager(name: str, case: str, dtype: str, wanted: str) -> None:
    sizes, config = CASES[case]
    spec = specification(name, sizes, DTYPES[dtype], empty_rows="zero" if dtype == "bf16" else "nan")
    q, k, v = operands(sizes, DTYPES[dtype])
    check(spec, q, k, v, drawn(name, sizes, spec), config, WANTS[wanted])


@pytest.mark.parametrize("config", ["short:16x32w1p2", "short:16x16+16w1r2"])
@pytest.mark.parametrize("rule", get_args(EmptyRows))
def test_rows_without_keys(rule: EmptyRows, config: str) -> None:
    sizes = Shape(16, 16, 20, 20)
    spec = specification("padding", sizes, SINGLE, rule)
    q, k, v = operands(sizes, SINGLE)
    kept = torch.ones(2, 1, 1, 20, dtype=torch.bool)
    kept[1] = False
    wants = (Want("weights", SINGLE), Want("column_sum", SINGLE), Want("diagonal", SINGLE))
    check(spec, q, k, v, [kept], config, wants)
    sums = launch(spec, q, k, v, [kept], config, wants)[2][1]
    expected = {"nan": torch.nan, "zero": 0.0, "uniform": 1.0}[rule]
    torch.testing.assert_close(sums, torch.full_like(sums, expected), equal_nan=True)


@pytest.mark.parametrize(
    "config", ["short:16x32+16w1r1", "short:16x32+16w1r2", "short:16x32+16w1r3", "short:16x32+16w1p2"]
)
def test_parts_of_column_sums_are_added_in_order(config: str) -> None:
    """Programs that hold a block of rows, two of three blocks, all of them, and one block for two batch entries."""
    sizes = Shape(16, 16, 40, 37)
    spec = specification("causal", sizes, SINGLE, "zero")
    q, k, v = operands(sizes, SINGLE)
    wants = (Want("column_sum", SINGLE), Want("column_sum", torch.bfloat16))
    check(spec, q, k, v, [], config, wants)
    first, second = (launch(spec, q, k, v, [], config, wants)[1] for _ in range(2))
    assert torch.equal(first, second)


def test_nan_in_an_input_reaches_its_rows_and_no_others() -> None:
    sizes = Shape(16, 16, 20, 37)
    spec = dataclasses.replace(specification("causal", sizes, SINGLE), mask=parse("j <= i"))
    q, k, v = operands(sizes, SINGLE)
    q[0, 1, 3] = torch.nan
    wants = (Want("weights", SINGLE), Want("column_sum", SINGLE), Want("diagonal", SINGLE))
    _, weights, sums, diagonal = launch(spec, q, k, v, [], "short:16x32+16w1r2", wants)
    assert weights.isnan().all(-1).nonzero().tolist() == [[0, 1, 3]]
    assert sums.isnan().all(-1).nonzero().tolist() == [[0, 1]]
    assert diagonal.isnan().nonzero().tolist() == [[0, 1, 3]]


@pytest.mark.parametrize("config", ["short:16x16w1p2", "short:16x16w1r2"])
@pytest.mark.parametrize(("batch", "rows", "keys"), [(2, 5, 0), (2, 0, 5), (0, 5, 5), (2, 0, 0)])
def test_sizes_of_zero(batch: int, rows: int, keys: int, config: str) -> None:
    spec = specification("plain", Shape(16, 16, rows, keys), SINGLE)
    q, k, v = (torch.randn(batch, 2, n, 16) for n in (rows, keys, keys))
    wants = (Want("weights", SINGLE), Want("column_sum", SINGLE), Want("diagonal", SINGLE))
    torch.testing.assert_close(launch(spec, q, k, v, [], config, wants), meaning(spec, q, k, v, [], wants))
