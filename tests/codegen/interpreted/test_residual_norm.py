"""Generated kernels of residual norms against float64, forward and backward, in the interpreter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fxopt.cache import import_source
from fxopt.codegen.norm.residual_norm.config import backward_candidates, candidates
from fxopt.codegen.norm.residual_norm.kernel import KIND, backward_source, source
from fxopt.testing import assert_within_budget
from tests.codegen.residual_norm.cases import CASES, Case, gradients, wide

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning"),
    pytest.mark.usefixtures("poisoned_outputs"),
]
#: Sizes ``[..., C]``: powers of two, tails of a chunk, odd widths, several chunks, one row, one element.
SIZES = [(5, 64), (3, 96), (2, 3, 768), (7, 700), (3, 1000), (1, 1), (9, 33), (1, 384), (2, 1111), (2, 4096)]
#: Each case with every other size, each size with every other case.
TURNS = [(name, sizes) for n, name in enumerate(CASES) for m, sizes in enumerate(SIZES) if (n + m) % 2 == 0]


def forward(case: Case, width: int, config: str = "") -> Callable[..., Any]:
    text = source(case.problem(width), config or candidates(width)[0])
    launch: Callable[..., Any] = import_source(KIND, text).launch
    return launch


def check(case: Case, operands: Sequence[Tensor | None], config: str = "") -> None:
    assert operands[0] is not None
    width = operands[0].shape[-1]
    normal, total, mean, scale = forward(case, width, config)(*operands)
    eager, exact = case.meaning(operands), case.meaning(wide(operands))
    assert normal.dtype == eager[0].dtype and normal.is_contiguous() and total.is_contiguous()
    torch.testing.assert_close(total, eager[1].contiguous(), rtol=0, atol=0)
    assert_within_budget(normal, eager[0], exact[0], floor=1.0)
    rows = total.double()
    centre = rows.mean(-1) if case.kind == "layer_norm" else torch.zeros(())
    deviation = (rows - centre[..., None]).square().mean(-1)
    torch.testing.assert_close(scale.double(), torch.rsqrt(deviation + case.eps), rtol=1e-5, atol=1e-5)
    if case.kind == "layer_norm":
        torch.testing.assert_close(mean.double(), centre, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "sizes"), TURNS)
def test_forward_is_within_the_budget_of_eager(name: str, sizes: tuple[int, ...]) -> None:
    check(CASES[name], CASES[name].operands(*sizes))


@pytest.mark.parametrize("width", [64, 200, 513, 1500, 3000, 8192, 10000, 16384])
def test_every_configuration_of_a_width(width: int) -> None:
    for config in candidates(width):
        check(CASES["layer bf16"], CASES["layer bf16"].operands(3, width), config)
    for config in backward_candidates(width):
        check_backward(CASES["layer bf16"], (3, width), config)


@pytest.mark.parametrize("width", [16385, 20000, 32768])
@pytest.mark.parametrize("name", ["layer bf16", "layer after", "rms llama", "layer wide stream", "layer plain"])
def test_long_rows(name: str, width: int) -> None:
    for config in candidates(width):
        check(CASES[name], CASES[name].operands(2, width), config)


@pytest.mark.parametrize("width", [96, 20000])
def test_a_large_mean_does_not_cancel(width: int) -> None:
    case = CASES["layer f32"]
    x, residual, weight, bias = case.operands(3, width)
    assert x is not None
    check(case, [x + 1000, residual, weight, bias])


@pytest.mark.parametrize("name", ["layer bf16", "rms llama"])
def test_what_is_not_wanted_is_not_written(name: str) -> None:
    case = CASES[name]
    operands = case.operands(3, 100)
    normal, total, mean, scale = forward(case, 100)(*operands, with_sum=False, with_statistics=False)
    assert (total.numel(), mean.numel(), scale.numel()) == (0, 0, 0)
    torch.testing.assert_close(normal, forward(case, 100)(*operands)[0], rtol=0, atol=0)


def test_rows_of_any_distance() -> None:
    case = CASES["layer bf16"]
    x, residual, weight, bias = case.operands(4, 3, 96)
    assert x is not None and residual is not None
    gapped = torch.full((4, 3, 128), torch.nan, dtype=x.dtype)[..., :96].copy_(x)
    repeated = residual[:1, :1].expand(4, 3, 96)
    assert gapped.stride() == (384, 128, 1) and repeated.stride() == (0, 0, 1)
    check(case, [gapped, repeated, weight, bias])


@pytest.mark.parametrize("name", ["layer bf16", "rms llama"])
def test_nan_and_infinity_stay_in_their_rows(name: str) -> None:
    case = CASES[name]
    x, *rest = case.operands(7, 100)
    assert x is not None
    x[2, 99], x[4, 0] = torch.nan, torch.inf
    normal = forward(case, 100)(x, *rest)[0]
    assert normal.isnan().any(-1).tolist() == [False, False, True, False, True, False, False]


@pytest.mark.parametrize("sizes", [(0, 64), (2, 0, 64)])
def test_no_rows(sizes: tuple[int, ...]) -> None:
    case = CASES["layer bf16"]
    normal, total, mean, scale = forward(case, 64)(*case.operands(*sizes))
    assert (normal.shape, total.shape, mean.shape, scale.shape) == (*[sizes] * 2, *[sizes[:-1]] * 2)
    launch = import_source(KIND, backward_source(case.problem(64), "4w4p4", ["weight", "bias"])).launch
    dx, dweight, dbias = launch(normal, total, total, mean, scale, torch.ones(64))
    assert dx.shape == sizes and not dweight.any() and not dbias.any()


def check_backward(
    case: Case, sizes: tuple[int, ...], config: str = "", *, with_dsum: bool = True, wanted: Sequence[str] | None = None
) -> None:
    operands = case.operands(*sizes)
    eager = case.meaning(operands)
    torch.manual_seed(1)
    dnormal = torch.randn(sizes).to(eager[0].dtype)
    dsum = torch.randn(sizes).to(eager[1].dtype) if with_dsum else None
    weights = dict(zip(("weight", "bias"), operands[2:], strict=True))
    asked = [name for name, w in weights.items() if w is not None and (wanted is None or name in wanted)]
    _, total, mean, scale = forward(case, sizes[-1])(*operands)
    text = backward_source(case.problem(sizes[-1]), config or backward_candidates(sizes[-1])[0], asked)
    dx, *dweights = import_source(KIND, text).launch(dnormal, dsum, total, mean, scale, operands[2])
    expected = gradients(case, operands, (dnormal, dsum))
    exact = gradients(case, wide(operands), (dnormal.double(), None if dsum is None else dsum.double()))
    present = [name for name, w in zip(("x", "residual", "weight", "bias"), operands, strict=True) if w is not None]
    found = {"x": dx.to(case.x), "residual": dx.to(case.residual)}
    found |= {name: d for name, d in zip(("weight", "bias"), dweights, strict=True) if name in asked}
    for name, before, truth in zip(present, expected, exact, strict=True):
        if name in found:
            # Terms of these sizes are added up, or subtracted from one another.
            slope = dnormal.abs().max() * scale.max() * (1 if operands[2] is None else operands[2].abs().max())
            terms = dx.numel() // sizes[-1] if name in asked else slope
            assert found[name].dtype == before.dtype
            assert_within_budget(found[name], before, truth, floor=float(terms))


@pytest.mark.parametrize(("name", "sizes"), [(name, sizes) for name, sizes in TURNS if 1 < sizes[-1] < 4096])
def test_backward_is_within_the_budget_of_eager(name: str, sizes: tuple[int, ...]) -> None:
    check_backward(CASES[name], sizes)


def test_a_row_of_one_element_has_the_gradient_of_its_sum() -> None:
    check_backward(CASES["layer f32"], (5, 1))


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 300])
@pytest.mark.parametrize("config", ["4w4p1", "16w4p1", "1w4p2"])
def test_more_rows_than_programs(rows: int, config: str) -> None:
    check_backward(CASES["layer bf16"], (rows, 40), config)
    check_backward(CASES["rms llama"], (rows, 40), config)


@pytest.mark.parametrize("wanted", [(), ("weight",), ("bias",)])
@pytest.mark.parametrize("with_dsum", [False, True])
def test_gradients_that_nobody_wants(wanted: tuple[str, ...], with_dsum: bool) -> None:
    check_backward(CASES["layer bf16"], (9, 100), with_dsum=with_dsum, wanted=wanted)


def test_gradients_of_the_weights_agree_to_the_last_bit() -> None:
    case = CASES["layer f32"]
    x, _, weight, _ = case.operands(200, 40)
    assert x is not None
    launch = import_source(KIND, backward_source(case.problem(40), "4w4p4", ["weight", "bias"])).launch
    mean, scale = x.mean(-1), torch.ones(200)
    first, second = (launch(x, None, x, mean, scale, weight) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
