"""Masks that leave out blocks between those that they keep: by place, head, batch element, or captured tensors."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from fxopt.codegen.attention import reference
from fxopt.ir.attention import AttentionSpec
from tests.codegen.cases import Shape
from tests.codegen.vectors import VECTORS, Vectors


def _globals(shape: Shape) -> list[Tensor]:
    """Which keys are kept by every row, and which rows keep every key: few, elsewhere in each batch element."""
    place = (torch.arange(shape.batch) * 41 + 50)[:, None]
    keys, rows = (torch.arange(n) - place for n in (shape.keys, shape.rows))
    return [((keys >= 0) & (keys < 3))[:, None, None, :], (rows == 0)[:, None, :, None]]


def _plane(shape: Shape) -> list[Tensor]:
    """Blocks of 16 rows and keys drawn at random, some of them whole."""
    size = (-(-shape.rows // 16), -(-shape.keys // 16))
    drawn = (torch.rand(size) < 0.4).repeat_interleave(16, 0).repeat_interleave(16, 1)[: shape.rows, : shape.keys]
    part = (torch.rand(size) < 0.5).repeat_interleave(16, 0).repeat_interleave(16, 1)[: shape.rows, : shape.keys]
    return [(drawn & (part | (torch.rand(drawn.shape) < 0.3)))[None, None]]


def _nothing(shape: Shape) -> list[Tensor]:
    return []


def _place(mask: str) -> Vectors:
    return Vectors(mask, (), _nothing)


HOLES: Final[dict[str, Vectors]] = {
    "longformer": _place("((abs(i - j) <= 9) | (j < 3)) | (i < 3)"),
    "sinks": _place("(j <= i) & ((j < 4) | ((i - j) < 12))"),
    "strided": _place("(j <= i) & (((i - j) < 9) | ((j % 40) >= 37))"),
    "dilated": _place("(abs(i - j) <= 60) & (((i - j) % 30) == 0)"),
    "block-causal": _place("(j // 24) <= (i // 24)"),
    "rows without keys": _place("(j < i - 40) & ((j % 50) >= 47)"),
    "ends": _place("(j < 3) | (j >= Sk - 2)"),
    "by head": Vectors(
        "(abs(i - j) < c0) | (j < 2)", ("-h--:i64",), lambda s: [(torch.arange(s.heads) * 40 + 5)[None, :, None, None]]
    ),
    "by the number of the head": _place("(((i // 16) + (j // 16) + h + b) % 3) == 0"),
    "by batch": Vectors(
        "(j < c0) & (((j % 48) < 8) | (j >= i))", ("b---:i64",),
        lambda s: [(torch.arange(s.batch) * s.keys // 2)[:, None, None, None]],
    ),
    "keys by batch": Vectors(
        "((j <= i) & ((j % 50) >= 40)) & c0", ("b--j:bool",),
        lambda s: [(torch.arange(s.keys) < s.keys - 30 * torch.arange(s.batch)[:, None])[:, None, None, :]],
    ),
    "rows of a batch": Vectors(
        "c0 & (((i // 16) % 2) == 0)", ("b---:bool",), lambda s: [(torch.arange(s.batch) == 0)[:, None, None, None]]
    ),
    "global tokens": Vectors("((abs(i - j) <= 9) | c0) | c1", ("b--j:bool", "b-i-:bool"), _globals),
    "interleaved documents": VECTORS["interleaved documents"],
    "causal documents, padding": VECTORS["causal documents, padding"],
    "plane": Vectors("c0", ("--ij:bool",), _plane),
}  # fmt: skip


def kinds(spec: AttentionSpec, sizes: Shape, captures: list[Tensor], block_m: int, block_n: int) -> Tensor:
    """What each block ``[B, H, rows, keys]`` keeps: 0 for nothing, 1 for a part, 2 for all; from the whole mask."""
    assert spec.mask is not None
    s = torch.zeros(sizes.batch, sizes.heads, sizes.rows, sizes.keys)
    readings = reference.read_captures(spec, captures, s)
    kept = reference.kept(spec.mask, reference.environment(spec, s), readings, s).expand_as(s)
    padding = (0, -sizes.keys % block_n, 0, -sizes.rows % block_m)
    kept, inside = (torch.nn.functional.pad(x, padding) for x in (kept, torch.ones_like(kept)))
    # Rows beyond the end count for nothing; keys beyond it are left out.
    beyond = ~inside.any(-1, keepdim=True)
    blocks = [x.unflatten(3, (-1, block_n)).unflatten(2, (-1, block_m)) for x in (kept & inside, kept | beyond)]
    some, every = blocks[0].any(5).any(3), blocks[1].all(5).all(3)
    told: Tensor = some.int() + every.int()
    return told
