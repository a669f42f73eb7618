"""Gradients of bands, and of rows that give a mean, against float64 in the interpreter: masks, blocks, odd lengths."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from fxopt.cache import import_source
from fxopt.codegen.attention import reference
from fxopt.codegen.attention.backward.kernel import KIND, read_backward, source
from fxopt.ir.attention import AttentionSpec, Capture, EmptyRows
from fxopt.ir.expression import parse
from tests.codegen.cases import Shape, operands
from tests.codegen.gradients import assert_gradients_within_budget
from tests.codegen.interpreted.test_backward import DTYPES, wanted_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning"),
    pytest.mark.usefixtures("poisoned_outputs"),
]
#: mask, and how its captured tensor is read.
MASKS: dict[str, tuple[str | None, str | None]] = {
    "all": (None, None),
    "causal": ("j <= i + (Sk - Sq)", None),
    "late": ("j <= i - 5", None),
    "window": ("(j <= i) & (j > i - 9)", None),
    "both sides": ("((i - j) < 5) & ((j - i) <= 3)", None),
    "first keys": ("j < 11", None),
    "last keys": ("(j >= 9) & (j <= i + 12)", None),
    "chunks": ("(i // 12) == (j // 12)", None),
    "prefix": ("(j <= i) | (j < 3)", None),
    "padding": ("c0", "b--j:bool"),
    "causal padding": ("(j <= i + 2) & c0", "b--j:bool"),
    "lengths": ("(j < c0) & (j >= 2)", "b---:i64"),
    "offsets": ("(j <= i + c0) & (j > i - 20)", "b---:i64"),
}
SHAPES = {
    "tails": Shape(16, 16, 19, 21, 1, "group", "bshd", batch=3),
    "one row": Shape(24, 16, 1, 18, 1, "tile"),
    "fewer keys": Shape(16, 32, 35, 10, 2, "tile", "bshd", batch=1, heads=4),
    "more keys": Shape(32, 24, 9, 41, 1),
    "whole": Shape(16, 16, 32, 32, 2, batch=1),
}
#: Blocks of the kernels: of dk and dv, of dq, and along diagonals, where those are not told by the others.
BLOCKS = (
    "16x32w4s2-32x16w4s2",
    "32x16w4s2-16x32w4s2",
    "16x16w4s1-16x16w4s1-64x16w4s1",
    "32x32w4s1-32x32w4s1-32x32w4s1",
)
DIMS = ("-h-d", "bh-d", "b--d", "---d", "p--d", "ph-d")


def drawn(how: Capture, shape: Shape) -> Tensor:
    sizes = {"b": shape.batch, "h": shape.heads, "i": shape.rows, "j": shape.keys, "-": 1, "p": 2}
    size = [(sizes | {"d": shape.rows + shape.keys - 1})[letter] for letter in how.dims]
    if how.dtype is torch.bool:
        kept = torch.rand(size) < 0.5
        kept[-1] = False
        return kept
    if how.dtype is torch.int64:
        return torch.tensor([shape.keys // 2, 0, shape.keys])[: shape.batch].view(size)
    return torch.randn(size).to(how.dtype)


def check(spec: AttentionSpec, shape: Shape, dtype: torch.dtype, blocks: str) -> list[Tensor]:
    inputs, captures = operands(shape, dtype), [drawn(how, shape) for how in spec.captures]
    dout = torch.randn(shape.batch, shape.heads, shape.rows, shape.value_dim).to(dtype)
    q, k, v = (x.float() for x in inputs)
    out, lse = reference.attention_with_lse(q, k, v, captures, str(spec))
    text = source(spec, shape.head_dim, shape.value_dim, dtype, read_backward(blocks), wanted_of(captures))
    found: list[Tensor] = import_source(KIND, text).launch(*inputs, captures, out, lse, dout)
    assert_gradients_within_budget(spec, inputs, captures, found, dout)
    return found


def attention(mask: str, score: str, band: tuple[Capture, ...], dtype: torch.dtype, shape: Shape) -> AttentionSpec:
    text, vector = MASKS[mask]
    dims, _, kind = (vector or "").partition(":")
    vectors = (Capture(dims, torch.bool if kind == "bool" else torch.int64),) if vector else ()
    rows = "uniform" if not band or mask in ("late", "padding", "offsets") else "zero"
    return AttentionSpec(
        parse(score.format(f"c{len(vectors)}")), None if text is None else parse(text), (*vectors, *band),
        kv_map=shape.kv_map, empty_rows=rows, out_dtype=dtype, out_layout=shape.layout,  # type: ignore[arg-type]
    )  # fmt: skip


#: Every mask twice; dtypes, shapes, blocks and ways to broadcast a band in turn.
TURNS = [(mask, list(DTYPES)[(n + m) % 3], n + 2 * m) for n, mask in enumerate(MASKS) for m in range(2)]


@pytest.mark.parametrize(("mask", "dtype", "turn"), TURNS)
def test_bands_under_every_mask(mask: str, dtype: str, turn: int) -> None:
    shape = list(SHAPES.values())[turn % len(SHAPES)]
    band = (Capture(DIMS[turn % len(DIMS)], DTYPES[dtype]),)
    spec = attention(mask, "s * 0.125 + {0}", band, DTYPES[dtype], shape)
    check(spec, shape, DTYPES[dtype], BLOCKS[turn % len(BLOCKS)])


@pytest.mark.parametrize(("mask", "dtype", "turn"), TURNS[4::2])
def test_rows_that_give_the_mean_under_every_mask(mask: str, dtype: str, turn: int) -> None:
    shape = list(SHAPES.values())[turn % len(SHAPES)]
    spec = attention(mask, "s * 0.125", (), DTYPES[dtype], shape)
    check(spec, shape, DTYPES[dtype], BLOCKS[turn % len(BLOCKS)])


@pytest.mark.parametrize("empty_rows", get_args(EmptyRows))
def test_the_gradient_of_a_band_where_rows_have_no_keys(empty_rows: EmptyRows) -> None:
    """Such rows give nothing to it, whatever they give themselves."""
    spec = AttentionSpec(parse("s * 0.25 + c0"), parse("j <= i - 20"), (Capture("-h-d", torch.float32),),
                         empty_rows=empty_rows)  # fmt: skip
    shape = Shape(16, 16, 35, 35)
    band = check(spec, shape, torch.float32, BLOCKS[0])[3]
    assert (band[..., 34 - 20 + 1 :] == 0).all() and (band[..., : 34 - 20 + 1] != 0).any()


def test_the_score_may_depend_on_a_band_in_any_way() -> None:
    for score in ("s * c0", "tanh(s * 0.1 + c0) * 3.0", "s * 0.1 + c0 * c1", "where(c0 > 0.0, s * c0, s * 0.1)"):
        captures = (Capture("-h-d", torch.float32), Capture("b--d", torch.float32))
        spec = AttentionSpec(parse(score), parse("j <= i + 3"), captures, out_dtype=torch.float32)
        check(spec, Shape(16, 16, 19, 21), torch.float32, BLOCKS[2])


@pytest.mark.parametrize("name", ["band", "full"])
def test_the_same_inputs_give_the_same_bits(name: str) -> None:
    """Though parts of a sum are computed by programs of their own, in any order."""
    dims = {"band": "---d", "full": "bh-d"}[name]
    spec = AttentionSpec(parse("s * 0.25 + c0"), None, (Capture(dims, torch.float32),), out_dtype=torch.float32)
    shape = Shape(16, 16, 19, 21, batch=3)
    found = []
    for _ in range(2):
        torch.manual_seed(1)
        found.append(check(spec, shape, torch.float32, BLOCKS[0]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_band_that_needs_no_gradient_is_read_only() -> None:
    spec = AttentionSpec(parse("s * 0.25 + c0"), None, (Capture("-h-d", torch.float32),), out_dtype=torch.float32)
    shape = Shape(16, 16, 19, 21)
    (q, k, v), band = operands(shape, torch.float32), drawn(spec.captures[0], shape)
    out, lse = reference.attention_with_lse(q, k, v, [band], str(spec))
    dout, found = torch.randn_like(out), []
    for wanted in (True, False):
        text = source(spec, 16, 16, torch.float32, read_backward(BLOCKS[0]), (wanted,))
        assert ("c0_kernel" in text) == ("windows_kernel" in text) == wanted
        found.append(import_source(KIND, text).launch(q, k, v, [band], out, lse, dout))
    assert [len(x) for x in found] == [4, 3]
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=False))
