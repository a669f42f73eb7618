"""Kernels that go through lists of the blocks that a mask keeps: the lists, and the results against float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxopt.cache import import_source
from fxopt.codegen.attention import reference
from fxopt.codegen.attention.portable.kernel import KIND, read_config, source
from fxopt.ir.attention import AttentionSpec, Capture
from fxopt.ir.expression import parse
from fxopt.testing import assert_within_budget
from tests.codegen.cases import Shape, operands
from tests.codegen.holes import HOLES, kinds
from tests.codegen.interpreted.test_kernel import exact, launch

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning"),
    pytest.mark.usefixtures("poisoned_outputs"),
]
SIZES = {
    "square": Shape(16, 16, 110, 110, 1, "group", "bshd", batch=2, heads=1),
    "even": Shape(24, 40, 32, 128, 1, "tile", batch=1, heads=2),
    "one row": Shape(16, 16, 1, 107, 1, batch=2),
    "short": Shape(16, 16, 20, 9, 1, batch=2),
}
PLANES = Shape(16, 16, 110, 110, 1, batch=2, heads=2)
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
CONFIGS = ("16x16w4s2list", "32x16w1s2list", "16x32w1s2tmalist")
#: Every mask with the first of the sizes and with another one.
CROSS = [
    (name, size, list(DTYPES)[(n + m) % 3], ("zero", "uniform", "nan")[n % 3], CONFIGS[(n // 3 + m) % 3])
    for n, name in enumerate(HOLES)
    for m, size in enumerate(("square", list(SIZES)[1 + n % 3]))
]


class Idle:
    """A kernel that does nothing."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *args, **options: None


def lists_of(
    spec: AttentionSpec, sizes: Shape, captures: list[Tensor], config: str, patch: pytest.MonkeyPatch
) -> Tensor:
    """The lists that the kernel would go through."""
    found: list[Tensor] = []
    empty = torch.empty

    def keeping(size: tuple[int, ...], **options: object) -> Tensor:
        made: Tensor = empty(size, **options)  # type: ignore[call-overload]
        if options["dtype"] is torch.int32:
            found.append(made)
        return made

    module = import_source(KIND, source(spec, 16, 16, torch.float32, read_config(config)))
    with patch.context() as patched:
        patched.setattr(module.torch, "empty", keeping)
        patched.setattr(module, "attention_kernel", Idle())
        module.launch(*operands(sizes, torch.float32), captures)
    (lists,) = found
    return lists


def gathered(told: Tensor, block_n: int) -> list[tuple[list[int], list[int]]]:
    """The first keys of the blocks of each list, kept in part and whole, as ``told`` of the kinds of blocks."""
    rows = told.flatten(0, -2)
    return [tuple((torch.nonzero(row == kind)[:, 0] * block_n).tolist() for kind in (1, 2)) for row in rows]  # type: ignore[misc]


def read(lists: Tensor) -> list[tuple[list[int], list[int]]]:
    """The same of the lists."""
    return [(blocks[:partly], blocks[::-1][:wholly]) for partly, wholly, *blocks in lists.tolist()]


