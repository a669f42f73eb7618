"""The small kernels around a Hopper kernel, which itself has no interpreter: hulls, runs of sure keys, means."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fxopt.cache import import_source
from fxopt.codegen.attention import reference
from fxopt.codegen.attention.hopper.kernel import source
from fxopt.codegen.attention.interval import key_range
from fxopt.codegen.attention.portable.kernel import KIND
from fxopt.codegen.attention.possible import possible_keys
from fxopt.ir.attention import AttentionSpec, Capture
from fxopt.ir.expression import conjunction, parse
from tests.codegen.cases import Shape, operands
from tests.codegen.vectors import VECTORS

pytest.importorskip("triton.experimental.gluon")
CONFIG = "hopper:64x64s4q2a0"
ROWS = 64
SIZES = Shape(16, 16, 150, 600, 1, batch=4, heads=2)
Main = Callable[..., None]


class Launched:
    """Stands for the main kernel: keeps its arguments by name, and may write results."""

    def __init__(self, names: list[str], main: Main) -> None:
        self.names, self.main = names, main
        self.found: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*arguments: Any, **options: Any) -> None:
            self.found = dict(zip(self.names, arguments, strict=False)) | options
            self.main(**self.found)

        return run


def test_bands_are_given_in_two_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = AttentionSpec(parse("s + c0"), None, (Capture("bh-d", torch.bfloat16),), out_dtype=torch.bfloat16)
    q, k, v = operands(SIZES, torch.bfloat16)
    length = SIZES.rows + SIZES.keys - 1
    band = torch.randn(SIZES.batch, SIZES.heads, 1, length).bfloat16()
    module, kernel = launched(spec, monkeypatch)
    module.launch(q, k, v, [band])
    phases = kernel.found["c0_ptr"]
    assert phases.shape[:3] == (SIZES.batch, SIZES.heads, 2) and kernel.found["c0_stride_p"] % 16 == 0
    # The last row of a tile beyond the keys is read from element `rows - 1 + keys + 64` at most.
    assert phases.shape[3] >= SIZES.rows + SIZES.keys + 64
    for phase in (0, 1):
        assert torch.equal(phases[:, :, phase, : length - phase], band[:, :, 0, phase:])
        assert not phases[:, :, phase, length - phase :].any()


def launched(
    spec: AttentionSpec, patch: pytest.MonkeyPatch, main: Main = lambda **_: None
) -> tuple[ModuleType, Launched]:
    """The module for ``spec`` on a device that isn't there, whose main kernel is ``main``."""
    module = import_source(KIND, source(spec, 16, 16, torch.bfloat16, CONFIG))
    kernel = Launched(module.attention_kernel.arg_names, main)
    patch.setattr(module, "attention_kernel", kernel)
    patch.setattr(module, "described", lambda x, rows: x)
    patch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=3))
    return module, kernel


def kept(spec: AttentionSpec, mask: Any, captures: list[Tensor], sizes: Shape = SIZES) -> Tensor:
    s = torch.zeros(sizes.batch, 1, sizes.rows, sizes.keys)
    readings = reference.read_captures(spec, captures, s)
    return reference.kept(mask, reference.environment(spec, s), readings, s).expand_as(s)[:, 0]


