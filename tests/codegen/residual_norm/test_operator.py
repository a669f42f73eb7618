"""``fxopt::residual_norm_forward`` and its backward on the CPU: registration, gradients, refusals, what it launches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fxopt.codegen.launching import DECOMPOSITIONS, as_rows, rows_objection
from fxopt.codegen.norm.residual_norm.backward_operator import residual_norm_backward
from fxopt.codegen.norm.residual_norm.config import backward_candidates, candidates, read_config, split_config
from fxopt.codegen.norm.residual_norm.kernel import backward_objection, backward_source, source
from fxopt.codegen.norm.residual_norm.operator import residual_norm_forward
from fxopt.codegen.norm.residual_norm.problem import objection
from fxopt.errors import LoweringError
from tests.codegen.residual_norm.cases import CASES, Case

CONFIG = "4w4/4w4p4"


def settings(case: Case, with_both: bool = True) -> tuple[Any, ...]:
    return case.kind, case.eps, case.scale_after_cast, CONFIG, with_both, with_both


def leaves(case: Case, *sizes: int, dtype: torch.dtype = torch.float64) -> list[Tensor | None]:
    operands = case.operands(*sizes)
    return [None if x is None else x.to(dtype).requires_grad_() for x in operands]


@pytest.mark.parametrize("name", ["layer bf16", "layer plain", "rms llama"])
def test_opcheck(name: str) -> None:
    case = CASES[name]
    given = leaves(case, 2, 3, 8)
    results = torch.library.opcheck(residual_norm_forward, (*given, *settings(case)))
    assert set(results.values()) == {"SUCCESS"}
    normal, total, mean, scale = (x.detach() for x in residual_norm_forward(*given, *settings(case)))
    weights = [None if x is None else x.detach() for x in given[2:]]
    arguments = (normal, total, total, mean, scale, *weights, [True, True], case.kind, 1e-3, False, "4w4p4")
    results = torch.library.opcheck(residual_norm_backward, arguments)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("read", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("name", CASES)
def test_gradients_agree_with_the_meaning_under_autograd(name: str, read: tuple[int, ...]) -> None:
    case = CASES[name]
    given = leaves(case, 2, 5, 8)
    wanted = [x for x in given if x is not None]
    wanted = wanted if 0 in read else wanted[:2]
    found, expected = residual_norm_forward(*given, *settings(case)), case.meaning(given)
    cotangents = [torch.randn_like(expected[n]) for n in read]
    torch.testing.assert_close(list(found[:2]), list(expected))
    before = torch.autograd.grad([expected[n] for n in read], wanted, cotangents)
    torch.testing.assert_close(torch.autograd.grad([found[n] for n in read], wanted, cotangents), before)


@pytest.mark.parametrize("name", ["layer bf16", "rms llama"])
def test_gradients_of_gradients(name: str) -> None:
    case = CASES[name]
    given = leaves(case, 2, 3, 8)

    def both(*operands: Tensor) -> tuple[Tensor, ...]:
        rest = iter(operands)
        found: tuple[Tensor, ...]
        found = residual_norm_forward(*(None if x is None else next(rest) for x in given), *settings(case))
        return found[:2]

    assert torch.autograd.gradgradcheck(both, [x for x in given if x is not None])


def test_half_precision_gradients_keep_their_dtypes() -> None:
    case = CASES["layer wide stream"]
    given = [None if x is None else x.requires_grad_() for x in case.operands(4, 8)]
    normal, total, *_ = residual_norm_forward(*given, *settings(case))
    assert normal.dtype == total.dtype == torch.float32
    found = torch.autograd.grad(normal.square().sum() + total.sum(), [x for x in given if x is not None])
    assert [g.dtype for g in found] == [torch.bfloat16, torch.float32, torch.float32, torch.float32]


@pytest.mark.parametrize("name", ["layer bf16", "rms llama f32 weight"])
def test_results_and_their_fakes_agree(name: str) -> None:
    case = CASES[name]
    for with_both in (False, True):
        real = residual_norm_forward(*case.operands(2, 3, 8), *settings(case, with_both))
        with torch._subclasses.FakeTensorMode() as mode:
            fakes = [None if x is None else mode.from_tensor(x) for x in case.operands(2, 3, 8)]
            fake = residual_norm_forward(*fakes, *settings(case, with_both))
        assert [(x.shape, x.dtype, x.stride()) for x in real] == [(x.shape, x.dtype, x.stride()) for x in fake]


def test_a_backward_needs_sum_and_statistics() -> None:
    case = CASES["layer bf16"]
    with pytest.raises(LoweringError, match="ask for both"):
        residual_norm_forward(*leaves(case, 2, 8), *settings(case, with_both=False))


def test_operands_of_different_shapes_are_refused() -> None:
    x = torch.randn(2, 8)
    with pytest.raises(LoweringError, match="differ"):
        residual_norm_forward(x, x[:1], None, None, "layer_norm", 1e-5, False, CONFIG, True, True)


REFUSED = {
    "float64": ({"x": torch.float64}, "float64 operands"),
    "integers": ({"residual": torch.int32}, "int32 operands"),
    "another kind": ({"kind": "group_norm"}, "'group_norm' is none of"),
    "a bias": ({"kind": "rms_norm"}, "an RMSNorm has no bias"),
}


@pytest.mark.parametrize(("change", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_no_kernel_serves_is_said(change: dict[str, Any], reason: str) -> None:
    given: dict[str, Any] = vars(CASES["layer bf16"]) | change
    problem = Case(**given).problem(64)
    assert reason in str(objection(problem))
    with pytest.raises(LoweringError, match="lower it to ATen instead"):
        source(problem, "4w4")


def test_widths_that_are_refused() -> None:
    case = CASES["layer bf16"]
    assert objection(case.problem(16384)) is None and objection(case.problem(100_000)) is None
    assert "empty" in str(objection(case.problem(0)))
    assert "too long" in str(objection(case.problem(2**20)))
    assert backward_objection(case.problem(8192)) is None
    with pytest.raises(LoweringError, match="at most 8192"):
        backward_source(case.problem(8193), "1w16p1", [])


def test_configurations_are_read_as_they_are_printed() -> None:
    for width in (1, 64, 256, 768, 1024, 1500, 4096, 8192, 16384, 50000):
        texts = (*candidates(width), *backward_candidates(width))
        assert [str(read_config(text)) for text in texts] == list(texts)
    assert split_config(CONFIG) == ("4w4", "4w4p4") and split_config("4w4") == ("4w4", "")
    for text in ("", "4x4", "3w4", "4w64", "4w4p"):
        with pytest.raises(LoweringError):
            read_config(text)


def test_what_can_be_read_as_rows() -> None:
    x = torch.zeros(4, 6, 8)
    for rows in (x, x[:, :, :4], x[:, :1], x.expand(4, 6, 8), torch.zeros(8), x[:1].transpose(0, 1), x[..., :1]):
        assert rows_objection(rows) is None and as_rows(rows) is rows
    for other, reason in ((x.mT, "side by side"), (x[:, :3], "one distance"), (x.transpose(0, 1), "one distance")):
        assert reason in str(rows_objection(other))
        assert as_rows(other).is_contiguous()


def test_sources_are_deterministic_and_short_lined() -> None:
    for case in CASES.values():
        for width in (96, 1000, 8192, 16384, 20000):
            texts = [source(case.problem(width), candidates(width)[0])]
            if width <= 8192:
                texts.append(backward_source(case.problem(width), backward_candidates(width)[0], ["weight"]))
            assert texts[0] == source(case.problem(width), candidates(width)[0])
            assert max(len(line) for text in texts for line in text.splitlines()) <= 120


def test_compiled_graphs_call_the_operators_without_autograd() -> None:
    names = {str(before): str(after) for before, after in DECOMPOSITIONS.items() if "norm" in str(before)}
    assert names == {
        "fxopt.residual_norm_forward.default": "fxopt.residual_norm_forward_launch.default",
        "fxopt.residual_norm_backward.default": "fxopt.residual_norm_backward_launch.default",
    }
    case = CASES["layer bf16"]
    given = (*case.operands(2, 8), *settings(case))
    found = torch.ops.fxopt.residual_norm_forward_launch(*given)
    torch.testing.assert_close(list(found), list(residual_norm_forward(*given)))


def test_gradients_of_gradients_where_only_the_bias_learns() -> None:
    case = CASES["layer bf16"]
    x, residual, weight, bias = leaves(case, 2, 5, 8)
    assert x is not None and weight is not None and bias is not None
    given = (x, residual, weight.detach(), bias)
    found, expected = residual_norm_forward(*given, *settings(case))[0], case.meaning(list(given))[0]
    cotangent = torch.randn_like(expected)
    for actual, right in zip(
        torch.autograd.grad(found, (x, bias), cotangent, create_graph=True),
        torch.autograd.grad(expected, (x, bias), cotangent, create_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(actual, right)
