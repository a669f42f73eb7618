"""Generated backward kernels against float64, in the interpreter: every expression, dtype and kind of shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import pytest
import torch
from torch import Tensor

from fxopt.cache import import_source
from fxopt.codegen.attention import reference
from fxopt.codegen.attention.backward.kernel import KIND, read_backward, source
from fxopt.codegen.attention.packed import read_places, unpacked
from fxopt.ir.attention import AttentionSpec, Capture, EmptyRows
from fxopt.ir.expression import parse
from tests.codegen.cases import EXPRESSIONS, PLACES, SHAPES, Shape, captured, operands, specification, twice
from tests.codegen.gradients import FLOWS, assert_gradients_within_budget, autograd
from tests.codegen.interpreted.test_kernel import WIDE

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning"),
    pytest.mark.usefixtures("poisoned_outputs"),
]
CONFIG = read_backward("16x32w4s2-32x16w4s2")
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


def wanted_of(captures: Sequence[Tensor]) -> list[bool]:
    return [c.is_floating_point() for c in captures]


def backward(
    spec: AttentionSpec,
    inputs: Sequence[Tensor],
    captures: Sequence[Tensor],
    dout: Tensor,
    dlse: Tensor | None = None,
    into: Sequence[Tensor] = (),
) -> list[Tensor]:
    """The gradients by the kernels, of what the reference gives; `test_lengths` takes what the forward kernel gives."""
    q, k, v = inputs
    out, lse = reference.attention_with_lse(q.float(), k.float(), v.float(), captures, str(spec))
    text = source(spec, q.shape[3], v.shape[3], q.dtype, CONFIG, wanted_of(captures))
    found: list[Tensor] = import_source(KIND, text).launch(q, k, v, captures, out, lse, dout, dlse, into)
    return found


def check(
    spec: AttentionSpec, inputs: Sequence[Tensor], captures: Sequence[Tensor], dlse: Tensor | None = None
) -> None:
    """The kernels against autograd of the reference, in the operands' dtype and in float64."""
    q, _, v = inputs
    dout = torch.randn(*q.shape[:3], v.shape[3]).to(spec.out_dtype)
    assert_gradients_within_budget(spec, inputs, captures, backward(spec, inputs, captures, dout, dlse), dout, dlse)


@pytest.mark.parametrize(("name", "shape", "dtype"), twice(EXPRESSIONS, SHAPES, DTYPES))
def test_gradients_are_within_the_budget_of_eager(name: str, shape: str, dtype: str) -> None:
    sizes = SHAPES[shape]
    # Empty rows of bfloat16 are zero: torch's bfloat16 product on the CPU spreads a row of NaN to the next one.
    spec = specification(name, sizes, DTYPES[dtype], empty_rows="zero" if dtype != "f32" else "nan")
    check(spec, operands(sizes, DTYPES[dtype]), captured(name, sizes, spec))


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("shape", WIDE)
def test_head_widths_between_powers_of_two(shape: str, dtype: str) -> None:
    sizes = WIDE[shape]
    spec = specification("causal", sizes, DTYPES[dtype], empty_rows="zero")
    check(spec, operands(sizes, DTYPES[dtype]), [])


@pytest.mark.parametrize(("name", "dtype"), [(name, ("bf16", "f32")[n % 2]) for n, name in enumerate(FLOWS)])
def test_gradients_of_captured_tensors(name: str, dtype: str) -> None:
    score, mask, dims = FLOWS[name]
    batch, rows, keys = 3, 35, 37
    sizes = {"b": batch, "h": 2, "i": rows, "j": keys, "-": 1, "p": 2, "d": rows + keys - 1}
    shape = Shape(16, 24, rows, keys, 1, "group", "bshd", batch=batch)
    how = (Capture(dims, DTYPES[dtype]),)
    spec = AttentionSpec(parse(score), None if mask is None else parse(mask), how, empty_rows="zero",
                         out_dtype=DTYPES[dtype], out_layout="bshd")  # fmt: skip
    check(spec, operands(shape, DTYPES[dtype]), [torch.randn([sizes[x] for x in dims]).to(DTYPES[dtype])])


