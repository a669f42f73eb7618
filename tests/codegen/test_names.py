"""Every name that generated source reads is defined there, whatever is attended to, by every family and backward."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import torch

from fxopt.codegen.attention.backward import kernel as backward
from fxopt.codegen.attention.kernels import FAMILIES, source
from fxopt.codegen.attention.problem import Problem
from fxopt.codegen.attention.weights import kernel as weights
from fxopt.codegen.attention.weights.source import KINDS
from fxopt.ir.attention import AttentionSpec, EmptyRows
from tests.codegen.cases import EXPRESSIONS, Shape, specification
from tests.codegen.vectors import VECTORS

HALF = torch.bfloat16
HOPPER = (9, 0)
SHAPES = {
    "short": Shape(64, 64, 197, 197, 2, heads=4),
    "long": Shape(128, 128, 2048, 2048, 2, heads=4),
    "padded heads": Shape(80, 72, 300, 300, 1, "tile", heads=4),
    "few rows": Shape(128, 128, 1, 8192, 2, heads=4),
}


def specifications(shape: Shape, dtype: torch.dtype, turn: int) -> Iterator[AttentionSpec]:
    """Every kind, with what rows without keys give in turn."""
    rows = get_args(EmptyRows)
    for n, name in enumerate(EXPRESSIONS, turn):
        yield specification(name, shape, dtype, rows[n % 3])
    for n, vectors in enumerate(VECTORS.values(), turn):
        yield vectors.specification(dtype, rows[n % 3])


def forwards(shape: Shape, spec: AttentionSpec, dtype: torch.dtype) -> Iterator[str]:
    """By every family that serves, with its first configuration."""
    sizes = (shape.batch, shape.heads, shape.kv_heads, shape.rows, shape.keys)
    problem = Problem(spec, shape.head_dim, shape.value_dim, dtype, HOPPER, *sizes)
    for kind in FAMILIES.values():
        can = (spec.empty_rows != "uniform" or kind.averages) and (not spec.dropout or kind.drops)
        if can and kind.objection(problem) is None:
            yield source(spec, shape.head_dim, shape.value_dim, dtype, kind.candidates(problem)[0])


def backwards(shape: Shape, spec: AttentionSpec, dtype: torch.dtype) -> Iterator[str]:
    """With the gradients of all captured tensors, and of none."""
    sizes = (spec, shape.head_dim, shape.value_dim, dtype)
    if backward.objection(*sizes, averages=True) is not None:
        return
    config = backward.candidates(Problem(*sizes, HOPPER))[0]
    for wanted in {tuple(c.kind == "float" for c in spec.captures), (False,) * len(spec.captures)}:
        yield backward.source(*sizes, config, wanted)


def weight_kernels(shape: Shape, spec: AttentionSpec, dtype: torch.dtype) -> Iterator[str]:
    if weights.objection(spec, shape.head_dim, dtype) is None:
        for kind in KINDS:
            config = weights.candidates(spec, shape.head_dim, dtype, shape.rows)[0]
            yield weights.source(spec, shape.head_dim, dtype, kind, str(config))


def generated() -> Iterator[str]:
    for turn, shape in enumerate(SHAPES.values()):
        for dtype in (HALF, torch.float32):
            for spec in specifications(shape, dtype, turn):
                yield from forwards(shape, spec, dtype)
                yield from weight_kernels(shape, spec, dtype)
                for dropout in (0.0, 0.1):
                    yield from backwards(shape, dataclasses.replace(spec, dropout=dropout), dtype)
                yield from forwards(shape, dataclasses.replace(spec, dropout=0.1), dtype)


def undefined(folder: Path) -> str:
    """What ruff finds of names that nothing defines."""
    options = ("--isolated", "--no-cache", "--select", "F821", "--output-format", "concise")
    command = [sys.executable, "-m", "ruff", "check", *options, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def test_every_name_is_defined(tmp_path: Path) -> None:
    for n, text in enumerate(dict.fromkeys(generated())):
        (tmp_path / f"generated_{n}.py").write_text(text, encoding="utf-8")
    assert undefined(tmp_path).strip() == "All checks passed!"


def test_a_name_that_is_not_defined_is_found(tmp_path: Path) -> None:
    (tmp_path / "generated.py").write_text("def launch() -> int:\n    return missing\n", encoding="utf-8")
    assert "Undefined name `missing`" in undefined(tmp_path)
