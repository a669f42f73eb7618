"""Masks that captured vectors make: padding on either side, documents, lengths; some batch elements without keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fxopt.ir.attention import AttentionSpec, Capture, EmptyRows
from fxopt.ir.expression import parse
from tests.codegen.cases import Shape

Draw = Callable[[Shape], list[Tensor]]


@dataclass(frozen=True)
class Vectors:
    """A mask, how its captures are read, and what they hold."""

    mask: str
    captures: tuple[str, ...]
    draw: Draw

    def specification(self, dtype: torch.dtype, empty_rows: EmptyRows = "nan") -> AttentionSpec:
        """The attention over scaled scores with this mask."""
        kinds = {"bool": torch.bool, "i64": torch.int64, "i32": torch.int32}
        captures = tuple(Capture(dims, kinds[kind]) for dims, kind in (text.split(":") for text in self.captures))
        return AttentionSpec(
            parse("s * 0.125"), parse(self.mask), captures, empty_rows=empty_rows, out_dtype=dtype, out_layout="bshd"
        )


def _right(shape: Shape) -> Tensor:
    """Lengths that end within a block, at a block's end, at 0 and at all keys, and a few at random."""
    lengths = torch.tensor([shape.keys // 2 - 3, shape.keys // 4, 0, shape.keys])
    return torch.arange(shape.keys) < lengths[torch.arange(shape.batch) % 4, None]


def _left(shape: Shape) -> Tensor:
    return _right(shape).flip(1)


def _holes(shape: Shape) -> Tensor:
    kept = torch.rand(shape.batch, shape.keys) < 0.5
    kept[:, : shape.keys // 3] = False
    kept[-1] = False
    return kept


def _keys(kept: Tensor) -> Tensor:
    return kept[:, None, None, :]


def _documents(shape: Shape, kind: str) -> list[Tensor]:
    """Numbers of the documents of rows and keys: contiguous, interleaved, or with rows of a document without keys."""
    count = max(shape.rows, shape.keys)
    numbers = (torch.arange(count) * 5 // count).expand(shape.batch, -1)
    if kind == "interleaved":
        numbers = (torch.arange(count) // 3 % 2 + 2 * (torch.arange(count) > count // 2)).expand(shape.batch, -1)
    rows = numbers[:, : shape.rows] + (1000 if kind == "missing" else 0) * (numbers[:, : shape.rows] == 2)
    return [rows[:, None, :, None].clone(), _keys(numbers[:, : shape.keys]).clone()]


VECTORS: dict[str, Vectors] = {
    "right padding": Vectors("c0", ("b--j:bool",), lambda s: [_keys(_right(s))]),
    "left padding": Vectors("c0 != 0", ("b--j:i64",), lambda s: [_keys(_left(s)).long()]),
    "negated padding": Vectors("~c0", ("b--j:bool",), lambda s: [_keys(~_right(s))]),
    "holes": Vectors("c0 == 1", ("b--j:i32",), lambda s: [_keys(_holes(s)).int()]),
    "causal, left padding": Vectors("(j <= i) & c0", ("b--j:bool",), lambda s: [_keys(_left(s))]),
    "window, right padding": Vectors(
        "(j <= i) & (j > i - 30) & c0", ("b--j:bool",), lambda s: [_keys(_right(s))]
    ),
    "contiguous documents": Vectors("c0 == c1", ("b-i-:i64", "b--j:i64"), lambda s: _documents(s, "contiguous")),
    "interleaved documents": Vectors("c1 == c0", ("b-i-:i64", "b--j:i64"), lambda s: _documents(s, "interleaved")),
    "rows without a document": Vectors("~(c0 != c1)", ("b-i-:i64", "b--j:i64"), lambda s: _documents(s, "missing")),
    "causal documents, padding": Vectors(
        "(j <= i) & (c0 == c1) & c2", ("b-i-:i64", "b--j:i64", "b--j:bool"),
        lambda s: [*_documents(s, "contiguous"), _keys(_right(s))],
    ),
    "earlier documents": Vectors("c1 < c0", ("b-i-:i64", "b--j:i64"), lambda s: _documents(s, "interleaved")),
    "other documents": Vectors("c0 != c1", ("b-i-:i64", "b--j:i64"), lambda s: _documents(s, "contiguous")),
    "prefix": Vectors(
        "(j <= i) | (j < c0)", ("b---:i64",), lambda s: [torch.arange(s.batch)[:, None, None, None] * 20]
    ),
    "rows and keys": Vectors(
        "c0 & c1", ("b-i-:bool", "b--j:bool"),
        lambda s: [_holes(s)[:, : s.rows, None][:, None], _keys(_right(s))],
    ),
    "periodic": Vectors("c0", ("p--j:bool",), lambda s: [_keys(_right(s))[:2]]),
    "lengths, left padding": Vectors(
        "(j < c0) & c1", ("b---:i64", "b--j:bool"),
        lambda s: [torch.full((s.batch, 1, 1, 1), s.keys * 3 // 4), _keys(_left(s))],
    ),
}  # fmt: skip
