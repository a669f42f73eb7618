"""Kernels for few keys compiled for GPUs that need not be there: no spills, shared memory, instructions, addresses."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

from fxopt.codegen.attention.problem import Problem
from fxopt.codegen.attention.short.config import read_config
from fxopt.codegen.attention.short.kernel import candidates, candidates_with_weights
from fxopt.codegen.attention.weights.wants import Want
from fxopt.ir.attention import AttentionSpec, Capture
from fxopt.ir.expression import parse
from tests.codegen.short.compiling import compiled

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

SHARED = {80: 166_912, 90: 232_448, 100: 232_448}
HALF = torch.bfloat16
_TILES = (Capture("-hij", HALF), Capture("p-ij", HALF))
SWIN = AttentionSpec(parse("s * 0.17677 + c0 + c1"), None, _TILES, out_dtype=HALF, out_layout="bshd")
PLAIN = AttentionSpec(parse("s * 0.125"), out_dtype=HALF, out_layout="bshd")
PADDING = AttentionSpec(parse("s * 0.125"), parse("c0"), (Capture("b--j", torch.bool),), out_dtype=HALF)
CAUSAL = AttentionSpec(parse("s * 0.125"), parse("j <= i"), out_dtype=HALF)
#: specification, head dimension, batch, heads, tokens
PROBLEMS = {
    "Swin": (SWIN, 32, 4096, 3, 49),
    "Swin's last stage": (SWIN, 32, 64, 24, 49),
    "ViT": (PLAIN, 64, 64, 12, 197),
    "BERT": (PADDING, 64, 128, 12, 128),
    "256": (PLAIN, 64, 64, 32, 256),
    "BERT of 256": (PADDING, 64, 64, 12, 256),
    "causal": (CAUSAL, 64, 64, 12, 256),
    "wide heads": (PLAIN, 128, 64, 16, 160),
}


def problem(name: str, architecture: int, dtype: torch.dtype = HALF) -> Problem:
    spec, width, batch, heads, tokens = PROBLEMS[name]
    return Problem(spec, width, width, dtype, (architecture // 10, 0), batch, heads, heads, tokens, tokens)


@pytest.mark.parametrize(("name", "architecture"), [
    ("Swin", 80), ("Swin", 90), ("Swin", 100), ("Swin's last stage", 90), ("ViT", 90), ("BERT", 80), ("BERT", 90),
    ("BERT", 100), ("256", 90), ("wide heads", 90),
    ("BERT of 256", 90), ("causal", 90),
])  # fmt: skip
def test_candidates_compile_without_spills(name: str, architecture: int, tmp_path: Path) -> None:
    given = problem(name, architecture)
    found = candidates(given)
    assert 1 <= len(found) <= 2
    for text in found:
        config = read_config(text)
        kernel = compiled(given.spec, given.head_dim, HALF, config, architecture, given.keys or 0, tmp_path)
        assert (kernel.stack, kernel.local) == (0, 0), text
        assert kernel.shared <= SHARED[architecture]
        assert ("wgmma.mma_async" in kernel.asm["ptx"]) == (architecture == 90 and config.warps >= 4)


#: As token pruning, models that return their weights, and graph reductions want them.
WANTS = {
    "class row and sums": (Want("weights", torch.float32, (0, 1, 1)), Want("column_sum", torch.float32)),
    "diagonal and sums": (Want("diagonal", torch.float32), Want("column_sum", torch.float32)),
    "whole": (Want("weights", HALF),),
}


@pytest.mark.parametrize(("name", "architecture", "wanted"), [
    ("ViT", 90, "class row and sums"), ("ViT", 90, "diagonal and sums"), ("ViT", 90, "whole"), ("BERT", 90, "whole"),
    ("BERT", 80, "class row and sums"), ("BERT", 100, "diagonal and sums"), ("Swin", 90, "class row and sums"),
    ("wide heads", 90, "class row and sums"),
])  # fmt: skip
def test_kernels_that_write_weights_compile_without_spills(
    name: str, architecture: int, wanted: str, tmp_path: Path
) -> None:
    given = problem(name, architecture)
    text = candidates_with_weights(given)[0]
    sizes = (architecture, given.keys or 0, tmp_path)
    kernel = compiled(given.spec, given.head_dim, HALF, read_config(text), *sizes, wants=WANTS[wanted])
    # The diagonal takes four words more than there are registers.
    assert kernel.stack <= (16 if (name, wanted) == ("ViT", "diagonal and sums") else 0), text
    assert kernel.local == 0 and kernel.shared <= SHARED[architecture]
    assert not re.search(r"(?<![\w.])(atom|red)\.", kernel.asm["ptx"]), "sums must not depend on the order"


def test_more_keys_leave_no_registers_for_weights() -> None:
    assert candidates(problem("256", 90)) and not candidates_with_weights(problem("256", 90))
    assert not any("m" in text for text in candidates_with_weights(problem("Swin", 90)))


def test_single_precision_windows_do_not_spill(tmp_path: Path) -> None:
    given = problem("Swin", 90, torch.float32)
    for text in candidates(given):
        kernel = compiled(given.spec, 32, torch.float32, read_config(text), 90, 49, tmp_path)
        assert kernel.stack == 0, text


def test_what_stays_is_read_before_the_loop(tmp_path: Path) -> None:
    """Bias and periodic mask of a window, keys and values of a head: nothing of them is loaded in the loop."""
    windows = compiled(SWIN, 32, HALF, read_config("short:64x64w4p8"), 90, 49, tmp_path).asm["ttgir"]
    rows = compiled(PLAIN, 64, HALF, read_config("short:64x128+64+16w4r4"), 90, 197, tmp_path).asm["ttgir"]
    for text, loads, allocations in ((windows, 3, 3), (rows, 1, 1)):
        body = text.split("scf.for", 1)[1]
        assert body.count("tt.load") == loads
        assert body.count("ttg.local_alloc") == allocations


def test_whole_pieces_are_not_masked(tmp_path: Path) -> None:
    config = read_config("short:64x128w4r2")
    whole, cut = (compiled(PLAIN, 64, HALF, config, 90, keys, tmp_path).asm["ttir"] for keys in (128, 127))
    assert cut.count("arith.select") == whole.count("arith.select") + 1


def test_batches_and_heads_take_64_bits(tmp_path: Path) -> None:
    """Offsets within a block may take 32 bits, those of batches, heads and first rows may not."""
    text = compiled(SWIN, 32, HALF, read_config("short:64x64w4p8"), 90, 49, tmp_path).asm["ttir"]
    scalars = [line for line in text.splitlines() if "arith.muli" in line and ": i64" in line]
    assert len(scalars) >= 13  # batch and head of q, k, v, out, lse, two captures; first row of q, bias, mask
