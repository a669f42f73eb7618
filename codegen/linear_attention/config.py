"""How generated kernels of linear attention are cut into blocks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal, get_args

import torch

from fxopt.codegen.attention.portable.config import padded
from fxopt.errors import LoweringError

Association = Literal["linear", "quadratic"]

_TEXT: Final = re.compile(r"(linear|quadratic)-(\d+)x(\d+)w(\d+)g(\d+)")


@dataclass(frozen=True, slots=True)
class LinearConfig:
    """``block`` tokens by ``columns`` channels at a time, by ``num_warps`` warps.

    ``association`` says whether ``Kᵀv`` or ``QKᵀ`` is computed first; the latter holds all tokens in one block, so it
    is for short sequences. A program works on ``group`` sequences one after the other. Prints as
    ``linear-64x32w4g1``; `read_linear_config` is the inverse.
    """

    association: Association
    block: int
    columns: int
    num_warps: int
    group: int = 1

    def __post_init__(self) -> None:
        sizes = (self.block, self.columns, self.num_warps)
        powers = all(n > 0 and n & (n - 1) == 0 for n in sizes)
        if not powers or min(sizes[:2]) < 16 or self.group < 1:
            raise LoweringError(f"{self} is not a kernel configuration: blocks are powers of two from 16, warps of two")
        if self.association not in get_args(Association):
            raise LoweringError(f"{self.association!r} is no way to associate; they are {get_args(Association)}")

    def __str__(self) -> str:
        return f"{self.association}-{self.block}x{self.columns}w{self.num_warps}g{self.group}"


def read_linear_config(text: str) -> LinearConfig:
    """Read what ``str(LinearConfig)`` printed; raises `LoweringError` on anything else."""
    match = _TEXT.fullmatch(text)
    if match is None:
        raise LoweringError(f"not a kernel configuration: {text!r}; an example is 'linear-64x32w4g1'")
    return LinearConfig(match[1], *map(int, match.groups()[1:]))  # type: ignore[arg-type]  # the pattern names both


_Cut = tuple[int, int, int]
#: Blocks of tokens and columns, and warps, of the forward and of the gradients, that need no local memory on any
#: architecture, by the width that the wider of the two head dimensions is padded to. Wider ones don't fit registers.
_BF16: Final[dict[int, tuple[_Cut, _Cut]]] = {
    32: ((64, 32, 4), (64, 32, 4)),
    64: ((64, 64, 8), (64, 64, 8)),
    128: ((64, 64, 8), (32, 64, 8)),
    256: ((32, 64, 8), (32, 32, 8)),
}
#: Products in three parts of TF32 take more registers.
_F16: Final[dict[int, tuple[_Cut, _Cut]]] = {
    32: ((64, 32, 4), (32, 32, 8)),
    64: ((64, 64, 8), (32, 32, 8)),
}
_SINGLE: Final[dict[int, tuple[_Cut, _Cut]]] = {
    32: ((32, 32, 4), (32, 32, 8)),
    64: ((32, 32, 8), (16, 32, 8)),
    128: ((16, 32, 8), (16, 16, 8)),
}
_BF16_CAUSAL: Final[dict[int, tuple[_Cut, _Cut]]] = {
    32: ((64, 32, 4), (64, 32, 4)),
    64: ((64, 64, 8), (32, 64, 8)),
    128: ((32, 32, 8), (32, 32, 8)),
}
_F16_CAUSAL: Final[dict[int, tuple[_Cut, _Cut]]] = {
    32: ((32, 32, 4), (32, 32, 8)),
    64: ((32, 32, 8), (16, 32, 8)),
}
_SINGLE_CAUSAL: Final[dict[int, tuple[_Cut, _Cut]]] = {
    32: ((32, 32, 8), (32, 32, 8)),
    64: ((16, 32, 8), (32, 32, 8)),
}
_TABLES: Final = {
    torch.bfloat16: (_BF16, _BF16_CAUSAL), torch.float16: (_F16, _F16_CAUSAL), torch.float32: (_SINGLE, _SINGLE_CAUSAL),
}  # fmt: skip


#: Exceptions by dtype, what is causal, and the widths that heads and values are padded to: with 64 tokens and eight
#: warps Triton 3.6 makes wrong sums of these on Hopper.
_UNEVEN: Final = {(torch.bfloat16, True, 32, 64): ((32, 64, 8), (32, 64, 8))}


def cut(head_dim: int, value_dim: int, dtype: torch.dtype, *, causal: bool) -> tuple[_Cut, _Cut]:
    """Tokens, columns and warps of the forward, and of the gradients; heads are no wider than `largest_head`."""
    table, widths = _table(dtype, causal), (padded(head_dim), padded(value_dim))
    usual = table[min(size for size in table if size >= max(widths))]
    return _UNEVEN.get((dtype, causal, *widths), usual)


def largest_head(dtype: torch.dtype, *, causal: bool) -> int:
    """The widest head that kernels are generated for."""
    return max(_table(dtype, causal))


def _table(dtype: torch.dtype, causal: bool) -> dict[int, tuple[_Cut, _Cut]]:
    plain, masked = _TABLES[dtype]
    return masked if causal else plain
