"""Generated kernels against float64, in the interpreter: every expression, dtype and kind of shape."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fxopt.cache import import_source
from fxopt.codegen.attention import reference
from fxopt.codegen.attention.portable.kernel import KIND, Config, read_config, source
from fxopt.ir.attention import AttentionSpec, Capture
from fxopt.ir.expression import ARITY, Expr, call, capture, const, parse
from fxopt.testing import assert_within_budget
from tests.codegen.cases import EXPRESSIONS, SHAPES, Shape, captured, operands, specification, twice

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning"),
    pytest.mark.usefixtures("poisoned_outputs"),
]
CONFIG = read_config("16x16w4s2")
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


def launch(
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: Sequence[Tensor],
    with_lse: bool = False,
    config: Config = CONFIG,
) -> tuple[Tensor, Tensor]:
    text = source(spec, q.shape[3], v.shape[3], q.dtype, config)
    out, lse = import_source(KIND, text).launch(q, k, v, captures, with_lse)
    return out, lse


def exact(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, captures: Sequence[Tensor]) -> Tensor:
    wide = [c.double() if c.is_floating_point() else c for c in captures]
    spec = dataclasses.replace(spec, out_dtype=torch.float64)
    return reference.attention(q.double(), k.double(), v.double(), wide, str(spec))


@pytest.mark.parametrize(("name", "shape", "dtype"), twice(EXPRESSIONS, SHAPES, DTYPES))
def test_kernel_is_within_the_budget_of_eager(name: str, shape: str, dtype: str) -> None:
    sizes = SHAPES[shape]
    # Empty rows of bfloat16 are zero: torch's bfloat16 product on the CPU spreads a row of NaN to the next one.
    spec = specification(name, sizes, DTYPES[dtype], empty_rows="zero" if dtype == "bf16" else "nan")
    q, k, v = operands(sizes, DTYPES[dtype])
    captures = captured(name, sizes, spec)
    out, _ = launch(spec, q, k, v, captures)
    eager = reference.attention(q, k, v, captures, str(spec))
    assert out.stride() == eager.stride()
    # Dot products of D terms round about √D times, which the few results of one row may not show of eager's.
    floor = math.sqrt(sizes.head_dim) if dtype == "f32" else 0.0
    assert_within_budget(out, eager, exact(spec, q, k, v, captures), floor=floor)


#: Head widths between powers of two, whose tiles are wider: what lies beyond the width must count nowhere.
WIDE = {"D96": Shape(96, 96, 19, 35, 1, heads=2), "D192": Shape(192, 192, 18, 21), "D192 to 96": Shape(192, 96, 17, 20)}


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("shape", WIDE)
@pytest.mark.parametrize("name", ["plain", "window", "tile-bias"])
def test_head_widths_between_powers_of_two(name: str, shape: str, dtype: str) -> None:
    sizes = WIDE[shape]
    spec = specification(name, sizes, DTYPES[dtype], "zero")
    q, k, v = operands(sizes, DTYPES[dtype])
    captures = captured(name, sizes, spec)
    out, _ = launch(spec, q, k, v, captures)
    floor = math.sqrt(sizes.head_dim) if dtype == "f32" else 0.0
    assert_within_budget(
        out, reference.attention(q, k, v, captures, str(spec)), exact(spec, q, k, v, captures), floor=floor
    )


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("keys", [64, 37])
@pytest.mark.parametrize("name", ["plain", "window", "alibi", "tile-bias"])
def test_descriptors_where_the_operands_allow(name: str, keys: int, aligned: bool) -> None:
    """By descriptors or, misaligned, by pointers; one warp per 16 rows, so that maxima are taken in several chains."""
    sizes = Shape(24, 40, 35, keys, 2, heads=4)
    spec = specification(name, sizes, torch.bfloat16, "zero")
    q, k, v = operands(sizes, torch.bfloat16)
    k, v = (x.contiguous() if aligned else x for x in (k, v))
    captures = captured(name, sizes, spec)
    config = read_config("16x32w1s2tma")
    module = import_source(KIND, source(spec, 24, 40, torch.bfloat16, config))
    assert (module.describable(k), module.describable(v)) == (aligned, aligned)
    out, _ = launch(spec, q, k, v, captures, config=config)
    eager = reference.attention(q, k, v, captures, str(spec))
    assert_within_budget(out, eager, exact(spec, q, k, v, captures))


@pytest.mark.parametrize("name", ["plain", "softcap", "window", "additive-mask", "swin"])
def test_lse_is_the_log_sum_exp_of_the_logits(name: str) -> None:
    sizes = SHAPES["tails"]
    spec = specification(name, sizes, torch.float32)
    q, k, v = operands(sizes, torch.float32)
    captures = captured(name, sizes, spec)
    _, lse = launch(spec, q, k, v, captures, with_lse=True)
    torch.testing.assert_close(lse, torch.logsumexp(reference.logits(spec, q, k, captures), -1))
    assert launch(spec, q, k, v, captures)[1].shape == (0,)


@pytest.mark.parametrize(("empty_rows", "expected"), [("nan", torch.nan), ("zero", 0.0)])
def test_rows_without_keys(empty_rows: str, expected: float) -> None:
    sizes = Shape(16, 16, 20, 20)
    spec = specification("padding", sizes, torch.float32, empty_rows)
    q, k, v = operands(sizes, torch.float32)
    kept = torch.ones(2, 1, 1, 20, dtype=torch.bool)
    kept[1] = False
    out, lse = launch(spec, q, k, v, [kept], with_lse=True)
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
    out, _ = launch(spec, q, k, v, [fill])
    mean = v.double().mean(2, keepdim=True).expand(out.shape)
    assert_within_budget(out, reference.attention(q, k, v, [fill], str(spec)), mean)


def test_nan_in_an_input_reaches_its_rows_and_no_others() -> None:
    sizes = Shape(16, 16, 20, 20)
    spec = specification("causal", sizes, torch.float32)
    q, k, v = operands(sizes, torch.float32)
    q[0, 1, 3] = torch.nan
    k[1, 0, 19] = torch.nan
    out, _ = launch(spec, q, k, v, [])
    hit = out.isnan().any(-1)
    assert hit.nonzero().tolist() == [[0, 1, 3], [1, 0, 19]]


def test_strides_of_zero_and_of_the_innermost_axis() -> None:
    sizes = Shape(16, 16, 18, 18)
    spec = specification("tile-bias", sizes, torch.float32)
    q, k, v = operands(sizes, torch.float32)
    q, k = q.transpose(2, 3).contiguous().transpose(2, 3), k[:1].expand(2, -1, -1, -1)
    bias = torch.randn(1, 2, 1, 18).expand(1, 2, 18, 18)
    torch.testing.assert_close(launch(spec, q, k, v, [bias])[0], exact(spec, q, k, v, [bias]).float())


@pytest.mark.parametrize("keys", [0, 5])
@pytest.mark.parametrize("rows", [0, 5])
def test_sizes_of_zero(rows: int, keys: int) -> None:
    sizes = Shape(16, 16, rows, keys)
    spec = specification("plain", sizes, torch.float32)
    q, k, v = (torch.randn(2, 2, n, 16) for n in (rows, keys, keys))
    torch.testing.assert_close(launch(spec, q, k, v, [])[0], reference.attention(q, k, v, [], str(spec)))


def _operation(op: str) -> Expr:
    row, column = capture(0), capture(1)
    reals = {1: (row,), 2: (row, column), 3: (call("gt", row, column), row, column)}[ARITY[op]]
    if op in ("and", "or"):
        reals = (call("gt", row, const(1.0)), call("gt", column, const(1.0)))
    value = call(op, *((call("gt", row, const(1.0)),) if op == "not" else reals))
    boolean = op in ("lt", "le", "gt", "ge", "eq", "ne", "and", "or", "not")
    return call("where", value, const(1.0), const(-1.0)) if boolean else value


@pytest.mark.parametrize("op", ARITY)
def test_emitted_operation_means_what_evaluation_means(op: str) -> None:
    expr = call("add", parse("s"), _operation(op))
    spec = AttentionSpec(expr, None, (Capture("bhi-", torch.float32), Capture("b--j", torch.float32)))
    q, k, v = operands(Shape(16, 16, 17, 18), torch.float32)
    captures = [torch.rand(2, 2, 17, 1) * 3 + 0.1, torch.rand(2, 1, 1, 18) * 2 + 0.3]
    torch.testing.assert_close(launch(spec, q, k, v, captures)[0], exact(spec, q, k, v, captures).float())


@pytest.mark.parametrize("text", [
    "s + float((j - i) // 3)", "s + float((j - i) % 5)", "s + float(minimum(abs(i - j), 4))", "s + float(h * 2 - b)",
    "s + float((j - i) ** 2) / 64", "s + 2 ** (float(i - j) / 8)", "s * (1 - float(c0))", "float(i * j) / 100",
    "s + tanh(s / 100.0) + tanh(s * 3)", "s + (c0 + i) * 0.5", "s + maximum(c0, i) ** 3 * 0.001",
])  # fmt: skip
def test_integer_arithmetic(text: str) -> None:
    spec = AttentionSpec(parse(text), None, (Capture("b--j", torch.bool),))
    if "maximum" in text:
        spec = dataclasses.replace(spec, captures=(Capture("b--j", torch.int64),))
    q, k, v = operands(Shape(16, 16, 17, 18), torch.float32)
    drawn = torch.randint(0, 2, (2, 1, 1, 18))
    captures = [drawn if "maximum" in text else drawn.bool()]
    torch.testing.assert_close(launch(spec, q, k, v, captures)[0], exact(spec, q, k, v, captures).float())
