"""The canonical linear attention's specification: what it is besides its tensors.

Legend: ``B`` batch, ``H`` heads, ``S`` queries, ``T`` keys, ``D`` head dimension of queries and keys, ``E`` of values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, get_args

import torch

from fxopt.errors import ExpressionError
from fxopt.ir.attention import DTYPE_NAMES, NAME_OF, OutLayout

#: What the sum of the weights of a row is increased by, as SLAB has it.
EPS: Final = 1e-6
#: How a result of the dtype of the queries is printed.
_SAME: Final = "same"


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """The constant part of a canonical linear attention.

    Attributes:
        causal: whether query ``i`` reads keys ``j <= i`` only; there are as many keys as queries then.
        side: the side of the square grid that the tokens form, for the convolution of the values; 0 without one.
        first: how many tokens stand before the grid (class tokens); the convolution leaves them out.
        eps: added to the sum of a row's weights.
        out_dtype: dtype of the result; ``None`` for that of the queries, whatever it is.
        out_layout: memory order of the result ``[B,H,S,E]``, as `fxopt.ir.attention.AttentionSpec` has it.
    """

    causal: bool = False
    side: int = 0
    first: int = 0
    eps: float = EPS
    out_dtype: torch.dtype | None = None
    out_layout: OutLayout = "bhsd"

    def __post_init__(self) -> None:
        if self.out_layout not in get_args(OutLayout):
            raise ExpressionError(f"unknown output layout {self.out_layout!r}; use one of {get_args(OutLayout)}")
        if not self.eps > 0:
            raise ExpressionError(f"eps={self.eps} would divide 0 by 0 where a query meets no key; it must be positive")
        if self.side < 0 or self.first < 0 or (self.first and not self.side):
            raise ExpressionError(f"{self.first} tokens before a grid of side {self.side} make no sense")
        if self.causal and self.side:
            raise ExpressionError("a convolution over a grid looks ahead, which a causal attention must not")

    def result(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of the result for queries of ``dtype``."""
        return dtype if self.out_dtype is None else self.out_dtype

    def __str__(self) -> str:
        """The form carried by graph nodes: ``name=value`` fields joined by ``"; "``; `read_linear_spec` reads it."""
        fields = {
            "causal": str(self.causal),
            "grid": f"{self.first}+{self.side}x{self.side}" if self.side else "None",
            "eps": repr(self.eps),
            "out": f"{_SAME if self.out_dtype is None else NAME_OF[self.out_dtype]}:{self.out_layout}",
        }
        return "; ".join(f"{name}={value}" for name, value in fields.items())


def read_linear_spec(text: str) -> LinearSpec:
    """Read what ``str(LinearSpec)`` printed; raises `ExpressionError` on anything else."""
    try:
        fields = dict(part.split("=", 1) for part in text.split("; "))
        first, _, grid = "0+0x0".partition("+") if fields["grid"] == "None" else fields["grid"].partition("+")
        dtype, _, layout = fields["out"].partition(":")
        spec = LinearSpec(
            causal={"True": True, "False": False}[fields["causal"]],
            side=int(grid.partition("x")[0]),
            first=int(first),
            eps=float(fields["eps"]),
            out_dtype=None if dtype == _SAME else DTYPE_NAMES[dtype],
            out_layout=layout,  # type: ignore[arg-type]  # __post_init__ checks the name
        )
    except (KeyError, ValueError) as error:
        raise ExpressionError(f"not a specification of linear attention: {text!r} ({error})") from error
    if str(spec) != text:
        raise ExpressionError(f"not a specification of linear attention: {text!r}; nearest is {str(spec)!r}")
    return spec
