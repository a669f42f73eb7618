"""A stream of blocks, emulated: numbers of every expression against float64, barriers that are met, slots in time."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from torch import Tensor

from fxopt.codegen.attention import reference
from fxopt.codegen.attention.hopper.config import read_config
from fxopt.codegen.attention.hopper.kernel import source
from fxopt.ir.attention import AttentionSpec, EmptyRows
from fxopt.ir.expression import parse
from fxopt.testing import assert_within_budget
from tests.codegen.cases import EXPRESSIONS, Shape, captured, operands, specification
from tests.codegen.emulated_gluon import emulated
from tests.codegen.vectors import VECTORS

pytest.importorskip("triton.experimental.gluon")
pytestmark = pytest.mark.usefixtures("poisoned_outputs")
CONFIGS = ("hopper:128x64s2q2a0", "hopper:64x64s3q3a1", "hopper:192x64s2q3a1", "hopper:192x128s3q2a0")
SHAPES = {
    "square": Shape(16, 16, 330, 330, 1, "group", "bshd", heads=2),
    "cross": Shape(24, 32, 135, 400, 2, "tile", "bhsd", heads=4),
    "one block": Shape(16, 16, 260, 50, 2, "group", "bshd", heads=2, batch=3),
}
HALF = torch.bfloat16
#: The others read several values for each row and key, or booleans.
SERVED = [n for n in EXPRESSIONS if n not in ("swin", "finite-fill")]
#: Streams whose products run ahead read no value for each row and key.
BEHIND = tuple(config for config in CONFIGS if read_config(config).ahead == 0)


def config(name: str, turn: int) -> str:
    found = BEHIND if name == "tile-bias" else CONFIGS
    return found[turn % len(found)]


def launch(
    spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, captures: list[Tensor], config: str, patch: pytest.MonkeyPatch
) -> tuple[Tensor, Tensor]:
    patch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=3))
    with tempfile.TemporaryDirectory() as folder:
        module = emulated(source(spec, q.shape[3], v.shape[3], q.dtype, config), Path(folder))
        out, lse = module.launch(q, k, v, captures, True)
    return out, lse


def exact(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, captures: list[Tensor]) -> Tensor:
    wide = [c.double() if c.is_floating_point() else c for c in captures]
    spec = dataclasses.replace(spec, out_dtype=torch.float64)
    return reference.attention(q.double(), k.double(), v.double(), wide, str(spec))


@pytest.mark.parametrize(
    ("name", "shape", "config"),
    [(n, s, config(n, a + b)) for a, n in enumerate(SERVED) for b, s in enumerate(SHAPES)],
)
def test_streams_are_within_the_budget_of_eager(
    name: str, shape: str, config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = SHAPES[shape]
    spec = specification(name, sizes, HALF, "zero")
    q, k, v = operands(sizes, HALF)
    captures = captured(name, sizes, spec)
    out, lse = launch(spec, q, k, v, captures, config, monkeypatch)
    assert_within_budget(out, reference.attention(q, k, v, captures, str(spec)), exact(spec, q, k, v, captures))
    wide = [c.double() if c.is_floating_point() else c for c in captures]
    wanted = torch.logsumexp(reference.logits(spec, q.double(), k.double(), wide), -1)
    torch.testing.assert_close(lse.double(), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("mask", [
    "(j // 50) <= (i // 50)",
    "((j // 24) < (i // 24)) & ((j // 24) >= (i // 24) - 5)",
    "((j // 70) < (i // 70)) | (j < 9)",
])  # fmt: skip
def test_comparisons_of_chunks_bound_the_blocks_of_streams(
    mask: str, config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = SHAPES["square"]
    spec = dataclasses.replace(specification("causal", sizes, HALF, "zero"), mask=parse(mask))
    q, k, v = operands(sizes, HALF)
    out, _ = launch(spec, q, k, v, [], config, monkeypatch)
    assert_within_budget(out, reference.attention(q, k, v, [], str(spec)), exact(spec, q, k, v, []))


@pytest.mark.parametrize("name", ["causal", "additive-mask"])
@pytest.mark.parametrize("width", [40, 72, 80, 96, 192])
def test_head_widths_between_powers_of_two(width: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = Shape(width, width, 150, 200, 1, "group", "bshd", heads=2, batch=1)
    spec = specification(name, sizes, HALF, "zero")
    q, k, v = operands(sizes, HALF)
    captures = captured(name, sizes, spec)
    out, _ = launch(spec, q, k, v, captures, "hopper:128x64s2q2a0", monkeypatch)
    assert_within_budget(out, reference.attention(q, k, v, captures, str(spec)), exact(spec, q, k, v, captures))


@pytest.mark.parametrize("number", range(len(VECTORS)))
def test_vectors_limit_the_blocks_of_streams(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    name = list(VECTORS)[number]
    sizes = Shape(16, 16, 200, 600, 1, batch=4, heads=2)
    spec = VECTORS[name].specification(HALF, get_args(EmptyRows)[1 + number % 2])
    q, k, v = operands(sizes, HALF)
    captures = VECTORS[name].draw(sizes)
    out, _ = launch(spec, q, k, v, captures, CONFIGS[number % len(CONFIGS)], monkeypatch)
    assert_within_budget(out, reference.attention(q, k, v, captures, str(spec)), exact(spec, q, k, v, captures))
