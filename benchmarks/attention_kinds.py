"""The kinds of attention that are benchmarked, each said twice: as fxopt's specification and as Python functions.

The functions are FlexAttention's, and what SDPA's masks and the results in float64 are made of, so a mistake in either
saying shows as a wrong result. They read index tensors that broadcast: ``b``, ``h`` (query head), ``i`` (query), ``j``
(key).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from benchmarks.attention_tables import document_ids, shift_mask, t5_band
from benchmarks.model_cases import padding_mask
from fxopt.ir.attention import AttentionSpec, Capture, EmptyRows
from fxopt.ir.expression import parse

CAP: Final = 50.0
Data = tuple[Tensor, ...]
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Sizes:
    """``q [batch, heads, rows, width]``, ``k, v [batch, kv_heads, keys, width]``."""

    batch: int
    heads: int
    kv_heads: int
    rows: int
    keys: int
    width: int

    @property
    def scale(self) -> float:
        """1/√D."""
        return 1 / math.sqrt(self.width)

    @property
    def group(self) -> int:
        """Query heads served by one head of keys and values."""
        return self.heads // self.kv_heads


def _no_data(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Data:
    return ()


def _no_captures(data: Data, sizes: Sizes) -> list[Tensor]:
    return []


@dataclass(frozen=True)
class Kind:
    """One kind of attention.

    Attributes:
        name: as printed.
        score: the logit as an expression, ``{s}`` standing for the scaled product of query and key.
        mask: the mask as an expression; ``None`` keeps every key.
        dims: how the specification reads each captured tensor (see `fxopt.ir.attention.Capture`).
        data: the tensors that belong to it, on any device.
        captures: the captured tensors of the specification, of rank 4, made from the data.
        score_mod: the logit as a function of the scaled product and the indices; ``None`` leaves it.
        mask_mod: the mask as a function of the indices; ``None`` keeps every key.
        per_batch: whether the mask differs from one sequence to the next.
        empty_rows: what a row without any key gives.
        query_scale: what random queries are multiplied by, so that a wrong score shows in the result.
    """

    name: str
    score: str = "{s}"
    mask: str | None = None
    dims: tuple[str, ...] = ()
    data: Callable[[Sizes, torch.device, torch.dtype], Data] = _no_data
    captures: Callable[[Data, Sizes], list[Tensor]] = _no_captures
    score_mod: Callable[[Data], ScoreMod] | None = None
    mask_mod: Callable[[Data], MaskMod] | None = None
    per_batch: bool = False
    empty_rows: EmptyRows = "nan"
    query_scale: float = 1.0

    def spec(self, sizes: Sizes, captures: list[Tensor], dtype: torch.dtype) -> AttentionSpec:
        """The specification for these sizes."""
        score = parse(self.score.format(s=f"(s * {sizes.scale!r})"))
        mask = None if self.mask is None else parse(self.mask)
        read = tuple(Capture(dims, tensor.dtype) for dims, tensor in zip(self.dims, captures, strict=True))
        return AttentionSpec(score, mask, read, empty_rows=self.empty_rows, out_dtype=dtype)


def _causal(data: Data) -> MaskMod:
    return lambda b, h, i, j: j <= i


PLAIN: Final = Kind("plain")
CAUSAL: Final = Kind("causal", mask="j <= i", mask_mod=_causal)


def _cap(data: Data) -> ScoreMod:
    return lambda s, b, h, i, j: CAP * torch.tanh(s / CAP)


SOFTCAP: Final = Kind("softcap", score=f"{CAP} * tanh({{s}} / {CAP})", score_mod=_cap, query_scale=4.0)


def _slopes(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Data:
    return (torch.exp2(torch.arange(1, sizes.heads + 1) * (-8 / sizes.heads)),)


def _by_head(data: Data, sizes: Sizes) -> list[Tensor]:
    return [data[0].view(1, -1, 1, 1)]


def _sloped(data: Data) -> ScoreMod:
    (slopes_H,) = data
    return lambda s, b, h, i, j: s + slopes_H[h] * (j - i)


RELATIVE: Final = Kind("relative-bias", "{s} + c0 * float(j - i)", None, ("-h--",), _slopes, _by_head, _sloped)
ALIBI: Final = Kind("alibi", "{s} + c0 * float(j - i)", "j <= i", ("-h--",), _slopes, _by_head, _sloped, _causal)


def _t5_data(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Data:
    return (t5_band(torch.randn(32, sizes.heads, dtype=dtype), sizes.rows, sizes.keys),)


def _t5_captures(data: Data, sizes: Sizes) -> list[Tensor]:
    """The band ``[1, H, 1, S + T - 1]`` that fxopt makes of the model's table and buckets."""
    return [data[0][None, :, None]]


