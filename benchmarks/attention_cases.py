"""One case of the attention benchmark: its sizes, its operands, the work that it is, and its result in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from benchmarks.attention_kinds import Data, Kind, Sizes
from fxopt.ir.attention import AttentionSpec

Mode = Literal["forward", "backward", "forward+backward"]
#: Multiplications and additions of each kept score per unit of head dimension: two contractions forward, five backward.
_FLOPS: Final[dict[Mode, float]] = {"forward": 4.0, "backward": 10.0, "forward+backward": 14.0}
#: Side of the blocks in which computed work is counted: at most that of any kernel's tiles.
BLOCK: Final = 64


@dataclass(frozen=True)
class Operands:
    """``q, k, v``, the kind's data, the specification's captures, and the gradient of the result where one is asked."""

    q: Tensor
    k: Tensor
    v: Tensor
    data: Data
    captures: list[Tensor]
    spec: AttentionSpec
    grad_out: Tensor | None = None

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        """The operands that are differentiated."""
        return self.q, self.k, self.v


@dataclass(frozen=True)
class Work:
    """``flops`` of the scores that the mask keeps, ``computed`` of the blocks that hold one, ``bytes`` of k and v."""

    flops: float
    computed: float
    bytes: float


@dataclass(frozen=True)
class Probe:
    """A part of a result in float64: ``outputs[n][batch, head, rows] = exact[n]``, but for rows without any key."""

    batch: int
    head: int
    rows: slice
    exact: tuple[Tensor, ...]
    kept: Tensor


@dataclass(frozen=True)
class Case:
    """``kind`` of attention at ``sizes``.

    Attributes:
        group: the group of the figures that it belongs to.
        kind: what is computed.
        sizes: on how much.
        label: the sizes in short, part of the name.
        peers: the names of what it is compared with.
        mode: what is timed.
        quick: whether it is part of a quick run.
        baselines: the kinds that our own kernel is timed on as well, or "copy" for a copy of memory.
    """

    group: str
    kind: Kind
    sizes: Sizes
    label: str
    peers: tuple[str, ...]
    mode: Mode = "forward"
    quick: bool = False
    baselines: tuple[Kind | Literal["copy"], ...] = ()

    def __str__(self) -> str:
        named = self.mode if self.mode != "forward" else self.group
        return f"{named} {self.kind.name} {self.label}"

    @property
    def unit(self) -> Literal["TFLOP/s", "GB/s"]:
        """What its rate is given in."""
        return "GB/s" if self.sizes.rows == 1 else "TFLOP/s"

    def operands(self, device: torch.device, dtype: torch.dtype) -> Operands:
        """Fresh random operands."""
        z = self.sizes
        grads = self.mode != "forward"
        shapes = [(z.batch, z.heads, z.rows, z.width), *[(z.batch, z.kv_heads, z.keys, z.width)] * 2]
        q, k, v = (torch.randn(shape, device=device, dtype=dtype) for shape in shapes)
        q.mul_(self.kind.query_scale)
        for tensor in (q, k, v):
            tensor.requires_grad_(grads)
        grad_out = torch.randn(shapes[0], device=device, dtype=dtype) if grads else None
        return Operands(q, k, v, *self._of_kind(self.kind, device, dtype), grad_out)

    def with_kind(self, kind: Kind, operands: Operands) -> Operands:
        """The same ``q, k, v`` for another kind of attention."""
        return Operands(*operands.qkv, *self._of_kind(kind, operands.q.device, operands.q.dtype), operands.grad_out)

    def _of_kind(
        self, kind: Kind, device: torch.device, dtype: torch.dtype
    ) -> tuple[Data, list[Tensor], AttentionSpec]:
        data = tuple(tensor.to(device) for tensor in kind.data(self.sizes, device, dtype))
        captures = kind.captures(data, self.sizes)
        return data, captures, kind.spec(self.sizes, captures, dtype)

    def work(self, kind: Kind, operands: Operands) -> Work:
        """The work that ``kind`` is at these sizes."""
        z = self.sizes
        scores, blocks = _kept_scores(kind, operands, z)
        per_score = _FLOPS[self.mode] * z.heads * z.width
        size = operands.k.element_size()
        return Work(scores * per_score, blocks * per_score, 2.0 * z.batch * z.kv_heads * z.keys * z.width * size)

    def probes(self, kind: Kind, operands: Operands, rows: int = 128) -> list[Probe]:
        """The first rows of the first and last sequence, and the last ones of the last; gradients of whole heads."""
        z = self.sizes
        first, last = slice(0, min(rows, z.rows)), slice(max(0, z.rows - rows), z.rows)
        whole = slice(0, z.rows)
        places = [(0, z.heads - 1, first), (z.batch - 1, 0, last), (z.batch - 1, z.heads // 2, first)]
        if self.mode == "forward":
            return [_exact(kind, operands, z, *place) for place in places]
        return [_exact_gradients(kind, operands, z, b, h, whole) for b, h, _ in places[:2]]


def _kept_scores(kind: Kind, operands: Operands, sizes: Sizes) -> tuple[float, float]:
    """Scores that the mask keeps, over all sequences and one head; and those of the blocks in which one is kept."""
    every = float(sizes.batch * sizes.rows * sizes.keys)
    if kind.mask_mod is None:
        return every, every
    keeps = kind.mask_mod(operands.data)
    device = operands.q.device
    b = torch.arange(sizes.batch, device=device)[:, None, None]
    h, j = torch.zeros((), dtype=torch.long, device=device), torch.arange(sizes.keys, device=device)
    scores = blocks = 0.0
    for start in range(0, sizes.rows, BLOCK):
        i = torch.arange(start, min(start + BLOCK, sizes.rows), device=device)[:, None]
        kept = keeps(b, h, i, j).expand(sizes.batch, len(i), sizes.keys)
        scores += float(kept.sum())
        columns = torch.nn.functional.pad(kept.any(1), (0, -sizes.keys % BLOCK)).unflatten(1, (-1, BLOCK)).any(2)
        widths = torch.full((columns.shape[1],), BLOCK, device=device)
        widths[-1] = sizes.keys - BLOCK * (columns.shape[1] - 1)
        blocks += float((columns * widths).sum()) * len(i)
    return scores, blocks


def exact_logits(kind: Kind, data: Data, scaled_ST: Tensor, b: int, h: int, rows: slice) -> tuple[Tensor, Tensor]:
    """Logits of some rows of one head in the dtype of ``scaled_ST``, and where a key is kept."""
    device = scaled_ST.device
    batch, head = torch.tensor(b, device=device), torch.tensor(h, device=device)
    i = torch.arange(rows.start, rows.stop, device=device)[:, None]
    j = torch.arange(scaled_ST.shape[1], device=device)
    # Vectors are widened, since products with them would round; larger tables are only added, which promotes them.
    wide = tuple(x.to(scaled_ST.dtype) if x.is_floating_point() and x.ndim == 1 else x for x in data)
    kept = torch.ones_like(scaled_ST, dtype=torch.bool)
    if kind.mask_mod is not None:
        kept = kind.mask_mod(wide)(batch, head, i, j).expand_as(scaled_ST)
    if kind.score_mod is not None:
        scaled_ST = kind.score_mod(wide)(scaled_ST, batch, head, i, j)
    return scaled_ST.masked_fill(~kept, -math.inf), kept


def _attend(
    kind: Kind, operands: Operands, sizes: Sizes, b: int, h: int, rows: slice, qkv: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    q, k, v = qkv
    logits, kept = exact_logits(kind, operands.data, q @ k.T * sizes.scale, b, h, rows)
    return torch.softmax(logits, -1) @ v, kept.any(-1)


def _of_head(operands: Operands, sizes: Sizes, b: int, h: int, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    g = h // sizes.group
    parts = operands.q[b, h, rows], operands.k[b, g], operands.v[b, g]
    q, k, v = (part.detach().double() for part in parts)
    return q, k, v


def _exact(kind: Kind, operands: Operands, sizes: Sizes, b: int, h: int, rows: slice) -> Probe:
    out, kept = _attend(kind, operands, sizes, b, h, rows, _of_head(operands, sizes, b, h, rows))
    return Probe(b, h, rows, (out,), kept)


def _exact_gradients(kind: Kind, operands: Operands, sizes: Sizes, b: int, h: int, rows: slice) -> Probe:
    q, k, v = (part.requires_grad_() for part in _of_head(operands, sizes, b, h, rows))
    out, kept = _attend(kind, operands, sizes, b, h, rows, (q, k, v))
    assert operands.grad_out is not None
    gradients = torch.autograd.grad(out, (q, k, v), operands.grad_out[b, h].double())
    return Probe(b, h, rows, gradients, kept)
