"""What is wanted of an attention's weights besides its output, as data and as text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final

import torch
from torch import Tensor

from fxopt.analysis.rows import of_rows
from fxopt.codegen.attention import reference
from fxopt.codegen.attention.weights.reference import reduction, result_size
from fxopt.errors import LoweringError
from fxopt.ir.attention import DTYPE_NAMES, NAME_OF, AttentionSpec
from fxopt.ir.expression import const

_TEXT: Final = re.compile(r"(weights|column_sum|diagonal)(?:\[(\d+):(\d+):(\d+)\])?:(\w+)")


@dataclass(frozen=True, slots=True)
class Want:
    """Something that is wanted of the weights ``P [B, H, S, T]``.

    Attributes:
        kind: ``"weights"``, ``"column_sum"`` or ``"diagonal"``.
        dtype: of the result.
        rows: where only weights of some rows are wanted, the first of them, one past the last, and the step.

    Prints as ``column_sum:f32`` or ``weights[0:1:1]:bf16``; several are joined by `printed` and read by `read_wants`.
    """

    kind: str
    dtype: torch.dtype
    rows: tuple[int, int, int] | None = None

    def __str__(self) -> str:
        rows = "" if self.rows is None else f"[{':'.join(map(str, self.rows))}]"
        return f"{self.kind}{rows}:{NAME_OF[self.dtype]}"

    @property
    def cut(self) -> slice:
        """The rows that are read."""
        return slice(None) if self.rows is None else slice(*self.rows)

    def of(self, weights_BHST: Tensor) -> Tensor:
        """What it is, given all weights."""
        found = weights_BHST[:, :, self.cut] if self.kind == "weights" else reduction(self.kind)(weights_BHST)
        return found.to(self.dtype)

    def size(self, q: Tensor, k: Tensor) -> tuple[int, ...]:
        """The shape of the result for queries ``q`` and keys ``k``."""
        return result_size(q if self.rows is None else q[:, :, self.cut], k, self.kind)

    def captures(self, spec: AttentionSpec, captures: Sequence[Tensor]) -> list[Tensor]:
        """The captured tensors for the rows that are read."""
        if self.rows is None:
            return list(captures)
        return [c[:, :, self.cut] if how.dims[2] == "i" else c for c, how in zip(captures, spec.captures, strict=True)]


def printed(wants: Iterable[Want]) -> str:
    """Several wants as one text; `read_wants` is the inverse."""
    return ";".join(map(str, wants))


@lru_cache(maxsize=1024)
def read_wants(text: str) -> tuple[Want, ...]:
    """Read what `printed` printed; raises `LoweringError` on anything else."""
    return tuple(map(_read, text.split(";")))


def _read(text: str) -> Want:
    match = _TEXT.fullmatch(text)
    if match is None or match[5] not in DTYPE_NAMES or (match[2] and match[1] != "weights"):
        raise LoweringError(
            f"not something that is wanted of attention weights: {text!r}; an example is 'diagonal:f32'"
        )
    start, stop, step = (int(number or 0) for number in match.groups()[1:4])
    if match[2] and not (start < stop and step):
        raise LoweringError(f"no rows are wanted: {text!r}; an example is 'weights[0:1:1]:f32'")
    return Want(match[1], DTYPE_NAMES[match[5]], (start, stop, step) if match[2] else None)


def of_want(spec: AttentionSpec, want: Want, rows: int) -> AttentionSpec:
    """The specification of weights of which all are ``want`` in place of an attention with so many ``rows``."""
    plain = replace(spec, dropout=0.0, out_dtype=want.dtype, out_layout="bhsd")
    if want.rows is None:
        return plain
    start, _, step = want.rows
    score, mask = of_rows(plain, step, lambda: const(start), lambda: const(rows))
    return replace(plain, score=score, mask=mask)


@lru_cache(maxsize=1024)
def text_of_want(spec: str, want: Want, rows: int) -> str:
    """`of_want` from and to the printed form."""
    return str(of_want(reference.specification(spec), want, rows))
