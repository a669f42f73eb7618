"""Kernels for few keys against float64, in the interpreter: every expression, lengths that fill pieces or don't."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fxopt.cache import import_source
from fxopt.codegen.attention import reference
from fxopt.codegen.attention.portable.kernel import KIND
from fxopt.codegen.attention.short.kernel import source
from fxopt.ir.attention import AttentionSpec
from fxopt.ir.expression import parse
from fxopt.testing import assert_within_budget
from tests.codegen.cases import WITHOUT_BANDS, Shape, captured, operands, specification

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* encountered.*:RuntimeWarning"),
    pytest.mark.usefixtures("poisoned_outputs"),
]
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
#: Sizes and configuration; five batch entries, which neither the steps nor the period of two divide.
CASES = {
    "7": (Shape(16, 16, 7, 7, 2, batch=5), "short:16x16w1p2"),
    "49 packed": (Shape(32, 32, 49, 49, 2, "group", "bshd", packed=True, batch=5), "short:64x32+32w4p3s2"),
    "49 apart": (Shape(40, 24, 20, 49, 1, "tile", batch=5), "short:16x32+16+16w1p2"),
    "64": (Shape(24, 40, 64, 64, 1, batch=5), "short:64x64w4p2"),
    "197": (Shape(16, 16, 40, 197, 2, "group", "bshd", heads=4, batch=1), "short:16x128+64+16w1r2"),
    "256": (Shape(80, 16, 33, 256, 1, "tile", heads=2, batch=2), "short:32x128+128w1r1"),
    "256 one piece": (Shape(16, 16, 17, 256, 1, batch=3), "short:16x256w4p2"),
}
CROSS = [
    (name, case, list(DTYPES)[(n + m) % 3]) for n, name in enumerate(WITHOUT_BANDS) for m, case in enumerate(CASES)
]


def launch(
    spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, captures: Sequence[Tensor], config: str, lse: bool = False
) -> tuple[Tensor, Tensor]:
    text = source(spec, q.shape[3], v.shape[3], q.dtype, config)
    found: tuple[Tensor, Tensor] = import_source(KIND, text).launch(q, k, v, captures, lse)
    return found


def exact(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, captures: Sequence[Tensor]) -> Tensor:
    wide = [c.double() if c.is_floating_point() else c for c in captures]
    spec = dataclasses.replace(spec, out_dtype=torch.float64)
    return reference.attention(q.double(), k.double(), v.double(), wide, str(spec))


def drawn(name: str, sizes: Shape, spec: AttentionSpec) -> list[Tensor]:
    """Captured tensors, periodic ones with a period of two."""
    periodic = any(c.dims[0] == "p" for c in spec.captures)
    return captured(name, dataclasses.replace(sizes, batch=2) if periodic else sizes, spec)


@pytest.mark.parametrize(("name", "case", "dtype"), CROSS)
def test_kernel_is_within_the_budget_of_eager(name: str, case: str, dtype: str) -> None:
    sizes, config = CASES[case]
    # Empty rows of bfloat16 are zero: torch's bfloat16 product on the CPU spreads a row of NaN to the next one.
    spec = specification(name, sizes, DTYPES[dtype], empty_rows="zero" if dtype == "bf16" else "nan")
    q, k, v = operands(sizes, DTYPES[dtype])
    captures = drawn(name, sizes, spec)
    out, _ = launch(spec, q, k, v, captures, config)
    eager = reference.attention(q, k, v, captures, str(spec))
    assert out.stride() == eager.stride()
    assert_within_budget(out, eager, exact(spec, q, k, v, captures))


@pytest.mark.parametrize("case", ["49 packed", "197"])
@pytest.mark.parametrize("name", ["plain", "softcap", "window", "additive-mask", "swin"])
def test_lse_is_the_log_sum_exp_of_the_logits(name: str, case: str) -> None:
    sizes, config = CASES[case]
    spec = specification(name, sizes, torch.float32)
    q, k, v = operands(sizes, torch.float32)
    captures = drawn(name, sizes, spec)
    _, lse = launch(spec, q, k, v, captures, config, lse=True)
    torch.testing.assert_close(lse, torch.logsumexp(reference.logits(spec, q, k, captures), -1))
    assert launch(spec, q, k, v, captures, config)[1].shape == (0,)


@pytest.mark.parametrize("config", ["short:16x32w1p2", "short:16x16+16w1r2"])
@pytest.mark.parametrize(("empty_rows", "expected"), [("nan", torch.nan), ("zero", 0.0)])
def test_rows_without_keys(empty_rows: str, expected: float, config: str) -> None:
    sizes = Shape(16, 16, 20, 20)
    spec = specification("padding", sizes, torch.float32, empty_rows)
    q, k, v = operands(sizes, torch.float32)
    kept = torch.ones(2, 1, 1, 20, dtype=torch.bool)
    kept[1] = False
    out, lse = launch(spec, q, k, v, [kept], config, lse=True)
    torch.testing.assert_close(out[1], torch.full_like(out[1], expected), equal_nan=True)
    assert (lse[1] == -torch.inf).all()
    assert out[0].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_finite_fills_give_the_mean_over_all_keys(dtype: str) -> None:
    sizes = Shape(16, 16, 20, 37)
    spec = specification("additive-mask", sizes, DTYPES[dtype])
    q, k, v = operands(sizes, DTYPES[dtype])
    fill = torch.full((2, 1, 1, 37), torch.finfo(torch.bfloat16).min if dtype != "f16" else -6e4, dtype=DTYPES[dtype])
    q = q * 0 if dtype == "f16" else q  # the fill of float16 does not absorb the scores
    out, _ = launch(spec, q, k, v, [fill], "short:32x32+16w1p2")
    mean = v.double().mean(2, keepdim=True).expand(out.shape)
    assert_within_budget(out, reference.attention(q, k, v, [fill], str(spec)), mean)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["49 packed", "197", "256"])
@pytest.mark.parametrize("name", ["padding", "causal-padding", "lengths"])
def test_rows_without_keys_give_the_mean_where_the_specification_says_so(name: str, case: str, dtype: str) -> None:
    sizes, config = CASES[case]
    spec = specification(name, sizes, DTYPES[dtype], empty_rows="uniform")
    q, k, v = operands(sizes, DTYPES[dtype])
    (captures,) = drawn(name, sizes, spec)
    captures[0] = 0
    out, _ = launch(spec, q, k, v, [captures], config)
    assert_within_budget(out, reference.attention(q, k, v, [captures], str(spec)), exact(spec, q, k, v, [captures]))
    mean = v[:1].double().mean(2, keepdim=True).to(out.dtype)
    shared = mean.repeat_interleave(out.shape[1] // mean.shape[1], 1).expand(out[:1].shape)
    torch.testing.assert_close(out[:1], shared, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["causal", "tile-bias", "capped-bias"])
def test_what_is_not_finite_reaches_its_rows_and_no_others(name: str, value: float) -> None:
    sizes = Shape(16, 16, 20, 20)
    spec = specification("tile-bias" if name == "capped-bias" else name, sizes, torch.float32)
    if name == "capped-bias":
        spec = dataclasses.replace(spec, score=parse("20.0 * tanh(s * 0.05) + c0"))
    q, k, v = operands(sizes, torch.float32)
    q[0, 1, 3, 5] = value
    k[1, 0, 19] = torch.nan
    captures = [torch.randn(1, 2, 20, 20)] * len(spec.captures)
    out, _ = launch(spec, q, k, v, captures, "short:16x16+16w1p2")
    expected = exact(spec, q, k, v, captures)
    assert torch.equal(out.isnan(), expected.isnan())
    assert out[1, 0].isnan().any() and out.isfinite().any()


def test_one_module_serves_all_lengths_up_to_its_pieces() -> None:
    sizes = Shape(16, 16, 20, 48)
    spec = specification("causal", sizes, torch.float32, "zero")
    for keys in (1, 16, 31, 32, 33, 48):
        q, k, v = operands(dataclasses.replace(sizes, keys=keys), torch.float32)
        out, _ = launch(spec, q, k, v, [], "short:16x32+16w1r2")
        torch.testing.assert_close(out, exact(spec, q, k, v, []).float())
    q, k, v = operands(dataclasses.replace(sizes, keys=49), torch.float32)
    with pytest.raises(ValueError, match="48 keys at most, not 49"):
        launch(spec, q, k, v, [], "short:16x32+16w1r2")


def test_strides_of_zero_and_of_the_innermost_axis() -> None:
    sizes = Shape(16, 16, 18, 18)
    spec = specification("tile-bias", sizes, torch.float32)
    q, k, v = operands(sizes, torch.float32)
    q, k = q.transpose(2, 3).contiguous().transpose(2, 3), k[:1].expand(2, -1, -1, -1)
    bias = torch.randn(1, 2, 1, 18).expand(1, 2, 18, 18)
    out, _ = launch(spec, q, k, v, [bias], "short:32x32w1p2")
    torch.testing.assert_close(out, exact(spec, q, k, v, [bias]).float())


@pytest.mark.parametrize("config", ["short:16x16w1p2", "short:16x16w1r2"])
@pytest.mark.parametrize(("batch", "rows", "keys"), [(2, 5, 0), (2, 0, 5), (0, 5, 5), (2, 0, 0)])
def test_sizes_of_zero(batch: int, rows: int, keys: int, config: str) -> None:
    spec = specification("plain", Shape(16, 16, rows, keys), torch.float32)
    q, k, v = (torch.randn(batch, 2, n, 16) for n in (rows, keys, keys))
    out, _ = launch(spec, q, k, v, [], config)
    torch.testing.assert_close(out, reference.attention(q, k, v, [], str(spec)))