def _t5_mod(data: Data) -> ScoreMod:
    (band,) = data
    zero = (band.shape[1] - 1) // 2
    return lambda s, b, h, i, j: s + band[h, j - i + zero]


T5: Final = Kind("t5-buckets", "{s} + c0", None, ("-h-d",), _t5_data, _t5_captures, _t5_mod)


def window(size: int) -> Kind:
    """The ``size`` latest keys."""
    mask = f"(j <= i) & (j > i - {size})"
    return Kind("window", mask=mask, mask_mod=lambda data: lambda b, h, i, j: (j <= i) & (j > i - size))


def prefix(size: int) -> Kind:
    """Causal, and the first ``size`` keys for all queries."""
    mask = f"(j <= i) | (j < {size})"
    return Kind("prefix", mask=mask, mask_mod=lambda data: lambda b, h, i, j: (j <= i) | (j < size))


def longformer(side: int, everywhere: int) -> Kind:
    """Keys up to ``side`` away, and ``everywhere`` first tokens that see and are seen by all (arXiv 2004.05150)."""
    mask = f"((abs(i - j) <= {side}) | (j < {everywhere})) | (i < {everywhere})"

    def mod(data: Data) -> MaskMod:
        return lambda b, h, i, j: ((i - j).abs() <= side) | (j < everywhere) | (i < everywhere)

    return Kind("longformer", mask=mask, mask_mod=mod)


def sinks(size: int, first: int = 4) -> Kind:
    """The ``size`` latest keys and the ``first`` ones (StreamingLLM, arXiv 2309.17453)."""
    mask = f"(j <= i) & ((j < {first}) | ((i - j) < {size}))"
    return Kind("sinks", mask=mask, mask_mod=lambda data: lambda b, h, i, j: (j <= i) & ((j < first) | (i - j < size)))


def strided(stride: int, kept: int) -> Kind:
    """The ``stride`` latest keys and the last ``kept`` of each earlier ``stride`` (arXiv 1904.10509)."""
    mask = f"(j <= i) & (((i - j) < {stride}) | ((j % {stride}) >= {stride - kept}))"

    def mod(data: Data) -> MaskMod:
        return lambda b, h, i, j: (j <= i) & ((i - j < stride) | (j % stride >= stride - kept))

    return Kind("strided", mask=mask, mask_mod=mod)


def block_causal(size: int) -> Kind:
    """All keys of earlier chunks of ``size`` tokens and of the row's own."""

    def mod(data: Data) -> MaskMod:
        return lambda b, h, i, j: j // size <= i // size

    return Kind("block-causal", mask=f"(j // {size}) <= (i // {size})", mask_mod=mod)


def _same_document(data: Data) -> MaskMod:
    (document_BN,) = data
    return lambda b, h, i, j: (document_BN[b, i] == document_BN[b, j]) & (j <= i)


