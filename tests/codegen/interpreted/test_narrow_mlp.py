"""The generated kernel of narrow feed-forward blocks against float64, in the interpreter."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from fxopt.cache import import_source
from fxopt.codegen.mlp.narrow_mlp.config import candidates
from fxopt.codegen.mlp.narrow_mlp.kernel import KIND, source
from fxopt.testing import assert_within_budget
from tests.codegen.narrow_mlp.cases import CASES, Case, Operands, wide

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning"),
    pytest.mark.usefixtures("poisoned_outputs"),
]
SMALL = "32x32w4s1"


def launcher(case: Case, operands: Operands, config: str = SMALL) -> Callable[..., Tensor]:
    x, up, _, down, *_ = operands
    text = source(case.problem(x.shape[-1], up.shape[0], down.shape[0]), config)
    launch: Callable[..., Tensor] = import_source(KIND, text).launch
    return launch


def check(case: Case, operands: Operands, config: str = SMALL) -> None:
    found = launcher(case, operands, config)(*operands)
    eager, exact = case.meaning(operands), case.meaning(wide(operands))
    assert found.dtype == case.dtype and found.is_contiguous() and found.shape == eager.shape
    assert_within_budget(found, eager, exact, floor=1.0)


@pytest.mark.parametrize(("width", "hidden"), [(32, 128), (96, 96), (16, 32), (112, 64), (192, 64)])
@pytest.mark.parametrize("name", CASES)
def test_it_is_within_the_budget_of_eager(name: str, width: int, hidden: int) -> None:
    check(CASES[name], CASES[name].operands(37, width=width, hidden=hidden))


@pytest.mark.parametrize("rows", [(1,), (), (32,), (33,), (3, 5, 7), (64, 1)])
@pytest.mark.parametrize("name", ["gelu bf16", "gelu f16"])
def test_any_number_of_rows_on_any_number_of_axes(name: str, rows: tuple[int, ...]) -> None:
    check(CASES[name], CASES[name].operands(*rows, width=48, hidden=64))


@pytest.mark.parametrize(("width", "hidden", "out"), [(96, 64, 32), (32, 128, 80), (16, 48, 192), (176, 32, 16)])
@pytest.mark.parametrize("name", ["gelu bf16", "silu f16"])
def test_results_may_be_wider_or_narrower(name: str, width: int, hidden: int, out: int) -> None:
    case = CASES[name]
    operands = case.operands(21, width=width, hidden=hidden, out=out)
    check(case, operands, candidates(case.problem(width, hidden, out))[0])


@pytest.mark.parametrize("width", [64, 96, 128, 192])
@pytest.mark.parametrize("name", ["gelu bf16", "gelu f16"])
def test_every_configuration_of_a_width(name: str, width: int) -> None:
    case = CASES[name]
    for config in candidates(case.problem(width, 2 * width)):
        check(case, case.operands(130, width=width, hidden=2 * width), config)


def test_hidden_elements_in_pieces_of_sixteen() -> None:
    case = CASES["gelu bf16"]
    (config,) = candidates(case.problem(32, 80))
    assert config == "128x16w8s3"
    check(case, case.operands(5, width=32, hidden=80), config)


def test_rows_of_any_distance() -> None:
    case = CASES["gelu bf16"]
    x, *weights, residual = case.operands(4, 3, width=32, hidden=64)
    assert residual is not None
    gapped = torch.full((4, 3, 64), torch.nan, dtype=x.dtype)[..., 16:48].copy_(x)
    repeated = residual[:1, :1].expand(4, 3, 32)
    assert gapped.stride() == (192, 64, 1) and repeated.stride() == (0, 0, 1)
    check(case, (gapped, *weights, repeated))  # type: ignore[arg-type]


def test_weights_of_any_strides() -> None:
    case = CASES["gelu bf16"]
    x, up, up_bias, down, down_bias, residual = case.operands(9, width=32, hidden=64)
    apart = torch.full((128, 96), torch.nan, dtype=x.dtype)[::2, ::3].copy_(up)
    check(case, (x, apart, up_bias, down.t().contiguous().t(), down_bias, residual))


def test_both_layers_may_share_a_weight() -> None:
    case = CASES["gelu bf16"]
    x, up, up_bias, _, down_bias, residual = case.operands(9, width=32, hidden=64)
    check(case, (x, up, up_bias, up.t(), down_bias, residual))


def test_the_input_may_be_the_residual() -> None:
    case = CASES["gelu bf16"]
    x, *rest, _ = case.operands(9, width=32, hidden=64)
    check(case, (x, *rest, x))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CASES)
def test_nan_and_infinity_stay_in_their_rows(name: str) -> None:
    case = CASES[name]
    operands = case.operands(7, width=32, hidden=32)
    operands[0][2, 31], operands[0][4, 0] = torch.nan, torch.inf
    found, eager = launcher(case, operands)(*operands), case.meaning(operands)
    assert torch.equal(found.isnan(), eager.isnan())
    assert found[[0, 1, 3, 5, 6]].isfinite().all()


@pytest.mark.parametrize("name", CASES)
def test_large_hidden_elements(name: str) -> None:
    case = CASES[name]
    x, up, up_bias, down, down_bias, residual = case.operands(16, width=32, hidden=32)
    for scale in (8, 64):
        check(case, (x * scale, up, up_bias, down, down_bias, residual))


@pytest.mark.parametrize("rows", [(0,), (2, 0), (0, 3)])
def test_no_rows(rows: Sequence[int]) -> None:
    case = CASES["gelu bf16"]
    operands = case.operands(*rows, width=32, hidden=32)
    assert launcher(case, operands)(*operands).shape == (*rows, 32)
