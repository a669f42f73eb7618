"""Attentions to generate kernels for, and tensors for them that lie in poisoned memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from fxopt.codegen.attention.packed import Heads, Places
from fxopt.ir.attention import AttentionSpec, Capture, KvMap, OutLayout
from fxopt.ir.expression import parse

T = TypeVar("T")
CAUSAL = "j <= i + (Sk - Sq)"
#: name -> (score, mask, captures); ``f`` stands for the dtype of the inputs.
EXPRESSIONS: dict[str, tuple[str, str | None, tuple[str, ...]]] = {
    "plain": ("s * 0.125", None, ()),
    "causal": ("s * 0.125", CAUSAL, ()),
    "window": ("s / 8.0", f"({CAUSAL}) & (j > i + (Sk - Sq) - 7)", ()),
    "both-sides": ("s * 0.125", "((i - j) < 5) & ((j - i) <= 3)", ()),
    "padding": ("s * 0.125", "c0", ("b--j:bool",)),
    "causal-padding": ("s * 0.125", "(j <= i) & (c0 != 0)", ("b--j:i64",)),
    "lengths": ("s * 0.125", "(j < c0) & (j >= 2)", ("b---:i64",)),
    "softcap": ("20.0 * tanh(s * 0.125 / 20.0)", None, ()),
    "alibi": ("s * 0.125 + c0 * float(j - i)", "j <= i", ("-h--:f32",)),
    "tile-bias": ("s * 0.125 + c0", None, ("-hij:f",)),
    "swin": ("s * 0.125 + c0 + c1", None, ("-hij:f", "p-ij:f")),
    "band": ("s * 0.125 + c0", None, ("-h-d:f",)),
    "causal-band": ("s * 0.125 + c0", "j <= i", ("bh-d:f",)),
    "row-scale": ("s * c0 + c1", None, ("bhi-:f", "----:f")),
    "finite-fill": ("where(c0, s * 0.125, -3.3895313892515355e+38)", None, ("b-ij:bool",)),
    "additive-mask": ("s * 0.125 + c0", None, ("b--j:fill",)),
    "documents": ("s * 0.125", "c0 == c1", ("b-i-:i64", "b--j:i64")),
    "prefix": ("s * 0.125", "(j <= i) | (j < 3)", ()),
    "chunked": ("s * 0.125", "(j <= i) & ((i // 5) == (j // 5))", ()),
    "block-diagonal": ("s * 0.125", "(i // 24) == (j // 24)", ()),
    "dilated": ("s * 0.125", "(j <= i) & (((i - j) % 3) == 0)", ()),
}
#: Those without captured tensors that are read by the distance of key and row, for kernels that refuse these.
WITHOUT_BANDS = {name: parts for name, parts in EXPRESSIONS.items() if "band" not in name}


@dataclass(frozen=True)
class Shape:
    """Sizes and layouts of one case; ``packed`` takes q, k and v from one buffer ``[B, S, 3, H, D]``."""

    head_dim: int
    value_dim: int
    rows: int
    keys: int
    kv_heads: int = 2
    kv_map: KvMap = "group"
    layout: OutLayout = "bhsd"
    packed: bool = False
    batch: int = 2
    heads: int = 2


def pairwise(first: Iterable[str], second: Iterable[str], third: Iterable[str]) -> list[tuple[str, str, str]]:
    """Triples in which every two values of different axes meet, ``third`` in turn, instead of the whole product.

    The first two must be at least as long as the third.
    """
    turns = list(third)
    pairs = [(a, n + m, b) for n, a in enumerate(first) for m, b in enumerate(second)]
    return [(a, b, turns[turn % len(turns)]) for a, turn, b in pairs]


def twice(first: Iterable[str], second: Iterable[str], third: Iterable[str]) -> list[tuple[str, str, str]]:
    """Triples in which each of ``first`` meets two of ``second``, and ``third`` comes in turn.

    For the interpreter, in which a test takes seconds; all pairs meet on the GPU.
    """
    seconds, turns = list(second), list(third)
    return [
        (a, seconds[(n + 2 * m) % len(seconds)], turns[(n + m) % len(turns)])
        for n, a in enumerate(first)
        for m in range(2)
    ]


def in_turn(found: Sequence[T], name: str, shape: str, shapes: Mapping[str, Shape]) -> T:
    """One of the configurations ``found``, which takes minutes less than to compile them all.

    Shapes of one head width take the next one each, and so does every further expression of `EXPRESSIONS`: every
    configuration of a width meets expressions and shapes of that width.
    """
    alike = [other for other, sizes in shapes.items() if sizes.head_dim == shapes[shape].head_dim]
    return found[(alike.index(shape) + list(EXPRESSIONS).index(name)) % len(found)]


SHAPES = {
    "tails": Shape(16, 16, 35, 35, 1),
    "one-row": Shape(40, 72, 1, 33, 1, "group", "bshd"),
    "fewer-keys": Shape(24, 16, 34, 19, 2, "tile", "bshd", heads=4),
    "grouped": Shape(64, 32, 16, 48, 2, "group", heads=4),
    "packed": Shape(80, 80, 21, 21, 2, "group", "bshd", packed=True),
}


#: Where queries, keys and values of two query heads of 8 columns lie in one tensor.
PLACES = {
    "heads of each apart": Places(8, Heads(0, 8, 2), Heads(16, 8, 2), Heads(32, 8, 2)),
    "heads in turn": Places(8, Heads(0, 24, 2), Heads(8, 24, 2), Heads(16, 24, 2)),
    "one key/value head": Places(8, Heads(0, 8, 2), Heads(16, 8, 1), Heads(24, 8, 1)),
    "values first": Places(8, Heads(32, 8, 2), Heads(16, 8, 2), Heads(0, 8, 2)),
}


def specification(name: str, shape: Shape, dtype: torch.dtype, empty_rows: str = "nan") -> AttentionSpec:
    """The case ``name`` of `EXPRESSIONS`."""
    score, mask, captures = EXPRESSIONS[name]
    return AttentionSpec(
        parse(score),
        None if mask is None else parse(mask),
        tuple(_capture(text, dtype) for text in captures),
        kv_map=shape.kv_map,
        empty_rows=empty_rows,  # type: ignore[arg-type]
        out_dtype=dtype,
        out_layout=shape.layout,
    )


def _capture(text: str, dtype: torch.dtype) -> Capture:
    dims, _, kind = text.partition(":")
    named = {"bool": torch.bool, "i64": torch.int64, "f32": torch.float32}
    return Capture(dims, named.get(kind, dtype))


def operands(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """``q, k, v``, surrounded by NaN on every side."""
    if shape.packed:
        buffer = poisoned((shape.batch, shape.rows, 3, shape.heads, shape.head_dim), dtype)
        q, k, v = (buffer[:, :, n].transpose(1, 2) for n in range(3))
        return q, k, v
    q = poisoned((shape.batch, shape.heads, shape.rows, shape.head_dim), dtype)
    k = poisoned((shape.batch, shape.kv_heads, shape.keys, shape.head_dim), dtype)
    v = poisoned((shape.batch, shape.kv_heads, shape.keys, shape.value_dim), dtype)
    return q, k, v


def captured(name: str, shape: Shape, spec: AttentionSpec) -> list[Tensor]:
    """The captured tensors of a case."""
    sizes = {"b": shape.batch, "h": shape.heads, "i": shape.rows, "j": shape.keys, "-": 1, "p": shape.batch}
    sizes["d"] = shape.rows + shape.keys - 1
    found = []
    for text, how in zip(EXPRESSIONS[name][2], spec.captures, strict=True):
        size = tuple(sizes[letter] for letter in how.dims)
        if text.endswith("fill"):
            hidden = torch.rand(size) < 0.3
            found.append(torch.zeros(size, dtype=how.dtype).masked_fill(hidden, torch.finfo(how.dtype).min))
        elif how.kind == "bool":
            found.append(torch.rand(size) < 0.6)
        elif how.kind == "int":
            found.append(torch.randint(0, max(shape.keys, 3) if how.dims == "b---" else 3, size))
        else:
            found.append(poisoned(size, how.dtype))
    return found


def poisoned(size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Random values of this size inside a larger buffer of NaN."""
    buffer = torch.full([n + 2 for n in size], torch.nan, dtype=dtype)
    inner = buffer[tuple(slice(1, n + 1) for n in size)]
    inner.copy_(torch.randn(size))
    return inner
