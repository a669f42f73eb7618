"""Batches of sequences that are filled in part: masks of their keys, or of their rows and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from fxopt.ir.attention import AttentionSpec, Capture, EmptyRows
from fxopt.ir.expression import parse

FILLINGS = ("mixed", "equal", "full", "empty", "one", "one, empty", "many")


def lengths(name: str, whole: int) -> tuple[int, ...]:
    """How much of each sequence is filled: nothing, one, all, to within and to the end of blocks; equal lengths."""
    found = {
        "mixed": (128, 0, whole, 1, 129, 64, 0),
        "equal": (whole // 2 + 30,) * 5,
        "full": (whole,) * 3,
        "empty": (0, 0, 0, 0),
        "one": (77,),
        "one, empty": (0,),
        "many": tuple(n * 37 % (whole + 1) for n in range(300)),
    }
    return found[name]


def padded(rows: bool, empty_rows: EmptyRows, dtype: torch.dtype = torch.bfloat16) -> AttentionSpec:
    """Attention that keeps the keys, and with ``rows`` the rows, that are filled."""
    captures = (Capture("b--j", torch.bool), Capture("b-i-", torch.bool))
    mask, read = ("c0 & c1", captures) if rows else ("c0", captures[:1])
    return AttentionSpec(parse("s * 0.125"), parse(mask), read, empty_rows=empty_rows, out_dtype=dtype)


def vectors(filled: tuple[int, ...], whole: int, rows: bool) -> list[Tensor]:
    """Its captured tensors."""
    kept = torch.arange(whole) < torch.tensor(filled)[:, None]
    return [kept[:, None, None, :], *([kept[:, None, :, None]] if rows else [])]