@pytest.mark.parametrize("name", VECTORS)
def test_hulls_hold_what_is_kept_and_in_runs_of_sure_keys_only_bounds_hide_any(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    spec = VECTORS[name].specification(torch.bfloat16, "zero")
    q, k, v = operands(SIZES, torch.bfloat16)
    captures = VECTORS[name].draw(SIZES)
    module, kernel = launched(spec, monkeypatch)
    module.launch(q, k, v, captures)
    if "hull_ptr" not in kernel.found:
        assert name == "prefix"
        return
    assert kernel.found["HULL"]
    # Their order stands before their own numbers.
    possible = possible_keys(spec, sure=True)
    numbers = 2 if possible is None or possible.sure is None else 4
    own = numbers * (2 if "hull_lists_ptr" in kernel.found else 1)
    hull = kernel.found["hull_ptr"][:, -own:][:, :numbers].reshape(SIZES.batch, -1, numbers)
    rest = conjunction(key_range(spec, further=True).rest)
    keys = torch.arange(SIZES.keys)
    whole, free = kept(spec, spec.mask, captures), kept(spec, rest, captures)
    for block, (some, every) in enumerate(zip(whole.split(ROWS, 1), free.split(ROWS, 1), strict=True)):
        begin, end, *sure = hull[:, min(block, hull.shape[1] - 1)].T[:, :, None]
        assert not (some.any(1) & ((keys < begin) | (keys >= end))).any()
        if sure:
            inside = (keys >= sure[0]) & (keys < sure[1])
            assert (every.all(1) | ~inside).all()
            run = (every.all(1) & ~inside).sum()
            assert name not in ("right padding", "left padding", "contiguous documents") or run == 0


LISTED = ("contiguous documents", "interleaved documents", "rows without a document", "causal documents, padding",
          "earlier documents", "other documents")  # fmt: skip


@pytest.mark.parametrize("keys", [600, 2100])
@pytest.mark.parametrize("name", VECTORS)
def test_lists_hold_the_blocks_of_which_any_row_keeps_a_key(
    name: str, keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    sizes = dataclasses.replace(SIZES, keys=keys, batch=2)
    spec = VECTORS[name].specification(torch.bfloat16, "zero")
    q, k, v = operands(sizes, torch.bfloat16)
    captures = VECTORS[name].draw(sizes)
    module, kernel = launched(spec, monkeypatch)
    module.launch(q, k, v, captures)
    assert ("hull_lists_ptr" in kernel.found) == (name in LISTED)
    if name not in LISTED:
        return
    step = kernel.found["BLOCK_N"]
    # Keys beyond the end count as hidden.
    whole = torch.nn.functional.pad(kept(spec, spec.mask, captures, sizes), (0, -keys % step))
    tiles = whole.split(ROWS, 1)
    lists = kernel.found["hull_lists_ptr"].view(sizes.batch, len(tiles), -1)
    possible = possible_keys(spec, sure=True)
    assert possible is not None
    numbers = kernel.found["hull_ptr"].view(sizes.batch, len(tiles), -1)
    counts = numbers[:, :, -2 if possible.sure is None else -4]
    left = 0
    for row, tile in enumerate(tiles):
        some, every = (x.unflatten(1, (-1, step)) for x in (tile.any(1), tile.all(1)))
        for b in range(sizes.batch):
            entries = lists[b, row, : max(1, counts[b, row])]
            listed, uncut = entries >> 1, (entries & 1) == 0
            assert (listed.diff() > 0).all() and set(some[b].any(1).nonzero()[:, 0].tolist()) <= set(listed.tolist())
            # Where rows are not sure of any key, every block asks what no bound says.
            assert possible.sure is None or every[b][listed[uncut]].all()
            left += int(counts[b, row] < len(some[b]))
    assert left or name in ("other documents", "earlier documents")


def test_rows_without_keys_take_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    spec = VECTORS["rows and keys"].specification(torch.bfloat16, "uniform")
    q, k, v = operands(SIZES, torch.bfloat16)
    empty = torch.rand(SIZES.batch, SIZES.heads, SIZES.rows) < 0.3
    empty[0] = False
    results: dict[str, Tensor] = {}

    def main(out_target: Tensor, lse_ptr: Tensor, **_: object) -> None:
        out_target.fill_(7.0)
        lse_ptr.copy_(torch.where(empty, -torch.inf, 0.0))
        results["out"] = out_target

    module, _ = launched(spec, monkeypatch, main)
    out, lse = module.launch(q, k, v, VECTORS["rows and keys"].draw(SIZES))
    mean = v.double().mean(2, keepdim=True).expand(-1, SIZES.heads, SIZES.rows, -1)
    wanted = torch.where(empty[..., None], mean, 7.0)
    torch.testing.assert_close(out.double(), wanted, rtol=2**-8, atol=2**-8)
    assert lse.numel() == 0 and results["out"] is out
