"""The canonical attention operator's specification: everything that an attention can be, as data.

Legend: ``B`` batch, ``H`` query heads, ``G`` key/value heads, ``S`` query length, ``T`` key length, ``D`` head
dimension of queries and keys, ``E`` head dimension of values.

    x[b,h,i,j] = score(s = Σ_d q[b,h,i,d]·k[b,g(h),j,d]; b, h, i, j, captures)
    P = softmax over { j : mask(b,h,i,j) } of x          (0 where the mask is false)
    out[b,h,i,:] = Σ_j dropout(P)[b,h,i,j]·v[b,g(h),j,:]
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Literal, get_args

import torch

from fxopt.errors import ExpressionError
from fxopt.ir.expression import Expr, Kind, kind, parse

KvMap = Literal["group", "tile"]
EmptyRows = Literal["nan", "zero", "uniform"]
OutLayout = Literal["bhsd", "bshd"]

DTYPE_NAMES: Final[dict[str, torch.dtype]] = {
    "bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, "f64": torch.float64,
    "bool": torch.bool, "i32": torch.int32, "i64": torch.int64, "i16": torch.int16, "i8": torch.int8,
    "u8": torch.uint8,
}  # fmt: skip
NAME_OF: Final[dict[torch.dtype, str]] = {dtype: name for name, dtype in DTYPE_NAMES.items()}


@dataclass(frozen=True, slots=True)
class Capture:
    """How a captured tensor is read at ``[b, h, i, j]``. The tensor always has rank 4.

    ``dims`` has one letter per axis: ``-`` size 1, read at 0 for every index; ``b h i j`` indexed by that index;
    ``p`` (first axis only) periodic, indexed by ``b mod size`` (Swin's shift masks); ``d`` (last axis only, with ``-``
    before it) a band, indexed by ``j - i + (Sq - 1)``, of size ``Sq + Sk - 1`` (T5's relative positions). ``dtype`` is
    the tensor's own.
    """

    dims: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.dims}:{NAME_OF[self.dtype]}"

    @property
    def is_band(self) -> bool:
        """Whether it depends on row and key through their distance."""
        return self.dims[-1] == "d"

    @property
    def is_tile(self) -> bool:
        """Whether a block of rows and keys reads a value for each pair."""
        return self.is_band or self.dims[2:] == "ij"

    @property
    def kind(self) -> Kind:
        """The kind of value it holds."""
        if self.dtype is torch.bool:
            return "bool"
        return "float" if self.dtype.is_floating_point else "int"


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """The constant part of a canonical attention; the tensors are ``q [B,H,S,D]``, ``k [B,G,T,D]``, ``v [B,G,T,E]``.

    Attributes:
        score: the logit, an expression that reads ``s`` (the raw dot product, no scale applied).
        mask: boolean expression, true where a key takes part; ``None`` for all. A key outside it has weight exactly 0.
        captures: the captured tensors that ``score`` and ``mask`` read as ``c0, c1, …``.
        kv_map: which key/value head serves query head ``h``: ``"group"`` is ``h // (H/G)``, ``"tile"`` is ``h mod G``.
        empty_rows: what a row with no key left (every logit −inf) gives: ``"nan"`` (softmax of all −inf), ``"zero"``
            (SDPA) or ``"uniform"``: the plain mean of all values, which is the softmax of a row filled with one finite
            number. No gradient flows into the logits of a row that gives 0 or the mean.
        softmax_dtype: the dtype in which the softmax is computed by the graph this was read from; lowered kernels
            compute it in at least float32.
        dropout: probability with which a weight is dropped, 0 outside training; kept weights are scaled by 1/(1−p).
            Which ones are dropped is random: it is the same for the same state of PyTorch's generator within one way of
            running the operator, but not among the ways.
        out_dtype: dtype of the result.
        out_layout: memory order of the result, which always has the shape ``[B,H,S,E]``: ``"bhsd"`` contiguous, or
            ``"bshd"`` (the transpose of a contiguous ``[B,S,H,E]``).
    """

    score: Expr
    mask: Expr | None = None
    captures: tuple[Capture, ...] = ()
    kv_map: KvMap = "group"
    empty_rows: EmptyRows = "nan"
    softmax_dtype: torch.dtype = torch.float32
    dropout: float = 0.0
    out_dtype: torch.dtype = torch.float32
    out_layout: OutLayout = "bhsd"

    def __post_init__(self) -> None:
        for expr in (self.score, self.mask):
            self._check_captures(expr)
        if self.mask is not None and kind(self.mask, self.capture_kinds) != "bool":
            raise ExpressionError(f"an attention mask must be boolean, not {self.mask}")
        if self.kv_map not in get_args(KvMap) or self.empty_rows not in get_args(EmptyRows):
            raise ExpressionError(f"unknown kv map or empty-row rule: {self.kv_map!r}, {self.empty_rows!r}")
        if self.out_layout not in get_args(OutLayout):
            raise ExpressionError(f"unknown output layout {self.out_layout!r}; use one of {get_args(OutLayout)}")
        if not 0 <= self.dropout <= 1:
            raise ExpressionError(f"dropout is a probability, which {self.dropout} is not")

    def _check_captures(self, expr: Expr | None) -> None:
        if expr is None:
            return
        for node in expr.walk():
            if node.op == "capture" and int(node.value or 0) >= len(self.captures):
                raise ExpressionError(f"{expr} reads {node}, but there are {len(self.captures)} captures")

    @property
    def capture_kinds(self) -> tuple[Kind, ...]:
        """The kinds of the captures, as `kind` wants them."""
        return tuple(c.kind for c in self.captures)

    def __str__(self) -> str:
        """The form carried by graph nodes: ``name=value`` fields joined by ``"; "``; `read_spec` is its inverse."""
        fields = {
            "score": str(self.score),
            "mask": str(self.mask),
            "captures": ",".join(map(str, self.captures)) or "None",
            "kv": self.kv_map,
            "rows": self.empty_rows,
            "softmax": NAME_OF[self.softmax_dtype],
            "dropout": repr(self.dropout),
            "out": f"{NAME_OF[self.out_dtype]}:{self.out_layout}",
        }
        return "; ".join(f"{name}={value}" for name, value in fields.items())


@lru_cache(maxsize=1024)
def read_spec(text: str) -> AttentionSpec:
    """Read what ``str(AttentionSpec)`` printed; raises `ExpressionError` on anything else."""
    try:
        fields = dict(part.split("=", 1) for part in text.split("; "))
        captures = fields["captures"]
        dtype, _, layout = fields["out"].partition(":")
        return AttentionSpec(
            score=parse(fields["score"]),
            mask=None if fields["mask"] == "None" else parse(fields["mask"]),
            captures=() if captures == "None" else tuple(_read_capture(c) for c in captures.split(",")),
            kv_map=fields["kv"],  # type: ignore[arg-type]  # __post_init__ checks the name
            empty_rows=fields["rows"],  # type: ignore[arg-type]
            softmax_dtype=DTYPE_NAMES[fields["softmax"]],
            dropout=float(fields["dropout"]),
            out_dtype=DTYPE_NAMES[dtype],
            out_layout=layout,  # type: ignore[arg-type]
        )
    except (KeyError, ValueError) as error:
        raise ExpressionError(f"not an attention specification: {text!r} ({error})") from error


def _read_capture(text: str) -> Capture:
    dims, _, dtype = text.partition(":")
    return Capture(dims, DTYPE_NAMES[dtype])
