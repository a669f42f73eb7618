"""Whole pairs on Hopper, emulated: numbers against float64, barriers that are met, places that are free in time."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from torch import Tensor

from fxopt.cache import import_source
from fxopt.codegen.attention import reference
from fxopt.codegen.attention.pairs.kernel import source
from fxopt.codegen.attention.portable.kernel import KIND
from fxopt.ir.attention import AttentionSpec, EmptyRows
from fxopt.testing import assert_within_budget
from tests.codegen.cases import WITHOUT_BANDS, Shape, captured, operands, specification
from tests.codegen.interpreted import emulation
from tests.codegen.interpreted.emulation import Emulated
from tests.codegen.tiles import TILES
from tests.codegen.vectors import VECTORS

pytest.importorskip("triton.experimental.gluon")
pytestmark = pytest.mark.usefixtures("poisoned_outputs")
#: Sizes and configuration: more turns than programs, blocks that no turn and groups that no block divides evenly.
CASES = {
    "197": (Shape(16, 16, 197, 197, 2, "group", "bshd", heads=4, batch=3), "pairs:256x128+64+16g2s2q4"),
    "64": (Shape(32, 32, 100, 64, 1, "tile", "bhsd", heads=2, batch=4), "pairs:128x64g2s3q2"),
    "100 cross": (Shape(24, 32, 150, 100, 2, "tile", "bhsd", heads=4), "pairs:192x64+32+16g3s2q3"),
    "256": (Shape(64, 64, 330, 256, 1, "group", "bshd", heads=2), "pairs:256x128+128g2s2q2"),
    "128 packed": (Shape(16, 16, 128, 128, 2, "group", "bshd", packed=True, heads=4), "pairs:192x64+64g3s3q6"),
    "1": (Shape(16, 16, 70, 1, 1, heads=2, batch=3), "pairs:192x16g3s1q3"),
}
HALF = torch.bfloat16
#: The others read several values for each row and key, or values of another type.
SERVED = [name for name in WITHOUT_BANDS if name not in ("swin", "finite-fill")]


def launch(
    spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, captures: list[Tensor], config: str, patch: pytest.MonkeyPatch
) -> tuple[Tensor, Tensor]:
    text = source(spec, q.shape[3], v.shape[3], q.dtype, config)
    module = import_source(KIND, text)
    width = max(16, 1 << (q.shape[3] - 1).bit_length())
    patch.setattr(module, "attention_kernel", Emulated(text, module.attention_kernel.arg_names))
    patch.setattr(module, "described", lambda x, rows: emulation.Descriptor(x, rows, width))
    patch.setattr(module, "tiled", lambda x, keys: emulation.Descriptor(x, 64, keys), raising=False)
    patch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=3))
    out, lse = module.launch(q, k, v, captures, True)
    return out, lse


def check(
    spec: AttentionSpec, operands: tuple[Tensor, ...], captures: list[Tensor], config: str, patch: pytest.MonkeyPatch
) -> None:
    q, k, v = operands
    out, lse = launch(spec, q, k, v, captures, config, patch)
    wide = [c.double() if c.is_floating_point() else c for c in captures]
    exact_spec = str(dataclasses.replace(spec, out_dtype=torch.float64))
    exact = reference.attention(q.double(), k.double(), v.double(), wide, exact_spec)
    assert_within_budget(out, reference.attention(q, k, v, captures, str(spec)), exact)
    wanted = torch.logsumexp(reference.logits(spec, q.double(), k.double(), wide), -1)
    torch.testing.assert_close(lse.double(), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("name", "case"), [(n, c) for n in SERVED for c in CASES])
def test_pairs_are_within_the_budget_of_eager(name: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, config = CASES[case]
    spec = specification(name, sizes, HALF, "zero")
    check(spec, operands(sizes, HALF), captured(name, sizes, spec), config, monkeypatch)


@pytest.mark.parametrize("number", range(len(VECTORS)))
def test_vectors_limit_keys_and_rows_without_any(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    name = list(VECTORS)[number]
    case = list(CASES)[number % 4]
    sizes, config = CASES[case]
    spec = VECTORS[name].specification(HALF, get_args(EmptyRows)[number % 3])
    sizes = dataclasses.replace(sizes, batch=4, rows=min(sizes.rows, sizes.keys))
    q, k, v = operands(sizes, HALF)
    captures = VECTORS[name].draw(sizes)
    out, _ = launch(spec, q, k, v, captures, config, monkeypatch)
    wide = dataclasses.replace(spec, out_dtype=torch.float64)
    exact = reference.attention(q.double(), k.double(), v.double(), captures, str(wide))
    assert_within_budget(out, reference.attention(q, k, v, captures, str(spec)), exact)


@pytest.mark.parametrize("name", TILES)
@pytest.mark.parametrize("case", ["197", "256", "100 cross"])
def test_tiles_come_piece_by_piece(name: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, config = CASES[case]
    for of in (torch.bfloat16, torch.float16):
        spec = TILES[name].specification(sizes, of, "zero")
        check(spec, operands(sizes, of), TILES[name].draw(sizes, of), config, monkeypatch)


@pytest.mark.parametrize(("batch", "rows", "keys"), [(2, 5, 0), (2, 0, 5), (0, 5, 5)])
def test_sizes_of_zero(batch: int, rows: int, keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = specification("plain", Shape(16, 16, rows, keys), HALF)
    q, k, v = (torch.randn(batch, 2, n, 16, dtype=HALF) for n in (rows, keys, keys))
    out, _ = launch(spec, q, k, v, [], "pairs:128x16g2s2q2", monkeypatch)
    torch.testing.assert_close(out, reference.attention(q, k, v, [], str(spec)))
