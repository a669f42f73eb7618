"""The generated Triton kernels of attention weights and statistics: which configurations to try, and their source."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import torch

from fxopt.codegen.attention.portable.config import Config, fitting, read_config
from fxopt.codegen.attention.portable.kernel import objection as portable_objection
from fxopt.codegen.attention.weights.source import KINDS, WEIGHT, WeightsText
from fxopt.errors import LoweringError
from fxopt.ir.attention import AttentionSpec

#: The kind under which their sources are kept in the cache.
KIND: Final = "attention_weights_triton"
#: Configurations measured for a site.
_TRIED: Final = 2


def objection(spec: AttentionSpec, head_dim: int, dtype: torch.dtype) -> str | None:
    """Why no kernel can be generated, as a sentence, or ``None`` when one can."""
    if spec.empty_rows not in WEIGHT:
        return f"rows without keys can't be {spec.empty_rows}"
    return portable_objection(replace(spec, dropout=0.0), head_dim, head_dim, dtype)


def candidates(
    spec: AttentionSpec, head_dim: int, dtype: torch.dtype, capability: tuple[int, int], rows: int | None = None
) -> tuple[Config, ...]:
    """The configurations worth measuring, best guess first, at most two; none where no kernel can be generated.

    Args:
        spec: the attention.
        head_dim: ``D``, of queries and keys.
        dtype: of ``q`` and ``k``.
        capability: of the device, as ``torch.cuda.get_device_capability`` gives it.
        rows: the number of queries, where that is known: few of them want small blocks.
    """
    if objection(spec, head_dim, dtype) is not None:
        return ()
    tiles = any({"i", "j"} <= set(c.dims) for c in spec.captures)
    found = fitting(head_dim, head_dim, dtype, capability, tiles, rows)
    return tuple(c for c in found if c.loads == "pointer" and not c.registers)[:_TRIED]


def source(spec: AttentionSpec, head_dim: int, dtype: torch.dtype, kind: str, config: str) -> str:
    """The source of a module that defines ``launch(q, k, captures) -> out`` and runs alone.

    Args:
        spec: the attention; its dropout doesn't matter.
        head_dim: ``D``, of queries and keys.
        dtype: of ``q`` and ``k``.
        kind: ``"weights"``, ``"column_sum"`` or ``"diagonal"``.
        config: a printed `Config` that reads by pointers.

    Raises:
        LoweringError: no kernel can be generated; `objection` says why.
    """
    reason = objection(spec, head_dim, dtype)
    if kind not in KINDS:
        reason = f"{kind!r} is none of {', '.join(KINDS)}"
    if reason is not None:
        raise LoweringError(f"no Triton kernel for these attention weights: {reason}; lower them to ATen instead")
    return str(WeightsText(replace(spec, dropout=0.0), head_dim, dtype, kind, read_config(config)))