@pytest.mark.parametrize(("name", "size", "dtype", "rows", "config"), CROSS)
def test_kernel_is_within_the_budget_of_eager(name: str, size: str, dtype: str, rows: str, config: str) -> None:
    sizes = SIZES[size]
    # torch's bfloat16 product on the CPU spreads a row of NaN to the next one.
    empty_rows = "zero" if (dtype, rows) == ("bf16", "nan") else rows
    spec = HOLES[name].specification(DTYPES[dtype], empty_rows)  # type: ignore[arg-type]
    spec = dataclasses.replace(spec, kv_map=sizes.kv_map, out_layout=sizes.layout)
    q, k, v = operands(sizes, DTYPES[dtype])
    if "tma" in config:
        k, v = k.contiguous(), v.contiguous()
    captures = HOLES[name].draw(sizes)
    out, lse = launch(spec, q, k, v, captures, with_lse=True, config=read_config(config))
    assert_within_budget(out, reference.attention(q, k, v, captures, str(spec)), exact(spec, q, k, v, captures))
    wanted = torch.logsumexp(reference.logits(spec, q.double(), k.double(), captures), -1)
    torch.testing.assert_close(lse.double(), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "config"),
    [(name, "16x16w4s2list") for name in HOLES]
    + [(name, config) for name in ("strided", "plane") for config in ("32x16w4s2list", "16x64w4s2list")],
)
def test_lists_hold_the_blocks_that_the_mask_keeps(name: str, config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, cut = PLANES, read_config(config)
    spec = HOLES[name].specification(torch.float32, "zero")
    captures = HOLES[name].draw(sizes)
    lists = lists_of(spec, sizes, captures, config, monkeypatch)
    told = kinds(spec, sizes, captures, cut.block_m, cut.block_n)
    # Lists are kept apart by batch and head where the mask reads them.
    planes = len(lists) // told.shape[2]
    assert planes in (1, sizes.batch, sizes.batch * sizes.heads)
    assert (planes == 1) == (not any(mark in name for mark in ("head", "batch", "global", "documents")))
    by_head, by_batch = "head" in name, name != "by head"
    told = told if by_batch and planes > 1 else told[:1]
    told = told if by_head else told[:, :1]
    assert read(lists) == gathered(told, cut.block_n)
    assert config != "16x16w4s2list" or 0 < (told > 0).sum() < told.numel(), "a mask that leaves out some blocks"


@pytest.mark.parametrize("name", ["longformer", "strided", "interleaved documents", "plane"])
def test_blocks_that_no_row_keeps_are_not_read(name: str) -> None:
    """NaN in the keys and values of a block reaches only rows of blocks that keep one of its keys."""
    sizes = Shape(16, 16, 110, 110, 1, batch=1, heads=1)
    spec = HOLES[name].specification(torch.float32, "zero")
    q, k, v = operands(sizes, torch.float32)
    captures = HOLES[name].draw(sizes)
    config = read_config("16x16w4s2list")
    clean = launch(spec, q, k, v, captures, config=config)[0]
    told = kinds(spec, sizes, captures, 16, 16)[0, 0]
    block = int(torch.nonzero((told == 0).sum(0) * (told > 0).sum(0)).flatten()[-1])
    v[:, :, block * 16 : block * 16 + 16] = torch.nan
    out = launch(spec, q, k, v, captures, config=config)[0]
    spared = (told[:, block] == 0).repeat_interleave(16)[:110]
    assert spared.any() and not spared.all()
    assert torch.equal(out[:, :, spared], clean[:, :, spared]) and out[:, :, ~spared].isnan().any()


#: Masks with numbers to be drawn, all of which borders decide in part.
DRAWN = (
    "((abs(i - j) <= {0}) | (j < {1})) | (i < {1})",
    "(j <= i) & ((j < {1}) | ((i - j) < {0}))",
    "(j <= i) & (((i - j) < {0}) | ((j % ({1} + 20)) >= {1}))",
    "(abs(i - j) <= {0}) & (((i - j) % ({1} + 1)) == 0)",
    "((j // ({1} + 1)) <= (i // ({1} + 1))) & ~((j + {0}) < i)",
    "((i * 2 - j) >= {0}) | ((minimum(i, j) // 7) == (maximum(j, {1}) // 9))",
    "((-j) > ({0} - i)) & ((j % ({1} + 3)) != (i % 5))",
)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(
    text=st.sampled_from(DRAWN),
    numbers=st.tuples(st.integers(0, 60), st.integers(0, 40)),
    size=st.tuples(st.integers(1, 70), st.integers(1, 130)),
    config=st.sampled_from(["16x16w4s2list", "32x16w4s2list", "16x64w4s2list"]),
)
def test_lists_of_any_mask_and_size(
    text: str, numbers: tuple[int, int], size: tuple[int, int], config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = AttentionSpec(parse("s * 0.25"), parse(text.format(*numbers)), empty_rows="zero")
    sizes = Shape(16, 16, *size, 1, batch=1, heads=1)
    cut = read_config(config)
    lists = lists_of(spec, sizes, [], config, monkeypatch)
    assert read(lists) == gathered(kinds(spec, sizes, [], cut.block_m, cut.block_n), cut.block_n)


def test_lists_of_masks_by_a_captured_band() -> None:
    """Each head keeps the distances that its band says."""
    sizes = Shape(16, 16, 40, 70, 1, batch=1, heads=2)
    spec = AttentionSpec(parse("s * 0.25"), parse("c0 > 0.0"), (Capture("-h-d", torch.float32),), empty_rows="zero")
    q, k, v = operands(sizes, torch.float32)
    band = torch.full((1, 2, 1, 109), -1.0)
    band[:, 0, :, 30:45], band[:, 1, :, 100:] = 1.0, 1.0
    out, _ = launch(spec, q, k, v, [band], config=read_config("16x16w4s2list"))
    torch.testing.assert_close(out, exact(spec, q, k, v, [band]).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("keys", [0, 5])
@pytest.mark.parametrize("rows", [0, 5])
def test_sizes_of_zero(rows: int, keys: int) -> None:
    spec = HOLES["longformer"].specification(torch.float32, "zero")
    q, k, v = (torch.randn(2, 2, n, 16) for n in (rows, keys, keys))
    out = launch(spec, q, k, v, [], config=read_config(CONFIGS[0]))[0]
    torch.testing.assert_close(out, reference.attention(q, k, v, [], str(spec)))