@pytest.mark.parametrize("name", ["plain", "softcap", "window", "additive-mask"])
def test_gradient_of_the_log_sum_exp(name: str) -> None:
    sizes = SHAPES["tails"]
    spec = specification(name, sizes, torch.float32, "zero")
    check(spec, operands(sizes, torch.float32), captured(name, sizes, spec), dlse=torch.randn(2, 2, 35))


@pytest.mark.parametrize("empty_rows", get_args(EmptyRows))
@pytest.mark.parametrize("mask", ["j <= i - 5", "(j > i - 5) & (j < 12)", "c0", "(j <= i) & c0"])
def test_rows_without_keys_are_as_in_the_reference(mask: str, empty_rows: str) -> None:
    """In dv NaN, or shares of a mean, where the reference has them, also at keys that no loop visits with such a row.

    0 in dq and dk.
    """
    captures = [torch.rand(2, 1, 1, 37) < 0.5] if "c0" in mask else []
    for kept in captures:
        kept[1] = False
    how = tuple(Capture("b--j", torch.bool) for _ in captures)
    spec = AttentionSpec(parse("s * 0.25"), parse(mask), how, empty_rows=empty_rows)  # type: ignore[arg-type]
    inputs = operands(Shape(16, 16, 35, 37), torch.float32)
    check(spec, inputs, captures)
    dout = torch.randn(2, 2, 35, 16)
    expected = autograd(spec, inputs, captures, dout)
    assert expected[2].isnan().any() == (empty_rows == "nan") and not expected[0].isnan().any()


@pytest.mark.parametrize("empty_rows", get_args(EmptyRows))
def test_rows_of_infinite_bias(empty_rows: str) -> None:
    spec = AttentionSpec(parse("s * 0.25 + c0"), parse("j <= i"), (Capture("b-i-", torch.float32),),
                         empty_rows=empty_rows)  # type: ignore[arg-type]  # fmt: skip
    bias = torch.zeros(2, 1, 35, 1)
    bias[1, 0, 20:22] = -torch.inf
    check(spec, operands(Shape(16, 16, 35, 35), torch.float32), [bias])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fill", [-4000.0, -4200.0, -1e4, -1e9, -1e30, -3.3895313892515355e38])
def test_rows_of_finite_fills_share_their_weight_equally(fill: float, dtype: str) -> None:
    """Their log-sum-exp has lost the number of keys: exp(x − lse) is 1 there, not 1/n."""
    if dtype == "f16":
        fill = max(fill, -6e4)
    sizes = Shape(16, 16, 20, 37, heads=4)
    spec = specification("additive-mask", sizes, DTYPES[dtype])
    q, k, v = operands(sizes, DTYPES[dtype])
    q = q * 0 if fill > -1e5 else q  # such a fill does not absorb the scores
    mask = torch.zeros(2, 1, 1, 37, dtype=DTYPES[dtype])
    mask[0] = fill
    mask[1, ..., :30] = fill
    check(spec, (q, k, v), [mask])
    dout = torch.ones_like(q)
    dv = backward(spec, (q, k, v), [mask], dout)[2]
    torch.testing.assert_close(dv[0].float(), torch.full((2, 37, 16), 2 * 20 / 37), atol=0, rtol=2e-2)


def test_finite_fills_written_as_constants() -> None:
    spec = AttentionSpec(parse("where(c0, s * 0.125, -1e9)"), None, (Capture("b-ij", torch.bool),))
    kept = torch.rand(2, 1, 20, 37) < 0.5
    kept[0, :, 3:5] = False
    check(spec, operands(Shape(16, 16, 20, 37), torch.float32), [kept])


