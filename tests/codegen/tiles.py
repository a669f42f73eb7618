"""Attentions that read a tensor by row and key, as a stream of blocks reads it: where it stands, and what it holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxopt.ir.attention import AttentionSpec, Capture, EmptyRows
from fxopt.ir.expression import parse
from tests.codegen.cases import Shape, poisoned


@dataclass(frozen=True)
class Tile:
    """A score and mask that read ``c0`` of ``dims`` and vectors ``c1 …`` of keys; ``hidden`` fills entries and rows."""

    score: str
    dims: str
    mask: str | None = None
    hidden: str = "nothing"
    vectors: int = 0

    def specification(self, shape: Shape, dtype: torch.dtype, empty_rows: EmptyRows) -> AttentionSpec:
        """The attention on operands of ``shape``."""
        captures = (Capture(self.dims, dtype), *[Capture("b--j", dtype)] * self.vectors)
        mask = None if self.mask is None else parse(self.mask)
        return AttentionSpec(
            parse(self.score), mask, captures, kv_map=shape.kv_map, empty_rows=empty_rows, out_dtype=dtype,
            out_layout=shape.layout,
        )  # fmt: skip

    def draw(self, shape: Shape, dtype: torch.dtype) -> list[Tensor]:
        """What it captures."""
        sizes = {"b": shape.batch, "h": shape.heads, "i": shape.rows, "j": shape.keys, "-": 1}
        tile = poisoned([sizes[letter] for letter in self.dims], dtype)
        if self.hidden != "nothing":
            fill = -torch.inf if self.hidden == "infinite" else torch.finfo(dtype).min
            tile[torch.rand(tile.shape) < 0.3] = fill
            tile[:, :, 3::17] = fill
            tile[:, :, :, : shape.keys // 2][:, :, 5::7] = fill
        return [tile, *(poisoned((shape.batch, 1, 1, shape.keys), dtype) for _ in range(self.vectors))]


TILES = {
    "by head": Tile("s * 0.125 + c0", "-hij"),
    "by batch entry": Tile("c0 + s / 4.0", "b-ij"),
    "for all": Tile("s + c0", "--ij"),
    "by both": Tile("s * 0.17 + c0", "bhij"),
    "infinite": Tile("s * 0.125 + c0", "b-ij", hidden="infinite"),
    "lowest": Tile("s * 0.125 + c0", "bhij", hidden="lowest"),
    "infinite, added": Tile("s * 0.17 + c0", "-hij", hidden="infinite"),
    "lowest, added": Tile("s * 0.17 + c0", "b-ij", hidden="lowest"),
    "causal": Tile("s * 0.125 + c0", "-hij", "j <= i"),
    "window": Tile("s * 0.125 + c0", "--ij", "(j <= i) & (j > i - 150)", "infinite"),
    "softcap": Tile("20.0 * tanh((s * 0.125 + c0) / 20.0)", "bhij"),
    "with a vector": Tile("(s * 0.125 + c0) + c1", "-hij", vectors=1),
    "subtracted": Tile("s * 0.125 - c0", "bhij"),
    "read twice": Tile("s * 0.125 + c0", "b-ij", "c0 > -0.5"),
}