def documents(count: int) -> Kind:
    """Rows packed with ``count`` documents, causal within each."""
    return Kind(
        "documents",
        mask="(c0 == c1) & (j <= i)",
        dims=("b-i-", "b--j"),
        data=lambda sizes, device, dtype: (document_ids(sizes.batch, sizes.keys, count),),
        captures=lambda data, sizes: [data[0][:, None, :, None], data[0][:, None, None, :]],
        mask_mod=_same_document,
        per_batch=True,
    )


def interleaved(count: int, run: int) -> Kind:
    """The same with documents that take turns, ``run`` tokens each: their numbers are in no order."""

    def data(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Data:
        return ((torch.arange(sizes.keys) // run % count).int().expand(sizes.batch, -1).contiguous(),)

    return replace(documents(count), name="interleaved", data=data)


def _dense_data(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Data:
    return (torch.randn(sizes.heads, sizes.rows, sizes.keys, device=device, dtype=dtype),)


def _dense_mod(data: Data) -> ScoreMod:
    (bias_HST,) = data
    return lambda s, b, h, i, j: s + bias_HST[h, i, j]


DENSE: Final = Kind(
    "dense-bias", "{s} + c0", None, ("-hij",), _dense_data, lambda data, sizes: [data[0][None]], _dense_mod
)


def shifted_windows(side: int, window_side: int, shift: int) -> Kind:
    """Swin's shifted windows: a bias per head, and the shift mask of the window's place in its image."""

    def data(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Data:
        return (*_dense_data(sizes, device, dtype), shift_mask(side, window_side, shift).to(dtype))

    def mod(data: Data) -> ScoreMod:
        bias_HST, mask_WST = data
        return lambda s, b, h, i, j: s + bias_HST[h, i, j] + mask_WST[b % mask_WST.shape[0], i, j]

    def captures(data: Data, sizes: Sizes) -> list[Tensor]:
        return [data[0][None], data[1][:, None]]

    return Kind("shifted", "{s} + c0 + c1", None, ("-hij", "p-ij"), data, captures, mod)


def _lengths_data(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Data:
    return (padding_mask(sizes.batch, sizes.keys, torch.Generator().manual_seed(0)).bool(),)


def _full_data(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Data:
    return (torch.ones(sizes.batch, sizes.keys, dtype=torch.bool),)


def _unaware_mod(data: Data) -> ScoreMod:
    (bias_BN,) = data
    return lambda s, b, h, i, j: s + bias_BN[b, j]


def _unaware_data(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Data:
    (kept_BN,) = _lengths_data(sizes, device, dtype)
    return (torch.zeros(kept_BN.shape, dtype=dtype).masked_fill(~kept_BN, torch.finfo(dtype).min),)


#: The padded batch as models mask it, by a number added to each key's logits, of which nothing is known beforehand: all
#: blocks are computed. Rows that are no padding give what they give under `padding`.
UNAWARE: Final = Kind(
    "unaware",
    "{s} + c0",
    None,
    ("b--j",),
    _unaware_data,
    lambda data, sizes: [data[0][:, None, None, :]],
    _unaware_mod,
    per_batch=True,
)


def padding(*, rows: bool, full: bool = False) -> Kind:
    """A boolean vector of the tokens that are no padding: of keys, and with ``rows`` of queries too.

    ``full`` is the same without any padding.
    """

    def mod(data: Data) -> MaskMod:
        (kept_BN,) = data
        return (lambda b, h, i, j: kept_BN[b, j] & kept_BN[b, i]) if rows else (lambda b, h, i, j: kept_BN[b, j])

    def captures(data: Data, sizes: Sizes) -> list[Tensor]:
        return [data[0][:, None, None, :], *([data[0][:, None, :, None]] if rows else [])]

    return Kind(
        f"{'full' if full else 'padded'}-{'rows' if rows else 'keys'}",
        mask="c0 & c1" if rows else "c0",
        dims=("b--j", "b-i-") if rows else ("b--j",),
        data=_full_data if full else _lengths_data,
        captures=captures,
        mask_mod=mod,
        per_batch=True,
        empty_rows="zero" if rows else "nan",
    )
