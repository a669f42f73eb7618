"""The generated kernels of linear attention: whether, which configurations to try, and their source."""

from __future__ import annotations

from typing import Final

import torch

from fxopt.codegen.attention.portable.config import padded
from fxopt.codegen.linear_attention.config import LinearConfig, cut, largest_head, read_linear_config
from fxopt.codegen.linear_attention.grid import Grid
from fxopt.codegen.linear_attention.operands import Operands
from fxopt.codegen.linear_attention.reference import is_linear
from fxopt.codegen.linear_attention.source import LinearText
from fxopt.errors import LoweringError
from fxopt.ir.linear_attention import LinearSpec

#: The kind under which their sources are kept in the cache.
KIND: Final = "linear_attention_triton"
#: Tokens that a program of the other association holds at most.
_LARGEST_BLOCK: Final = 64
#: Sequences that a program works on one after the other, where they fit one block.
_GROUP: Final = 4


def objection(spec: LinearSpec, head_dim: int, value_dim: int, dtype: torch.dtype, operands: Operands) -> str | None:
    """Why no kernel can be generated, as a sentence, or ``None`` when one can."""
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"inputs must be bfloat16, float16 or float32, not {dtype}"
    largest = largest_head(dtype, causal=spec.causal)
    if max(head_dim, value_dim) > largest or min(head_dim, value_dim) < 1:
        kind = f"{'causal ' if spec.causal else ''}heads of {dtype}"
        return f"{kind} must be 1 to {largest} wide to fit the registers, not {head_dim} and {value_dim}"
    if spec.out_dtype is torch.float64:
        return "float64 results need float64 arithmetic, which the kernel does not have"
    if bool(operands.taps) != bool(spec.side) or (operands.taps and operands.taps % 2 == 0):
        return f"filters of side {operands.taps} don't fit a grid of side {spec.side}"
    return None


def candidates(
    spec: LinearSpec,
    sizes: tuple[int | None, int | None],
    dims: tuple[int, int],
    dtype: torch.dtype,
    operands: Operands,
) -> tuple[LinearConfig, ...]:
    """The configurations worth measuring, best guess first; none where no kernel can be generated.

    Args:
        spec: the attention.
        sizes: ``S`` and ``T`` where they are known and always the same.
        dims: ``D`` and ``E``.
        dtype: of ``q``, ``k`` and ``v``.
        operands: which optional ones there are.
    """
    if objection(spec, *dims, dtype, operands) is not None:
        return ()
    (block, columns, warps), (gradients, _, _) = cut(*dims, dtype, causal=spec.causal)
    longest = max((size for size in sizes if size is not None), default=0) if None not in sizes else 0
    whole = _whole(spec, operands, longest)
    if longest and not is_linear(*sizes, *dims) and whole and whole <= min(_LARGEST_BLOCK, block, gradients):
        return (
            LinearConfig("quadratic", whole, columns, warps),
            LinearConfig("quadratic", whole, columns, warps, _GROUP),
        )
    found = [LinearConfig("linear", block, columns, warps)]
    if 0 < longest <= block and (whole or block) <= block and not spec.causal:
        # Windows: few products a program, so fewer warps, or several sequences one after the other.
        few = LinearConfig("linear", whole or block, columns, max(warps // 2, 1))
        found = [few, LinearConfig("linear", whole or block, columns, warps, _GROUP), *found]
    return tuple(found)


def _whole(spec: LinearSpec, operands: Operands, tokens: int) -> int | None:
    """The shortest block that holds all ``tokens``; ``None`` where none does: a large grid is several tiles."""
    return Grid(spec.side, spec.first, operands.taps).whole if operands.taps else padded(tokens)


def source(spec: LinearSpec, head_dim: int, value_dim: int, dtype: torch.dtype, operands: Operands, config: str) -> str:
    """The source of a module that defines ``launch(q, k, v, …)`` and ``launch_backward``, and runs alone.

    Args:
        spec: the attention.
        head_dim: ``D``, of queries and keys.
        value_dim: ``E``, of values.
        dtype: of ``q``, ``k`` and ``v``.
        operands: which optional ones there are.
        config: a printed `LinearConfig`.

    Raises:
        LoweringError: no kernel can be generated; `objection` says why.
    """
    reason = objection(spec, head_dim, value_dim, dtype, operands)
    cut = read_linear_config(config)
    if reason is None and operands.taps and cut.association == "quadratic":
        whole = Grid(spec.side, spec.first, operands.taps).places(cut.block) == cut.block
        reason = None if whole else f"{config} does not hold all tokens of the grid in one block"
    if reason is not None:
        raise LoweringError(f"no Triton kernel for this linear attention: {reason}; lower it to ATen instead")
    return str(LinearText(spec, head_dim, value_dim, dtype, operands, cut))
