"""The generated Triton kernels of attention weights and statistics: which configurations to try, and their source."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import torch

from fxopt.codegen.attention.portable.config import Config, padded, read_config
from fxopt.codegen.attention.portable.kernel import objection as portable_objection
from fxopt.codegen.attention.weights.source import KINDS, WEIGHT, WeightsText
from fxopt.errors import LoweringError
from fxopt.ir.attention import AttentionSpec

#: The kind under which their sources are kept in the cache.
KIND: Final = "attention_weights_triton"
#: Configurations measured for a site.
_TRIED: Final = 2
#: Constants up to this size may stand in a score whose log-sum-exp is shared.
_LARGE: Final = 64.0
#: Best guess first, by the width that the head dimension is padded to; the last ones are for few rows. Each fits the
#: shared memory of every device from compute capability 8.0 on.
_HALF: Final[dict[int, tuple[str, ...]]] = {
    128: ("64x64w4s2", "128x64w8s2", "16x64w4s2"),
    256: ("64x32w4s2", "32x32w4s2", "16x32w4s2"),
}
#: The same where a captured tensor varies with both row and key: its blocks take registers too.
_HALF_TILES: Final[dict[int, tuple[str, ...]]] = {
    128: ("64x64w8s2", "64x32w4s2", "16x64w4s2"),
    256: ("64x32w8s2", "32x32w4s2", "16x32w4s2"),
}
_SINGLE: Final[dict[int, tuple[str, ...]]] = {
    64: ("32x32w4s2", "16x32w4s2"),
    128: ("32x32w8s2", "16x32w4s2"),
    256: ("16x16w4s1",),
}


def objection(spec: AttentionSpec, head_dim: int, dtype: torch.dtype) -> str | None:
    """Why no kernel can be generated, as a sentence, or ``None`` when one can."""
    if spec.empty_rows not in WEIGHT:
        return f"rows without keys can't be {spec.empty_rows}"
    return portable_objection(replace(spec, dropout=0.0), head_dim, head_dim, dtype)


def candidates(spec: AttentionSpec, head_dim: int, dtype: torch.dtype, rows: int | None = None) -> tuple[Config, ...]:
    """The configurations worth measuring, best guess first, at most two; none where no kernel can be generated.

    Args:
        spec: the attention.
        head_dim: ``D``, of queries and keys.
        dtype: of ``q`` and ``k``.
        rows: the number of queries, where that is known: few of them want small blocks.
    """
    if objection(spec, head_dim, dtype) is not None:
        return ()
    tiles = any(c.dims[3] != "-" and c.dims[2:] != "-j" for c in spec.captures)
    table = _SINGLE if dtype is torch.float32 else _HALF_TILES if tiles else _HALF
    width = min(size for size in table if size >= padded(head_dim))
    found = [read_config(text) for text in table[width]]
    if rows is not None:
        found.sort(key=lambda c: -(-rows // c.block_m) * c.block_m > 2 * max(rows, 16))
    return tuple(found[:_TRIED])


def sharing_objection(spec: AttentionSpec, dtype: torch.dtype) -> str | None:
    """Why a row's log-sum-exp does not tell its weights, as a sentence, or ``None`` when it does.

    It is rounded to float32: where it is 4, weights are off by four times their own rounding, which is as nothing
    beside that of products in half precision. Where all logits of a row share a large number, it doesn't hold the
    logarithm of how many they are.
    """
    if dtype is torch.float32:
        return "weights of float32 operands have more digits than a log-sum-exp"
    leaves = [leaf for leaf in spec.score.walk() if not leaf.args]
    if any(leaf.op == "capture" and spec.captures[int(leaf.value or 0)].kind != "bool" for leaf in leaves):
        return "a captured tensor may shift a whole row of logits beyond what a log-sum-exp can tell apart"
    if any(leaf.op == "const" and abs(float(leaf.value or 0)) > _LARGE for leaf in leaves):
        return "a constant may shift a whole row of logits beyond what a log-sum-exp can tell apart"
    return None


def source(spec: AttentionSpec, head_dim: int, dtype: torch.dtype, kind: str, config: str, known: bool = False) -> str:
    """The source of a module that defines ``launch(q, k, captures) -> out`` and runs alone.

    Args:
        spec: the attention; its dropout doesn't matter.
        head_dim: ``D``, of queries and keys.
        dtype: of ``q`` and ``k``.
        kind: ``"weights"``, ``"column_sum"`` or ``"diagonal"``.
        config: a printed `Config` that reads by pointers.
        known: whether ``launch`` is given the rows' log-sum-exp as well, so that one walk over the keys is enough.

    Raises:
        LoweringError: no kernel can be generated; `objection` says why.
    """
    reason = objection(spec, head_dim, dtype)
    if known and reason is None:
        reason = sharing_objection(spec, dtype)
    if kind not in KINDS:
        reason = f"{kind!r} is none of {', '.join(KINDS)}"
    if reason is not None:
        raise LoweringError(f"no Triton kernel for these attention weights: {reason}; lower them to ATen instead")
    return str(WeightsText(replace(spec, dropout=0.0), head_dim, dtype, kind, read_config(config), known))
