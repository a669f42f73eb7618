"""Generated kernels of attention weights and statistics against float64, in the interpreter."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import get_args

import pytest
import torch
from torch import Tensor

from fxopt.cache import import_source
from fxopt.codegen.attention import reference
from fxopt.codegen.attention.portable import kernel as portable
from fxopt.codegen.attention.weights.kernel import KIND, sharing_objection, source
from fxopt.codegen.attention.weights.reference import exact_weights, reduction
from fxopt.codegen.attention.weights.source import KINDS
from fxopt.errors import LoweringError
from fxopt.ir.attention import AttentionSpec, Capture, EmptyRows
from fxopt.ir.expression import parse
from fxopt.testing import assert_within_budget
from tests.codegen.cases import EXPRESSIONS, SHAPES, Shape, captured, operands, specification

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning"),
    pytest.mark.usefixtures("poisoned_outputs"),
]
CONFIG = "16x16w4s2"
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


def launch(
    spec: AttentionSpec, q: Tensor, k: Tensor, captures: Sequence[Tensor], kind: str, known: bool = False
) -> Tensor:
    """The kernel's result; ``known`` gives it the log-sum-exp of the attention's own kernel, with strides."""
    module = import_source(KIND, source(spec, q.shape[3], q.dtype, kind, CONFIG, known))
    if not known:
        out: Tensor = module.launch(q, k, captures)
        return out
    text = portable.source(spec, q.shape[3], q.shape[3], q.dtype, portable.read_config(CONFIG))
    lse = import_source(portable.KIND, text).launch(q, k, k, captures, True)[1]
    given: Tensor = module.launch(q, k, captures, lse.repeat_interleave(2, 2)[:, :, ::2])
    return given


def meaning(spec: AttentionSpec, q: Tensor, k: Tensor, captures: Sequence[Tensor], kind: str) -> Tensor:
    weights = exact_weights(spec, q, k, captures)
    return (weights if kind == "weights" else reduction(kind)(weights)).to(spec.out_dtype)


def check(
    spec: AttentionSpec, q: Tensor, k: Tensor, captures: Sequence[Tensor], kind: str, known: bool = False
) -> None:
    out = launch(spec, q, k, captures, kind, known)
    wide = [c.double() if c.is_floating_point() else c for c in captures]
    exact = meaning(dataclasses.replace(spec, out_dtype=torch.float64), q.double(), k.double(), wide, kind)
    eager = meaning(spec, q, k, captures, kind)
    assert out.is_contiguous() and out.dtype == spec.out_dtype
    assert_within_budget(out, eager, exact)


#: Every expression with every kind, and every shape and dtype with each of both.
CROSS = [
    (name, kind, list(SHAPES)[(n + m) % len(SHAPES)], list(DTYPES)[(n + m) % 3])
    for n, name in enumerate(EXPRESSIONS)
    for m, kind in enumerate(KINDS)
]
SQUARE = [(name, kind, "tails", "f32") for name in ("causal", "window", "lengths") for kind in KINDS]


@pytest.mark.parametrize(("name", "kind", "shape", "dtype"), [*CROSS, *SQUARE])
def test_kernel_is_within_the_budget_of_eager(name: str, kind: str, shape: str, dtype: str) -> None:
    sizes = SHAPES[shape]
    spec = specification(name, sizes, DTYPES[dtype], "zero" if dtype == "bf16" else "nan")
    q, k, _ = operands(sizes, DTYPES[dtype])
    check(spec, q, k, captured(name, sizes, spec), kind)


#: Every expression whose log-sum-exp tells the weights with every kind, and every shape and dtype with some of both.
ONE_WALK = [
    (name, kind, list(SHAPES)[(n + m) % len(SHAPES)], ("bf16", "f16")[(n + m) % 2])
    for n, name in enumerate(EXPRESSIONS)
    for m, kind in enumerate(KINDS)
    if sharing_objection(specification(name, SHAPES["tails"], torch.bfloat16), torch.bfloat16) is None
]


@pytest.mark.parametrize(("name", "kind", "shape", "dtype"), ONE_WALK)
def test_one_walk_by_the_log_sum_exp_is_within_the_budget_of_eager(
    name: str, kind: str, shape: str, dtype: str
) -> None:
    sizes = SHAPES[shape]
    spec = specification(name, sizes, DTYPES[dtype], "zero" if dtype == "bf16" else "nan")
    q, k, _ = operands(sizes, DTYPES[dtype])
    check(spec, q, k, captured(name, sizes, spec), kind, known=True)


@pytest.mark.parametrize("score", ["s * 0.25 + c0", "where(c1, s, -10000.0)", "s + i * 65.0", "s + float(c2) * 0.5"])
def test_what_may_shift_whole_rows_is_not_shared(score: str) -> None:
    captures = (Capture("b--j", torch.float32), Capture("b--j", torch.bool), Capture("b---", torch.int64))
    spec = AttentionSpec(parse(score), None, captures)
    with pytest.raises(LoweringError, match="shift a whole row"):
        source(spec, 16, torch.bfloat16, "weights", CONFIG, known=True)
    source(spec, 16, torch.bfloat16, "weights", CONFIG)


def test_captured_numbers_of_masks_are_shared_in_half_precision() -> None:
    captures = (Capture("b---", torch.float32), Capture("b---", torch.int64))
    spec = AttentionSpec(parse("20.0 * tanh(s * 0.05)"), parse("(j < c1) & (c0 > 0.5)"), captures)
    assert sharing_objection(spec, torch.float16) is None
    assert "more digits" in (sharing_objection(spec, torch.float32) or "")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", [
    "j <= i - 20", "j >= i + 20", "(j >= i - 3) & (j <= i - 2)", "j < c0", "(j < c0) & (j >= i - 5)", "j > 100",
])  # fmt: skip
@pytest.mark.parametrize("known", [False, True])
def test_keys_that_no_row_of_a_block_sees(mask: str, kind: str, known: bool) -> None:
    """Blocks that are never visited have their weights written all the same, and rows without keys theirs."""
    lengths = torch.tensor([0, 21]).view(2, 1, 1, 1)
    captures = (Capture("b---", torch.int64),) if "c0" in mask else ()
    # Torch's bfloat16 product on the CPU is slow, and spreads a row of NaN to the next one.
    q, k, _ = operands(Shape(16, 16, 50, 55), torch.float16 if known else torch.float32)
    for rule in get_args(EmptyRows):
        spec = AttentionSpec(parse("s * 0.25"), parse(mask), captures, empty_rows=rule)
        check(spec, q, k, [lengths][: len(captures)], kind, known)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_finite_fills_weigh_all_keys_alike(kind: str) -> None:
    sizes = Shape(16, 16, 20, 37)
    spec = specification("additive-mask", sizes, torch.float32)
    q, k, _ = operands(sizes, torch.float32)
    fill = torch.full((2, 1, 1, 37), torch.finfo(torch.float32).min)
    out = launch(spec, q, k, [fill], kind)
    torch.testing.assert_close(out, torch.full_like(out, 20 / 37 if kind == "column_sum" else 1 / 37))


@pytest.mark.parametrize("known", [False, True])
def test_nan_in_an_input_reaches_its_rows_and_no_others(known: bool) -> None:
    sizes = Shape(16, 16, 20, 37)
    spec = specification("causal", sizes, torch.float32)
    spec = dataclasses.replace(spec, mask=parse("j <= i"))
    q, k, _ = operands(sizes, torch.float16 if known else torch.float32)
    q[0, 1, 3] = torch.nan
    k[1, 0, 19] = torch.nan
    hit = launch(spec, q, k, [], "weights", known).isnan().all(-1)
    assert hit.nonzero().tolist() == [[0, 1, 3], [1, 0, 19]]
    assert launch(spec, q, k, [], "column_sum", known).isnan().all(-1).nonzero().tolist() == [[0, 1], [1, 0]]
    assert launch(spec, q, k, [], "diagonal", known).isnan().nonzero().tolist() == [[0, 1, 3], [1, 0, 19]]


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "keys"), [(0, 5), (5, 0), (0, 0)])
def test_sizes_of_zero(rows: int, keys: int, kind: str, known: bool) -> None:
    spec = AttentionSpec(parse("s"))
    dtype = torch.float16 if known else torch.float32
    q, k = (torch.randn(2, 2, n, 16, dtype=dtype) for n in (rows, keys))
    torch.testing.assert_close(launch(spec, q, k, [], kind, known), meaning(spec, q, k, [], kind))


def test_column_sums_agree_to_the_last_bit() -> None:
    sizes = Shape(32, 32, 70, 45)
    spec = specification("tile-bias", sizes, torch.float32)
    q, k, _ = operands(sizes, torch.float32)
    captures = captured("tile-bias", sizes, spec)
    assert torch.equal(launch(spec, q, k, captures, "column_sum"), launch(spec, q, k, captures, "column_sum"))


def test_weights_are_those_that_give_the_output() -> None:
    sizes = SHAPES["fewer-keys"]
    spec = specification("swin", sizes, torch.float32)
    q, k, v = operands(sizes, torch.float32)
    captures = captured("swin", sizes, spec)
    weights = launch(spec, q, k, captures, "weights")
    out = torch.ops.fxopt.attention_values(weights, v, str(spec))
    torch.testing.assert_close(out, reference.attention(q, k, v, captures, str(spec)))
