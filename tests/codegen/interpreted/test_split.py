"""Split kernels against float64, in the interpreter: every expression, and every way to share the blocks of keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import ModuleType

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from fxopt.cache import import_source
from fxopt.codegen.attention import reference
from fxopt.codegen.attention.split.kernel import KIND, source
from fxopt.ir.attention import AttentionSpec, Capture
from fxopt.ir.expression import parse
from fxopt.testing import assert_within_budget
from tests.codegen.cases import CAUSAL, EXPRESSIONS, Shape, captured, operands, specification

pytestmark = [
    pytest.mark.usefixtures("poisoned_outputs"),
    pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),
]
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
SHAPES = {
    "one-query": Shape(16, 16, 1, 257, 2, "group", "bshd", heads=8),
    "three-queries": Shape(24, 40, 3, 33, 3, "tile", "bshd", heads=6, batch=3),
    "all-heads": Shape(40, 24, 3, 257, 6, "group", "bhsd", heads=6),
    "many-rows": Shape(16, 16, 20, 70, 1, "group", "bhsd", heads=5),
}


def module(
    spec: AttentionSpec, q: Tensor, v: Tensor, monkeypatch: pytest.MonkeyPatch, programs: int = 4, config: str = ""
) -> ModuleType:
    """The generated module, on a device of so many multiprocessors."""
    found = import_source(KIND, source(spec, q.shape[3], v.shape[3], q.dtype, config or "split:16w4s3"))
    monkeypatch.setattr(found, "multiprocessors", lambda device: programs)
    monkeypatch.setattr(found, "COUNTERS", {})
    return found


def exact(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, captures: Sequence[Tensor]) -> Tensor:
    wide = [c.double() if c.is_floating_point() else c for c in captures]
    spec = dataclasses.replace(spec, out_dtype=torch.float64)
    return reference.attention(q.double(), k.double(), v.double(), wide, str(spec))


def is_idle(found: ModuleType) -> bool:
    """Whether a launch has left all its counters at zero."""
    return all(not counter.any() for counter in found.COUNTERS.values())


#: Every expression with every shape, and every dtype and number of programs with each of both.
CROSS = [
    (name, shape, list(DTYPES)[(n + m) % 3], (2, 7, 30)[(n // 2 + m) % 3])
    for n, name in enumerate(EXPRESSIONS)
    for m, shape in enumerate(SHAPES)
]


@pytest.mark.parametrize(("name", "shape", "dtype", "programs"), CROSS)
def test_kernel_is_within_the_budget_of_eager(
    name: str, shape: str, dtype: str, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = SHAPES[shape]
    # Empty rows of bfloat16 are zero: torch's bfloat16 product on the CPU spreads a row of NaN to the next one.
    spec = specification(name, sizes, DTYPES[dtype], empty_rows="zero" if dtype == "bf16" else "nan")
    q, k, v = operands(sizes, DTYPES[dtype])
    captures = captured(name, sizes, spec)
    found = module(spec, q, v, monkeypatch, programs, "split:32w4s3" if sizes.keys > 100 else "split:16w4s3")
    out, lse = found.launch(q, k, v, captures)
    eager = reference.attention(q, k, v, captures, str(spec))
    assert out.stride() == eager.stride()
    assert lse.shape == (0,)
    assert_within_budget(out, eager, exact(spec, q, k, v, captures))
    assert is_idle(found)


@pytest.mark.parametrize("config", ["split:16w4s3", "split:64w4s3x2"])
@pytest.mark.parametrize("programs", [1, 2, 5, 13, 34, 1000])
@pytest.mark.parametrize("name", ["causal", "lengths"])
def test_any_number_of_programs(name: str, programs: int, config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer programs than tiles, as many as blocks, more; parts that are merged at once and in groups."""
    sizes = Shape(16, 16, 3, 270, 1, heads=4)
    spec = specification(name, sizes, torch.float32, "zero")
    q, k, v = operands(sizes, torch.float32)
    captures = [torch.tensor([267, 91]).view(2, 1, 1, 1)] if name == "lengths" else []
    found = module(spec, q, v, monkeypatch, programs, config)
    out, lse = found.launch(q, k, v, captures, True)
    torch.testing.assert_close(out, exact(spec, q, k, v, captures).float())
    torch.testing.assert_close(lse, torch.logsumexp(reference.logits(spec, q, k, captures), -1))
    assert is_idle(found)


