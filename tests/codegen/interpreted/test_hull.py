"""Blocks of keys that captured vectors rule out are never read, and the rest is as exact as ever."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from fxopt.cache import import_source
from fxopt.codegen.attention import reference
from fxopt.codegen.attention.portable.kernel import KIND, read_config, source
from fxopt.ir.attention import EmptyRows
from fxopt.testing import assert_within_budget
from tests.codegen.cases import Shape, operands
from tests.codegen.interpreted.test_kernel import exact, launch
from tests.codegen.vectors import VECTORS

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning"),
    pytest.mark.usefixtures("poisoned_outputs"),
]
SIZES = {
    "square": Shape(16, 16, 70, 70, 1, batch=4, heads=1),
    "even": Shape(24, 40, 35, 80, 1, batch=4, heads=1),
    "one row": Shape(16, 16, 1, 67, 1, batch=3),
    "short": Shape(16, 16, 20, 33, 1, batch=4, heads=1),
}
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
BLOCK = 16
#: Each kind with every other size.
CROSS = [
    (name, size, get_args(EmptyRows)[(n + m) % 3], list(DTYPES)[n // 2 % 2])
    for n, name in enumerate(VECTORS)
    for m, size in enumerate(SIZES)
    if (n + m) % 2 == 0
]


def hulls(name: str, sizes: Shape, captures: list[Tensor]) -> Tensor:
    """The hull of each batch element and block of rows, computed from the whole mask."""
    spec = VECTORS[name].specification(torch.float32)
    s = torch.zeros(sizes.batch, 1, sizes.rows, sizes.keys)
    assert spec.mask is not None
    readings = reference.read_captures(spec, captures, s)
    kept = reference.kept(spec.mask, reference.environment(spec, s), readings, s).expand_as(s)
    key = torch.arange(sizes.keys)
    blocks = []
    for rows in kept[:, 0].split(BLOCK, 1):
        some = rows.any(1)
        first, last = torch.where(some, key, sizes.keys).amin(-1), torch.where(some, key + 1, 0).amax(-1)
        blocks.append(torch.stack((first, last), -1))
    return torch.stack(blocks, 1)


@pytest.mark.parametrize(("name", "size", "rows", "dtype"), CROSS)
def test_kernel_is_within_the_budget_of_eager(name: str, size: str, rows: EmptyRows, dtype: str) -> None:
    sizes = SIZES[size]
    # torch's bfloat16 product on the CPU spreads a row of NaN to the next one.
    spec = VECTORS[name].specification(DTYPES[dtype], "zero" if (dtype, rows) == ("bf16", "nan") else rows)
    q, k, v = operands(sizes, DTYPES[dtype])
    captures = VECTORS[name].draw(sizes)
    out, _ = launch(spec, q, k, v, captures)
    assert_within_budget(out, reference.attention(q, k, v, captures, str(spec)), exact(spec, q, k, v, captures))


@pytest.mark.parametrize("name", VECTORS)
def test_hull_holds_what_the_mask_keeps_and_no_key_is_read_outside_its_blocks(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = SIZES["square"]
    spec = VECTORS[name].specification(torch.float32, "zero")
    q, k, v = operands(sizes, torch.float32)
    captures = VECTORS[name].draw(sizes)
    module = import_source(KIND, source(spec, 16, 16, torch.float32, read_config("16x16w4s2")))
    found: list[Tensor] = []
    empty = torch.empty

    def keeping(size: tuple[int, ...], **options: object) -> Tensor:
        made: Tensor = empty(size, **options)  # type: ignore[call-overload]
        if options["dtype"] is torch.int32:
            found.append(made)
        return made

    monkeypatch.setattr(module.torch, "empty", keeping)
    module.launch(q, k, v, captures)
    monkeypatch.undo()
    (hull,) = found
    wanted = hulls(name, sizes, captures)
    hull = hull.view(sizes.batch, -1, 2).expand_as(wanted)
    holds = (hull[..., 0] <= wanted[..., 0]) & (hull[..., 1] >= wanted[..., 1]) | (wanted[..., 1] == 0)
    assert holds.all()

    begin, end = hull[..., 0].amin(1) // BLOCK * BLOCK, -(-hull[..., 1].amax(1) // BLOCK) * BLOCK
    key = torch.arange(sizes.keys)
    outside = (key < begin[:, None]) | (key >= end[:, None])
    hidden = outside[:, None, :, None]
    poisoned = module.launch(q, k.masked_fill(hidden, torch.nan), v.masked_fill(hidden, torch.nan), captures)[0]
    torch.testing.assert_close(poisoned, exact(spec, q, k, v, captures).float())
    if name in ("right padding", "left padding", "negated padding", "holes", "lengths, left padding"):
        assert torch.equal(hull[:, :1], hull[:, 1:2]) and outside.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_documents_skip_each_others_blocks(dtype: str) -> None:
    """NaN in the keys of every other document never reaches a block of rows that lies within one."""
    sizes = Shape(16, 16, 96, 96, 1, batch=1)
    spec = VECTORS["contiguous documents"].specification(DTYPES[dtype])
    q, k, v = operands(sizes, DTYPES[dtype])
    numbers = (torch.arange(96) // 32)[None, None, :, None]
    captures = [numbers, numbers.transpose(2, 3).contiguous()]
    clean = launch(spec, q, k, v, captures)[0]
    v[:, :, 32:64] = torch.nan
    out = launch(spec, q, k, v, captures)[0]
    assert torch.equal(out[:, :, :32], clean[:, :, :32]) and torch.equal(out[:, :, 64:], clean[:, :, 64:])
    assert out[:, :, 32:64].isnan().all()


def test_vectors_may_change_between_calls() -> None:
    sizes = SIZES["square"]
    spec = VECTORS["right padding"].specification(torch.float32, "uniform")
    q, k, v = operands(sizes, torch.float32)
    for name in ("right padding", "negated padding", "right padding"):
        captures = VECTORS[name].draw(sizes)
        torch.testing.assert_close(launch(spec, q, k, v, captures)[0], exact(spec, q, k, v, captures).float())


@pytest.mark.parametrize("config", ["16x16w4s2", "16x32w1s2tma"])
@pytest.mark.parametrize("keys", [33, 64, 150])
def test_rows_without_keys_give_the_mean(keys: int, config: str) -> None:
    sizes = Shape(24, 40, 20, keys, 2, heads=4, batch=2)
    spec = VECTORS["rows and keys"].specification(torch.bfloat16, "uniform")
    q, k, v = (x.contiguous() for x in operands(sizes, torch.bfloat16))
    rows = torch.rand(2, 1, 20, 1) < 0.5
    captures = [rows, torch.ones(2, 1, 1, keys, dtype=torch.bool)]
    out, lse = launch(spec, q, k, v, captures, with_lse=True, config=read_config(config))
    assert_within_budget(out, reference.attention(q, k, v, captures, str(spec)), exact(spec, q, k, v, captures))
    mean = v.double().mean(2, keepdim=True).repeat_interleave(2, 1).expand(out.shape)
    assert ((out.double() - mean).abs() <= 2**-8 * mean.abs() + 1e-6)[(~rows).expand(out.shape)].all()
    assert (lse == -torch.inf)[(~rows[..., 0]).expand(lse.shape)].all()
