"""What `benchmarks.attention` computes: every case as an fxopt specification, for its peers and in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from fxopt.ir.attention import AttentionSpec, Capture
from fxopt.ir.expression import parse

TOKENS: Final = 16_384
WIDTH: Final = 2048
HEAD_DIMS: Final = (64, 128, 256)
LENGTHS: Final = (512, 2048, 8192)
KINDS: Final = ("plain", "causal", "relative-bias", "softcap", "dense-bias")
_CAP: Final = 50.0


@dataclass(frozen=True)
class Case:
    """``kind`` of attention with head dimension ``head_dim`` over sequences of ``length``; 16k tokens, width 2048."""

    kind: str
    head_dim: int
    length: int

    def __str__(self) -> str:
        return f"{self.kind} D{self.head_dim} N{self.length}"

    @property
    def heads(self) -> int:
        """Number of heads."""
        return WIDTH // self.head_dim

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return TOKENS // self.length

    @property
    def scale(self) -> float:
        """1/√D."""
        return 1 / math.sqrt(self.head_dim)

    @property
    def flops(self) -> float:
        """Multiplications and additions of the two contractions, halved when causal."""
        full = 4.0 * self.batch * self.heads * self.length**2 * self.head_dim
        return full / 2 if self.kind == "causal" else full

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Fresh random ``q, k, v`` in bfloat16."""
        shape = (self.batch, self.heads, self.length, self.head_dim)
        q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        return q, k, v

    def captures(self) -> list[Tensor]:
        """The captured tensors: the slope of each head, or a bias per head and position."""
        if self.kind == "relative-bias":
            exponents = torch.arange(1, self.heads + 1, device="cuda") * (-8 / self.heads)
            return [torch.exp2(exponents).view(1, -1, 1, 1)]
        if self.kind == "dense-bias":
            return [torch.randn(1, self.heads, self.length, self.length, device="cuda", dtype=torch.bfloat16)]
        return []

    @property
    def spec(self) -> AttentionSpec:
        """The case as fxopt states it."""
        scaled = f"s * {self.scale!r}"
        score, captures = {
            "relative-bias": (f"{scaled} + c0 * float(j - i)", (Capture("-h--", torch.float32),)),
            "softcap": (f"{_CAP} * tanh({scaled} / {_CAP})", ()),
            "dense-bias": (f"{scaled} + c0", (Capture("-hij", torch.bfloat16),)),
        }.get(self.kind, (scaled, ()))
        mask = parse("j <= i") if self.kind == "causal" else None
        return AttentionSpec(parse(score), mask, captures, out_dtype=torch.bfloat16)

    def exact(self, q: Tensor, k: Tensor, v: Tensor, captures: list[Tensor], rows: slice) -> Tensor:
        """Some rows of the first sequence's last head, in float64."""
        head = self.heads - 1
        i = torch.arange(self.length, device="cuda")[rows, None]
        j = torch.arange(self.length, device="cuda")
        x = q[0, head, rows].double() @ k[0, head].double().T * self.scale
        if self.kind == "relative-bias":
            x = x + captures[0][0, head, 0, 0].double() * (j - i)
        if self.kind == "softcap":
            x = _CAP * torch.tanh(x / _CAP)
        if self.kind == "dense-bias":
            x = x + captures[0][0, head, rows].double()
        if self.kind == "causal":
            x = x.masked_fill(j > i, -math.inf)
        return torch.softmax(x, -1) @ v[0, head].double()


def peers(case: Case, q: Tensor, k: Tensor, v: Tensor, captures: list[Tensor]) -> dict[str, Callable[[], Tensor]]:
    """What computes the same: SDPA's flash and cuDNN backends where they can, FlexAttention's Triton backend always."""
    found: dict[str, Callable[[], Tensor]] = {"flex": _flex(case, q, k, v, captures)}
    if case.kind in ("plain", "causal"):
        found["sdpa-flash"] = _sdpa(SDPBackend.FLASH_ATTENTION, q, k, v, None, case)
    if case.kind in ("plain", "causal", "dense-bias"):
        bias = captures[0] if captures else None
        found["sdpa-cudnn"] = _sdpa(SDPBackend.CUDNN_ATTENTION, q, k, v, bias, case)
    return found


def _sdpa(
    backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, case: Case
) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, bias, is_causal=case.kind == "causal", scale=case.scale)

    return run


def _flex(case: Case, q: Tensor, k: Tensor, v: Tensor, captures: list[Tensor]) -> Callable[[], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    slopes = captures[0].flatten() if case.kind == "relative-bias" else None
    dense = captures[0][0] if case.kind == "dense-bias" else None

    def relative(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + slopes[h] * (j - i)  # type: ignore[index]

    def softcap(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return _CAP * torch.tanh(score / _CAP)

    def biased(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + dense[h, i, j]  # type: ignore[index]

    def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return i >= j

    mods: dict[str, Any] = {"relative-bias": relative, "softcap": softcap, "dense-bias": biased}
    blocks = create_block_mask(causal, None, None, case.length, case.length) if case.kind == "causal" else None
    # One compiled function per case: a shared one would recompile and run into Dynamo's limit.
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, score_mod=mods.get(case.kind), block_mask=blocks, scale=case.scale)
