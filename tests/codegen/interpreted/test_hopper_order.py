"""Tiles in the order of their number of keys: ranks, what each program is dealt, and tiles that are only written."""

from __future__ import annotations

import itertools
import re
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from fxopt.codegen.attention import reference
from fxopt.codegen.attention.hopper.kernel import source
from fxopt.ir.attention import AttentionSpec, Capture, EmptyRows
from fxopt.ir.expression import parse
from fxopt.testing import assert_within_budget
from tests.codegen import emulated_gluon
from tests.codegen.cases import Shape, operands
from tests.codegen.fillings import FILLINGS, lengths, padded, vectors
from tests.codegen.interpreted import emulation
from tests.codegen.interpreted.test_hopper_hulls import launched
from tests.codegen.interpreted.test_hopper_stream import exact, launch

pytest.importorskip("triton.experimental.gluon")
pytestmark = pytest.mark.usefixtures("poisoned_outputs")
HALF = torch.bfloat16
LENGTH = 330
BLOCK = 64
CONFIGS = ("hopper:64x64s4q2a0", "hopper:64x64s3q3a1", "hopper:128x64s2q2", "hopper:64x64s2q1")


def wanted_order(filled: tuple[int, ...], rows: bool, length: int, block: int) -> list[tuple[int, int]]:
    """Blocks of keys and number of each hull, in order."""
    blocks = -(-length // block) if rows else 1
    counts = [-(-n // BLOCK) * (n > row * block or not rows) for n in filled for row in range(blocks)]
    return sorted(((count, number) for number, count in enumerate(counts)), key=lambda found: (-found[0], found[1]))


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("name", FILLINGS)
def test_hulls_are_ranked_by_their_blocks_of_keys(name: str, rows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    filled = lengths(name, LENGTH)[: 40 if rows else None]
    sizes = Shape(16, 16, LENGTH, LENGTH, 1, batch=len(filled), heads=1)
    module, kernel = launched(padded(rows, "zero"), monkeypatch)
    module.launch(*operands(sizes, HALF), vectors(filled, LENGTH, rows))
    wanted = wanted_order(filled, rows, LENGTH, BLOCK)
    hulls = kernel.found["hull_ptr"]
    order = [number for _, number in wanted]
    assert hulls[:, 1].tolist() == order
    # Their limits stand beside their order.
    assert torch.equal(hulls[:, 2:6], hulls[order, 6:])
    assert hulls[0, 0] == sum(count > 0 for count, _ in wanted)


@pytest.mark.parametrize("empty_rows", get_args(EmptyRows))
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("number", range(len(FILLINGS) - 1))
def test_any_filling_is_within_the_budget_of_eager(
    number: int, rows: bool, empty_rows: EmptyRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled = lengths(FILLINGS[number], LENGTH)
    # torch's bfloat16 product on the CPU spreads a row of NaN to the next one.
    spec = padded(rows, "zero" if rows and empty_rows == "nan" else empty_rows)
    sizes = Shape(16, 16, LENGTH, LENGTH, 2, batch=len(filled), heads=2)
    q, k, v = operands(sizes, HALF)
    config = CONFIGS[(number + 2 * rows) % len(CONFIGS)]
    captures = vectors(filled, LENGTH, rows)
    loaded: list[Tensor] = []
    copy = emulated_gluon.TMA.async_copy_global_to_shared
    monkeypatch.setattr(emulated_gluon.TMA, "async_copy_global_to_shared", noting(copy, loaded))
    out, lse = launch(spec, q, k, v, captures, config, monkeypatch)
    assert_within_budget(out, reference.attention(q, k, v, captures, str(spec)), exact(spec, q, k, v, captures))
    wanted = torch.logsumexp(reference.logits(spec, q.double(), k.double(), captures), -1)
    torch.testing.assert_close(lse.double(), wanted, rtol=1e-3, atol=1e-3)
    # Nothing is loaded for tiles without keys, except that each of the three programs takes one tile at least.
    block = int(config[7:].partition("x")[0])
    blocks = 1 if rows else -(-LENGTH // block)
    tiles = 2 * blocks * sum(count > 0 for count, _ in wanted_order(filled, rows, LENGTH, block))
    queries = sum(torch.equal(x, q) for x in loaded) / (block // 64)
    assert tiles <= queries <= max(tiles, 3)


def noting(load: Any, loaded: list[Tensor]) -> Any:
    """``load`` that notes of which tensor each block is."""

    def noted(source: emulated_gluon.Descriptor, *others: Any) -> None:
        loaded.append(source.base)
        load(source, *others)

    return noted


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize(("filled", "heads", "programs"), [
    ((330, 20, 64, 129, 1, 300, 0, 200), 6, 7), ((330, 0, 0), 5, 13), ((0, 0), 4, 8), ((90,) * 11, 3, 132),
    (tuple(n * 37 % 331 for n in range(40)), 12, 132),
])  # fmt: skip
def test_programs_are_dealt_every_tile_once_and_much_the_same_work(
    filled: tuple[int, ...], heads: int, programs: int, rows: bool
) -> None:
    found = wanted_order(filled, rows, LENGTH, BLOCK)
    hulls = torch.zeros(len(found), 10, dtype=torch.long)
    hulls[:, 1] = torch.tensor([number for _, number in found])
    hulls[0, 0] = sum(count > 0 for count, _ in found)
    counts = {number: count for count, number in found}
    blocks, pairs = -(-LENGTH // BLOCK), len(filled) * heads
    programs = min(programs, blocks * pairs)
    taken: list[tuple[int, ...]] = []
    work = []
    for program in range(programs):
        names = placed(padded(rows, "zero"), program, programs)
        asked = (blocks, heads, emulation.Pointer(hulls), True)
        count = int(names["turns_of"](blocks, heads, pairs, *asked[2:]))
        tiles = [
            tuple(map(int, names["place"](n, *asked)[:3])) for n in range(names["turns_within"](blocks * pairs, blocks))
        ]
        sizes = [counts[b * blocks + row if rows else b] for row, b, _ in tiles]
        assert 1 <= count <= len(tiles) and not any(sizes[count:]) and (all(sizes[:count]) or count == 1)
        assert sizes == sorted(sizes, reverse=True)
        taken += tiles
        work.append(sum(sizes))
    assert sorted(taken) == list(itertools.product(range(blocks), range(len(filled)), range(heads)))
    assert max(work) - min(work) <= blocks


def placed(spec: AttentionSpec, program: int, programs: int) -> dict[str, Any]:
    """The functions that say where a program's tiles lie."""
    text = source(spec, 16, 16, HALF, CONFIGS[0])
    body = text[text.index("@gluon.jit\ndef place(") : text.index("@gluon.jit\ndef clear(")]
    names: dict[str, Any] = {"gl": emulation._language(program, programs)}
    exec(re.sub(r"@gluon\.jit.*\n", "", body), names)
    names["programs"] = lambda _: programs
    return names


def test_vectors_that_scores_read_too_mask_by_their_run(monkeypatch: pytest.MonkeyPatch) -> None:
    captures = (Capture("b--j", torch.int64), Capture("b-i-", torch.int64))
    score, mask = parse("s * 0.125 + float(c0) * 0.1"), parse("(c0 > -50) & (c1 > 2) & (j <= i + 100)")
    spec = AttentionSpec(score, mask, captures, empty_rows="zero", out_dtype=HALF)
    filled = torch.tensor((128, 0, LENGTH, 1, 129, 300))
    sizes = Shape(16, 16, LENGTH, LENGTH, 2, batch=len(filled), heads=2)
    kept = torch.arange(LENGTH) < filled[:, None]
    bias = torch.randint(-20, 20, (len(filled), LENGTH)).masked_fill(~kept, -100)
    # Rows that keep nothing stand between others.
    rows = torch.randint(0, 6, (len(filled), LENGTH)).masked_fill(torch.arange(LENGTH) < 200, 5)
    given = [bias[:, None, None], rows[:, None, :, None]]
    q, k, v = operands(sizes, HALF)
    for config in CONFIGS[::2]:
        out, _ = launch(spec, q, k, v, given, config, monkeypatch)
        assert_within_budget(out, reference.attention(q, k, v, given, str(spec)), exact(spec, q, k, v, given))


@pytest.mark.parametrize("rows", [False, True])
def test_few_keys_are_not_put_in_order(rows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = Shape(16, 16, 200, 200, 1, batch=5, heads=2)
    q, k, v = operands(sizes, HALF)
    captures = vectors((128, 0, 200, 1, 64), 200, rows)
    spec = padded(rows, "zero")
    out, _ = launch(spec, q, k, v, captures, CONFIGS[0], monkeypatch)
    assert_within_budget(out, reference.attention(q, k, v, captures, str(spec)), exact(spec, q, k, v, captures))
