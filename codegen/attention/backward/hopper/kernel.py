"""The Hopper backward of an attention: TMA, wgmma and divided warps (Gluon); when it can serve, and its source.

Shah et al., FlashAttention-3 (arXiv 2407.08608) describes the division of work: gradients of keys and values in
registers, rows passing by, five products for each pair of blocks, dq added to its sums by TMA.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import torch

from fxopt.codegen.attention.backward import kernel as portable
from fxopt.codegen.attention.backward import plan
from fxopt.codegen.attention.backward.hopper.config import Config, read_config
from fxopt.codegen.attention.backward.hopper.source import hopper_text
from fxopt.codegen.attention.cost import lengths
from fxopt.codegen.attention.machine import Shortfall, hopper_objection
from fxopt.codegen.attention.portable.config import padded
from fxopt.codegen.attention.portable.key_lists import can_list, left_out
from fxopt.codegen.attention.problem import Problem
from fxopt.errors import LoweringError
from fxopt.ir.attention import AttentionSpec
from fxopt.ir.expression import Expr, S

#: By padded head dimension. With heads 128 wide, products of queries and keys ahead of the rest spill, and cost 5 to
#: 10% (`benchmarks/results/h100-attention-backward-hopper.json`).
_CONFIGS: Final[dict[int, tuple[Config, ...]]] = {
    64: (Config(64, 128, 4), Config(64, 128, 4, ahead=True)),
    128: (Config(64, 128, 2),),
}
_HALF: Final = (torch.bfloat16, torch.float16)
#: What may be infinite, or no number, where its argument is 0, as the scores of rows beyond the end are.
_UNSAFE: Final = ("log", "pow", "rsqrt", "div")


def objection(
    spec: AttentionSpec, head_dim: int, value_dim: int, dtype: torch.dtype, capability: tuple[int, int]
) -> str | None:
    """Why the kernels can't serve, as a sentence, or ``None`` when they can."""
    return _objection(spec, head_dim, value_dim, dtype) or order_objection() or hopper_objection(capability)


def objection_to(problem: Problem) -> str | None:
    """`objection` to a whole problem."""
    return objection(problem.spec, problem.head_dim, problem.value_dim, problem.dtype, problem.capability)


def order_objection() -> Shortfall | None:
    """Why the kernels can't run now, as a sentence: sums in any order differ in their last bits."""
    if torch.are_deterministic_algorithms_enabled():
        return Shortfall("torch.use_deterministic_algorithms is on, and its programs add to dq in any order")
    return None


def flow_objection(spec: AttentionSpec, wanted: Sequence[bool]) -> str | None:
    """Why the gradients of the ``wanted`` captured tensors can't be had, as a sentence."""
    names = [flow.name for flow in plan.flows(spec, wanted)]
    return f"it computes no gradient of captured tensors ({', '.join(names)})" if names else None


def _objection(spec: AttentionSpec, head_dim: int, value_dim: int, dtype: torch.dtype) -> str | None:
    general = portable.objection(spec, head_dim, value_dim, dtype)
    if general is not None:
        return general
    if dtype not in _HALF or spec.out_dtype is not dtype:
        return f"inputs and results must be bfloat16 or float16 alike, not {dtype} and {spec.out_dtype}"
    if head_dim % 8 or value_dim % 8 or padded(head_dim) != padded(value_dim) or padded(head_dim) not in _CONFIGS:
        return f"head dimensions must be multiples of 8 from 40 to 128 that pad alike, not {head_dim} and {value_dim}"
    if spec.dropout:
        return "it drops no weights"
    if any({"i", "j"} <= set(c.dims) or c.is_band for c in spec.captures):
        return "a captured tensor varies with both row and key, which the portable kernels read better"
    if any(_is_unsafe(e) for e in (spec.score, plan.slope(spec)[0]) if e is not None):
        return "the score or its derivative may be infinite where s is 0, as it is beyond the last row"
    return None


def _is_unsafe(expr: Expr) -> bool:
    """Whether an operation that may give no finite number at 0 reads ``s``; a quotient only by its divisor."""
    nodes = (node for node in expr.walk() if node.op in _UNSAFE)
    return any(argument.reads(S) for node in nodes for argument in node.args[node.op == "div" :])


def candidates(problem: Problem) -> tuple[Config, ...]:
    """The configurations worth measuring, best guess first; none where the kernels can't serve.

    The first one goes through lists of blocks where these leave out many of those that there are.
    """
    if objection_to(problem) is not None:
        return ()
    found = _CONFIGS[padded(problem.head_dim)]
    lists = left_out(problem.spec, *lengths(problem))
    return (replace(found[0], listed=True), found[0]) if lists == "many" else found


def source(
    spec: AttentionSpec, head_dim: int, value_dim: int, dtype: torch.dtype, config: str, wanted: Sequence[bool]
) -> str:
    """The source of the backward: a module that runs alone and defines

        launch(q, k, v, captures, out, lse, dout, dlse) -> [dq, dk, dv, zeros for each captured tensor in ``wanted``]

    The same arguments always give the same text.

    Raises:
        LoweringError: no kernels can be generated.
    """
    reason = _objection(spec, head_dim, value_dim, dtype) or flow_objection(spec, wanted)
    if reason is not None:
        raise LoweringError(f"no Hopper kernels for the backward of this attention: {reason} ({spec})")
    cut = read_config(config)
    if cut.ahead and padded(head_dim) > 64:
        raise LoweringError(f"{cut} is for heads up to 64 wide: with wider ones registers don't hold products ahead")
    if cut.listed and not can_list(spec):
        raise LoweringError(f"{cut} goes through lists of the blocks that a mask keeps, and there is none ({spec})")
    return hopper_text(spec, head_dim, value_dim, dtype, cut, tuple(wanted))