@pytest.mark.parametrize("programs", [3, 7, 60])
def test_launches_one_after_the_other_use_the_same_counters(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = Shape(16, 16, 1, 400, 2, heads=8)
    spec = specification("plain", sizes, torch.float32)
    q, k, v = operands(sizes, torch.float32)
    found = module(spec, q, v, monkeypatch, programs)
    first, _ = found.launch(q, k, v)
    (counter,) = found.COUNTERS.values()
    second, _ = found.launch(q, k[:, :, :100], v[:, :, :100])
    third, _ = found.launch(q, k, v)
    assert list(found.COUNTERS.values()) == [counter] and not counter.any()
    assert torch.equal(first, third)
    torch.testing.assert_close(second, exact(spec, q, k[:, :, :100], v[:, :, :100], []).float())


@pytest.mark.parametrize("programs", [5, 40])
def test_the_order_of_arrival_changes_no_bit(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = Shape(16, 16, 2, 500, 1, heads=4)
    spec = specification("alibi", sizes, torch.float32)
    q, k, v = operands(sizes, torch.float32)
    captures = captured("alibi", sizes, spec)
    found = module(spec, q, v, monkeypatch, programs)
    forwards, _ = found.launch(q, k, v, captures)
    set_grid_idx = interpreter.InterpreterBuilder.set_grid_idx

    def backwards(self: object, x: int, y: int, z: int) -> None:
        set_grid_idx(self, min(programs, 64) - 1 - x, y, z)

    with monkeypatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "set_grid_idx", backwards)
        reverse, _ = found.launch(q, k, v, captures)
    assert torch.equal(forwards, reverse)
    assert is_idle(found)


def test_a_counter_that_is_not_zero_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """The part of the tile that no program merges stays unwritten, so the tests above can fail."""
    sizes = Shape(16, 16, 1, 400, 1, heads=2, batch=1)
    spec = specification("plain", sizes, torch.float32)
    q, k, v = operands(sizes, torch.float32)
    found = module(spec, q, v, monkeypatch, 4)
    found.counters(q.device, 16).fill_(1)
    out, _ = found.launch(q, k, v)
    assert not torch.allclose(out, exact(spec, q, k, v, []).float(), equal_nan=False)


@pytest.mark.parametrize(("empty_rows", "expected"), [("nan", torch.nan), ("zero", 0.0)])
@pytest.mark.parametrize("length", [0, -3])
def test_rows_without_keys(length: int, empty_rows: str, expected: float, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = Shape(16, 16, 2, 80, heads=4)
    spec = specification("lengths", sizes, torch.float32, empty_rows)
    q, k, v = operands(sizes, torch.float32)
    out, lse = module(spec, q, v, monkeypatch).launch(q, k, v, [torch.tensor([50, length]).view(2, 1, 1, 1)], True)
    torch.testing.assert_close(out[1], torch.full_like(out[1], expected), equal_nan=True)
    assert (lse[1] == -torch.inf).all()
    assert out[0].isfinite().all()


@pytest.mark.parametrize("mask", [
    "j < c0", "j < i + c0", "(j < c0) & (j >= c0 - 20)", "j < b * 60 + 5", "(j > h * 20) & (j < c0)", "j < c1",
    "(j < c0) & (j < c1) & ((j + i) % 3 != 0)", "j > 1000 + i", f"({CAUSAL}) & (j > i + (Sk - Sq) - 40)", "j < c2",
])  # fmt: skip
@pytest.mark.parametrize("programs", [3, 24])
def test_bounds_that_differ_by_batch_and_head(mask: str, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = Shape(16, 16, 3, 200, 2, heads=4, batch=5)
    captures = [
        torch.tensor([200, 3, 0, 64, 128]).view(5, 1, 1, 1),
        torch.tensor([10, 190, 100, 64]).view(1, 4, 1, 1),
        torch.tensor([30, 250]).view(2, 1, 1, 1),
    ]
    kinds = tuple(Capture(dims, torch.int64) for dims in ("b---", "-h--", "p---"))
    spec = AttentionSpec(parse("s * 0.125"), parse(mask), kinds, empty_rows="zero")
    q, k, v = operands(sizes, torch.float32)
    out, _ = module(spec, q, v, monkeypatch, programs).launch(q, k, v, captures)
    torch.testing.assert_close(out, exact(spec, q, k, v, captures).float())


def test_blocks_beyond_the_bounds_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = Shape(16, 16, 1, 160, 1, heads=2)
    spec = specification("lengths", sizes, torch.float32)
    q, k, v = operands(sizes, torch.float32)
    v[0, :, 48:] = torch.nan
    v[1, :, 96:] = torch.nan
    captures = [torch.tensor([40, 90]).view(2, 1, 1, 1)]
    out, _ = module(spec, q, v, monkeypatch).launch(q, k, v, captures)
    torch.testing.assert_close(out, exact(spec, q, k, v.nan_to_num(), captures).float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_finite_fills_give_the_mean_over_all_keys(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = Shape(16, 16, 2, 150)
    spec = specification("additive-mask", sizes, DTYPES[dtype])
    q, k, v = operands(sizes, DTYPES[dtype])
    lowest = torch.finfo(torch.bfloat16).min if dtype != "f16" else -6e4
    fill = torch.full((2, 1, 1, 150), lowest, dtype=DTYPES[dtype])
    q = q * 0 if dtype == "f16" else q  # the fill of float16 does not absorb the scores
    out, _ = module(spec, q, v, monkeypatch, 9).launch(q, k, v, [fill])
    mean = v.double().mean(2, keepdim=True).expand(out.shape)
    assert_within_budget(out, reference.attention(q, k, v, [fill], str(spec)), mean)


def test_nan_in_an_input_reaches_its_rows_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = Shape(16, 16, 3, 150)
    spec = AttentionSpec(parse("s"), parse(CAUSAL))
    q, k, v = operands(sizes, torch.float32)
    q[0, 1, 1] = torch.nan
    k[1, 0, 149] = torch.nan
    out, _ = module(spec, q, v, monkeypatch, 6).launch(q, k, v)
    assert out.isnan().any(-1).nonzero().tolist() == [[0, 1, 1], [1, 0, 2]]


def test_caches_of_any_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ``[B, T, G, D]`` cache longer than its keys, a transposed one, one for all batches, part of a wider one."""
    spec = AttentionSpec(parse("s * 0.25"))
    q = torch.randn(2, 8, 16, 1).transpose(2, 3)
    layouts = [
        torch.randn(2, 300, 2, 16)[:, :129].transpose(1, 2),
        torch.randn(2, 2, 16, 129).transpose(2, 3),
        torch.randn(1, 2, 129, 16).expand(2, -1, -1, -1),
        torch.randn(2, 2, 129, 32)[..., 16:],
    ]
    found = module(spec, q, q, monkeypatch)
    for k, v in zip(layouts, layouts[1:] + layouts[:1], strict=True):
        torch.testing.assert_close(found.launch(q, k, v)[0], exact(spec, q, k, v, []).float())


@pytest.mark.parametrize(("rows", "keys"), [(0, 5), (5, 0), (0, 0)])
def test_sizes_of_zero(rows: int, keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = specification("plain", Shape(16, 16, rows, keys), torch.float32)
    q, k, v = (torch.randn(2, 2, n, 16) for n in (rows, keys, keys))
    found = module(spec, q, v, monkeypatch)
    torch.testing.assert_close(found.launch(q, k, v)[0], reference.attention(q, k, v, [], str(spec)))