@pytest.mark.parametrize("lengths", [[0, 37], [20, 1]])
@pytest.mark.parametrize("kv_map", ["group", "tile"])
def test_lengths_per_batch_and_heads_that_share_keys(lengths: list[int], kv_map: str) -> None:
    spec = AttentionSpec(parse("s * 0.25"), parse("(j < c0) & (j <= i + 3)"), (Capture("b---", torch.int64),),
                         kv_map=kv_map, empty_rows="zero")  # type: ignore[arg-type]  # fmt: skip
    check(spec, operands(Shape(16, 16, 35, 37, 2, heads=6), torch.float32), [torch.tensor(lengths).view(2, 1, 1, 1)])


@pytest.mark.parametrize("keys", [0, 5])
@pytest.mark.parametrize("rows", [0, 5])
def test_sizes_of_zero(rows: int, keys: int) -> None:
    spec = AttentionSpec(parse("s + c0"), None, (Capture("-h--", torch.float32),), empty_rows="zero")
    q, k, v = (torch.randn(2, 2, n, 16) for n in (rows, keys, keys))
    captures = [torch.randn(1, 2, 1, 1)]
    found = backward(spec, (q, k, v), captures, torch.randn(2, 2, rows, 16))
    assert [x.shape for x in found] == [x.shape for x in (q, k, v, *captures)]
    assert all(x.isfinite().all() for x in found)


def test_the_same_inputs_give_the_same_bits() -> None:
    sizes = SHAPES["grouped"]
    spec = specification("swin", sizes, torch.bfloat16)
    inputs, captures = operands(sizes, torch.bfloat16), captured("swin", sizes, spec)
    dout = torch.randn(2, 4, 16, 32).to(torch.bfloat16)
    first, second = (backward(spec, inputs, captures, dout) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("text", [
    "minimum(s, 1.0) + maximum(s * 0.5, c0)", "abs(s) * 0.3", "where(s > 0.0, s, s * 0.1)", "s * sigmoid(s)",
    "s / (1.0 + abs(s))", "-s", "float(j) * 0.01", "s * -0.25 + sqrt(abs(c0) + 1.0)",
])  # fmt: skip
def test_derivatives_of_other_scores(text: str) -> None:
    spec = AttentionSpec(parse(text), None, (Capture("b--j", torch.float32),))
    check(spec, operands(Shape(16, 16, 17, 18), torch.float32), [torch.randn(2, 1, 1, 18)])


#: Padded head widths, heads that share keys, and every kind of scratch beside the gradients.
INTO = [
    ("causal", 80, "bf16", "heads of each apart"),
    ("window", 24, "f32", "heads in turn"),
    ("padding", 32, "f16", "values first"),
    ("swin", 16, "bf16", "one key/value head"),
    ("alibi", 40, "f32", "heads of each apart"),
]


@pytest.mark.parametrize(("name", "width", "dtype", "order"), INTO)
def test_gradients_are_written_into_parts_of_one_tensor(name: str, width: int, dtype: str, order: str) -> None:
    """The same bits as in memory of their own, in every column."""
    scaled = PLACES[order].numbers()
    factor = width // PLACES[order].width
    places = read_places([n * factor if at % 3 != 0 or at == 0 else n for at, n in enumerate(scaled)])
    sizes = Shape(width, width, 35, 35, places.k.number, "group", "bshd")
    spec = specification(name, sizes, DTYPES[dtype], empty_rows="zero")
    captures = captured(name, sizes, spec)
    q, k, v = unpacked(torch.randn(2, 35, places.columns).to(DTYPES[dtype]), places)
    dout = torch.randn(2, 2, 35, width).to(DTYPES[dtype])
    expected = backward(spec, (q, k, v), captures, dout)
    whole = torch.full((2, 35, places.columns), float("nan"), dtype=DTYPES[dtype])
    into = unpacked(whole, places)
    found = backward(spec, (q, k, v), captures, dout, into=into)
    assert all(a is b for a, b in zip(found, into, strict=False)) and not whole.isnan().any()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
