"""What fxopt's attention kernels are compared with, as values: SDPA's kernels by name, and FlexAttention."""

from __future__ import annotations

import importlib
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.attention_cases import Case, Operands
from benchmarks.attention_kinds import CAUSAL, MaskMod

Forward = Callable[[], Tensor]
_BLOCK_MASK: Final = "creating FlexAttention's block mask, ms"
#: Elements that rows of a mask are padded to, so that kernels can read them by vectors.
_ALIGNMENT: Final = 8


@dataclass
class Build:
    """One case being prepared for a peer, which may leave ``notes`` about it."""

    case: Case
    operands: Operands
    notes: dict[str, float] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the operands are."""
        return self.operands.q.device


def dense_operand(case: Case, operands: Operands) -> Tensor | None:
    """What SDPA is given for a score and mask: a boolean mask, a bias with −inf outside the mask, or nothing.

    It broadcasts with ``[B, H, S, T]`` where it is the same; its rows are stored aligned. The kind must do nothing to
    the scores but add.
    """
    kind, sizes, device = case.kind, case.sizes, operands.q.device
    shapes = [(-1, 1, 1, 1), (1, -1, 1, 1), (1, 1, -1, 1), (1, 1, 1, -1)]
    counts = (sizes.batch, sizes.heads, sizes.rows, sizes.keys)
    b, h, i, j = (torch.arange(n, device=device).view(shape) for n, shape in zip(counts, shapes, strict=True))
    kept = None if kind.mask_mod is None else kind.mask_mod(operands.data)(b, h, i, j)
    if kind.score_mod is None:
        return kept
    bias = kind.score_mod(operands.data)(torch.zeros((), device=device), b, h, i, j)
    bias = bias if kept is None else torch.where(kept, bias, -torch.inf)
    columns = -(-sizes.keys // _ALIGNMENT) * _ALIGNMENT
    aligned = bias.new_empty((*bias.shape[:3], columns), dtype=operands.q.dtype)[..., : sizes.keys]
    return aligned.copy_(bias)


def _sdpa(backend: SDPBackend) -> Callable[[Build], Forward]:
    def build(setup: Build) -> Forward:
        case, (q, k, v) = setup.case, setup.operands.qkv
        causal = case.kind is CAUSAL
        mask = None if causal else dense_operand(case, setup.operands)
        shared = case.sizes.group > 1
        # A CPU has the unfused kernel only; there the masks are checked and not the speed.
        chosen = backend if q.is_cuda else SDPBackend.MATH

        def run() -> Tensor:
            with sdpa_kernel(chosen):
                return scaled_dot_product_attention(
                    q, k, v, mask, is_causal=causal, scale=case.sizes.scale, enable_gqa=shared
                )

        return run

    return build


def _flex(setup: Build) -> Forward:
    return _flex_with(setup, {})


def _flex_flash(setup: Build) -> Forward:
    """FlexAttention on FlashAttention's CuTe kernels; raises where they are not installed."""
    importlib.import_module("flash_attn.cute")
    return _flex_with(setup, {"BACKEND": "FLASH"})


def _flex_with(setup: Build, options: dict[str, Any]) -> Forward:
    from torch.nn.attention.flex_attention import flex_attention

    case, operands = setup.case, setup.operands
    q, k, v = operands.qkv
    kind, sizes = case.kind, case.sizes
    settings: dict[str, Any] = {"scale": sizes.scale, "enable_gqa": sizes.group > 1}
    settings |= {"kernel_options": options} if options else {}
    settings |= {} if kind.score_mod is None else {"score_mod": kind.score_mod(operands.data)}
    settings |= {} if kind.mask_mod is None else {"block_mask": _block_mask(setup, kind.mask_mod(operands.data))}
    run = torch.compile(flex_attention, dynamic=False) if q.is_cuda else _unfused(flex_attention)
    return lambda: run(q, k, v, **settings)


def _unfused(flex_attention: Any) -> Callable[..., Tensor]:
    def run(*args: Any, **settings: Any) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "flex_attention called without torch.compile", UserWarning)
            out: Tensor = flex_attention(*args, **settings)
        return out

    return run


def _block_mask(setup: Build, keeps: MaskMod) -> Any:
    """The block mask, made twice: the second time is noted."""
    from torch.nn.attention.flex_attention import create_block_mask

    sizes, device = setup.case.sizes, setup.device
    batch = sizes.batch if setup.case.kind.per_batch else None
    for _ in range(2):
        start = time.perf_counter()
        mask = create_block_mask(keeps, batch, None, sizes.rows, sizes.keys, device=str(device))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        setup.notes[_BLOCK_MASK] = (time.perf_counter() - start) * 1e3
    return mask


#: By the name of a peer, how one call of it is made ready. Whatever a maker raises is why the peer is missing.
PEERS: Final[dict[str, Callable[[Build], Forward]]] = {
    "sdpa-flash": _sdpa(SDPBackend.FLASH_ATTENTION),
    "sdpa-cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION),
    "sdpa-efficient": _sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "sdpa-math": _sdpa(SDPBackend.MATH),
    "flex": _flex,
    "flex-flash": _flex_flash,
}
