"""Generated kernels of linear attention, forward and backward, against float64, in the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fxopt.cache import import_source
from fxopt.codegen.linear_attention.kernel import KIND, source
from fxopt.ir.linear_attention import LinearSpec
from fxopt.testing import assert_within_budget
from tests.codegen.linear_cases import CASES, LinearCase, eager, exact

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning"),
    pytest.mark.usefixtures("poisoned_outputs"),
]
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
#: One dtype and memory order for each case, so that all of them meet.
PAIRED = [(name, list(DTYPES)[n % 3], ("bhsd", "bshd")[n % 2]) for n, name in enumerate(CASES)]
ALSO = [("causal", "f16", "bshd"), ("cross", "bf16", "bhsd"), ("class-token", "bf16", "bshd")]


def config_of(case: LinearCase) -> str:
    tokens = max(case.rows, case.keys)
    whole = 64 if 32 < tokens <= 64 else 32
    return f"quadratic-{16}x16w4g2" if tokens < 16 and case.head_dim > 16 else f"linear-{whole}x16w4g2"


def module_of(case: LinearCase, spec: LinearSpec, dtype: torch.dtype) -> Any:
    text = source(spec, case.head_dim, case.value_dim, dtype, case.optional, config_of(case))
    return import_source(KIND, text)


def launch(case: LinearCase, dtype: torch.dtype, layout: str, programs: int | None = None) -> list[Tensor]:
    """Result and gradients; with ``programs`` sequences are divided as for a device of so many."""
    spec, given = case.spec(dtype, layout), case.draw(dtype)
    module = module_of(case, spec, dtype)
    usual = module.PROGRAMS
    module.PROGRAMS = usual if programs is None else programs
    try:
        operands = [x for x in given if x is not None]
        out, attended, sums = module.launch(*operands, with_sums=True)
        whole = attended if case.optional.taps else out
        return [out, *module.launch_backward(*operands, whole, sums, cotangent(out))]
    finally:
        module.PROGRAMS = usual


def cotangent(out: Tensor) -> Tensor:
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype)


def check(case: LinearCase, dtype: torch.dtype, layout: str, programs: int | None = None) -> None:
    out, *found = launch(case, dtype, layout, programs)
    given = case.draw(dtype)
    expected, gradients = exact(case, given, cotangent(out))
    usual, usual_gradients = eager(case, given, cotangent(out))
    bshd = out.transpose(1, 2).is_contiguous()
    assert out.dtype == dtype and (bshd if layout == "bshd" else out.is_contiguous())
    assert_within_budget(out, usual, expected)
    for actual, plain, right in zip(found, usual_gradients, gradients, strict=True):
        assert_within_budget(actual, plain, right)


@pytest.mark.parametrize(("name", "dtype", "layout"), [*PAIRED, *ALSO])
def test_kernels_are_within_the_budget_of_eager(name: str, dtype: str, layout: str) -> None:
    check(CASES[name], DTYPES[dtype], layout)


@pytest.mark.parametrize("name", ["sequence", "causal", "causal-padded", "grid"])
def test_divided_sequences_are_within_the_budget_of_eager(name: str) -> None:
    case = CASES[name]
    longer = LinearCase(16, 24, 300, 300, case.operands, case.causal) if not case.side else case
    check(longer, torch.float32, "bshd", programs=32)


@pytest.mark.parametrize("name", ["causal-padded", "class-token"])
def test_two_runs_agree_to_the_last_bit(name: str) -> None:
    first, second = (launch(CASES[name], torch.float32, "bhsd") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_without_gradients_nothing_is_kept() -> None:
    case = CASES["window"]
    module = module_of(case, case.spec(torch.float32), torch.float32)
    operands = [x for x in case.draw(torch.float32) if x is not None]
    out, attended, sums = module.launch(*operands)
    assert attended.numel() == sums.numel() == 0
    torch.testing.assert_close(out, module.launch(*operands, with_sums=True)[0])


def test_nan_in_an_input_reaches_what_it_should() -> None:
    case = CASES["causal"]
    q, k, v, *_ = case.draw(torch.float32)
    assert q is not None and k is not None and v is not None
    q[0, 1, 3] = torch.nan
    k[1, 0, 140] = torch.nan
    out = module_of(case, case.spec(torch.float32), torch.float32).launch(q, k, v)[0]
    hit = out.isnan().all(-1)
    assert hit[0, 1].nonzero().flatten().tolist() == [3]
    assert hit[1, 0].nonzero().flatten().tolist() == list(range(140, 150)) and not hit[1, 1].any()


@pytest.mark.parametrize(("rows", "keys"), [(0, 0), (5, 0), (0, 5)])
def test_sizes_of_zero(rows: int, keys: int) -> None:
    case = LinearCase(16, 16, 7, 7)
    module = module_of(case, case.spec(torch.float32), torch.float32)
    q, k, v = torch.randn(2, 2, rows, 16), torch.randn(2, 2, keys, 16), torch.randn(2, 2, keys, 16)
    out, _, sums = module.launch(q, k, v, with_sums=True)
    assert torch.equal(out, torch.zeros(2, 2, rows, 16))
    gradients = module.launch_backward(q, k, v, out, sums, torch.ones_like(out))
    assert all(torch.equal(x, torch.zeros_like(x)) for x in gradients)


def test_a_block_that_is_too_small_is_refused() -> None:
    case = CASES["short"]
    module = module_of(case, case.spec(torch.float32), torch.float32)
    q = torch.randn(1, 2, 40, 64)
    with pytest.raises(ValueError, match="at most 16 tokens"):
        module.launch(q, q, q, torch.randn(2, 40, 64))
