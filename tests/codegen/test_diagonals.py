"""Which blocks of a diagonal the gradient of a band goes through, and the blocks' sizes on each device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fxopt.codegen.attention.backward.config import BackwardConfig, band_config, diagonal_bytes, fitting
from fxopt.codegen.attention.backward.diagonals import diagonal_range_text, diagonal_spans
from fxopt.codegen.attention.backward.kernel import candidates, read_backward
from fxopt.codegen.attention.interval import key_range
from fxopt.codegen.attention.portable.config import padded, read_config
from fxopt.codegen.attention.problem import Problem
from fxopt.codegen.expression import evaluate
from fxopt.codegen.printing import emit
from fxopt.errors import LoweringError
from fxopt.ir.attention import AttentionSpec, Capture
from fxopt.ir.expression import Expr, conjunction, conjuncts, parse
from tests.codegen.test_backward import TL

LENGTH = 13


def evaluated(expr: Expr | None, rows: int, keys: int) -> Tensor:
    i, j = torch.arange(rows)[:, None], torch.arange(keys)
    symbols = {"s": torch.zeros(rows, keys), "i": i, "j": j, "Sq": rows, "Sk": keys}
    return torch.as_tensor(True if expr is None else evaluate(expr, symbols, [torch.tensor(LENGTH)])).expand(rows, keys)


@pytest.mark.parametrize("mask", [
    "j <= i", "j <= i + 3", "j <= i - 5", "(j <= i) & (j > i - 7)", "j > i - 2", "j >= 4", "j < 11", "j < 0",
    "(j < 9) & (j >= 3) & (j <= i)", "((i - j) < 5) & ((j - i) <= 3)", "j < c0", "(j <= i) & (j > c0)",
    "j <= i + (Sk - Sq)", "(j <= i + 2) & ((i + j) % 2 == 0)", "j <= i + c0", "i - j < c0",
])  # fmt: skip
@pytest.mark.parametrize(("rows", "keys"), [(33, 33), (17, 40), (40, 17), (32, 16), (1, 9)])
@pytest.mark.parametrize(("block_m", "block_n"), [(8, 4), (8, 8), (16, 4)])
def test_every_kept_score_is_visited_once(mask: str, rows: int, keys: int, block_m: int, block_n: int) -> None:
    """And full blocks lie inside, where every conjunct that bounds the keys holds."""
    spec = AttentionSpec(parse("s"), parse(mask), (Capture("b---", torch.int64),))
    found = key_range(spec)
    bounded = evaluated(conjunction(tuple(t for t in conjuncts(spec.mask) if t not in found.rest)), rows, keys)
    text = diagonal_range_text(found, lambda e, names: emit(e, names, spec.capture_kinds)).replace(".to(tl.int32)", "")
    visited = torch.zeros(rows + block_m, keys + block_n, dtype=torch.int)
    lines = max(2 * -(-keys // block_n) - 1, 2 * (-(-rows // block_m) - 1) * (block_m // block_n))
    for line in range(lines):
        gap = (line // 2 if line % 2 == 0 else -(line // 2) - 1) * block_n
        scope: dict[str, Any] = {"tl": TL, "Sq": rows, "Sk": keys, "gap": gap, "c0": LENGTH}
        scope |= {"BLOCK_M": block_m, "BLOCK_N": block_n}
        exec(text, scope)
        for span in diagonal_spans(found):
            for first in range(eval(span.first, scope), eval(span.last, scope), block_m):
                start = first + gap
                assert first % block_m == 0 and 0 <= first < rows and 0 <= start < keys
                visited[first : first + block_m, start : start + block_n] += 1
                if not span.bounded:
                    assert first + block_m <= rows and start + block_n <= keys
                    assert bounded[first : first + block_m, start : start + block_n].all()
    visited = visited[:rows, :keys]
    assert (visited <= 1).all() and (visited[evaluated(spec.mask, rows, keys)] == 1).all()


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [16, 40, 64, 80, 128, 192, 256])
def test_blocks_along_diagonals_fit(width: int, dtype: torch.dtype, capability: tuple[int, int], drops: bool) -> None:
    limit = {(8, 0): 166_912, (9, 0): 232_448, (10, 0): 232_448}.get(capability, 101_376)
    for config in fitting(width, width, dtype, capability, heavy=True, drops=drops, bands=True):
        blocks = band_config(config)
        assert blocks == config.bands and blocks.block_m % blocks.block_n == 0
        assert diagonal_bytes(blocks, padded(width), dtype) <= limit
        assert read_backward(str(config)) == config


def test_only_bands_have_blocks_of_their_own() -> None:
    for dims, expected in (("-h-d", True), ("-hij", False)):
        spec = AttentionSpec(parse("s + c0"), None, (Capture(dims, torch.bfloat16),), out_dtype=torch.bfloat16)
        found = candidates(Problem(spec, 64, 64, torch.bfloat16, (9, 0)))
        assert found and all((config.bands is not None) == expected for config in found)


def test_configurations_with_blocks_along_diagonals() -> None:
    config = read_backward("64x128w8s2-128x64w8s2-64x32w4s1")
    assert config.bands == read_config("64x32w4s1") and str(config) == "64x128w8s2-128x64w8s2-64x32w4s1"
    assert band_config(read_backward("64x128w8s2-32x64w8s2")) == read_config("32x32w8s1")
    for wrong in ("64x128w8s2-128x64w8s2-32x64w4s1", "64x64w4s1-64x64w4s1-64x64w4s1-64x64w4s1"):
        with pytest.raises(LoweringError, match="configuration"):
            read_backward(wrong)
    with pytest.raises(LoweringError, match="whole blocks"):
        BackwardConfig(config.keys, config.rows, read_config("16x32w4s1"))
