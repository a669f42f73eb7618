"""Lowering of ``fxopt::linear_attention``: the candidates."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from fxopt.codegen.linear_attention import kernel, operator
from fxopt.codegen.linear_attention.reference import specification
from fxopt.ir.nodes import tensor
from fxopt.ir.operators import overload
from fxopt.lowering.candidate import Candidate, triton_objection

__all__ = ["candidates", "operator"]


def candidates(site: Node, training: bool) -> tuple[list[Candidate], dict[str, str]]:
    """The ways to run a call of ``linear_attention``, best guess first; and why others can't."""
    plain = Candidate("aten", "aten", overload("linear_attention"))
    refused = {"sdpa": "scaled_dot_product_attention has a softmax"}
    operands = [None if node is None else tensor(node) for node in site.args[:7]]
    q, k, v, *optional = operands
    assert q is not None and k is not None and v is not None
    reason = _objection(q, k, v)
    given = operator.operands_of(*optional)
    spec = specification(str(site.args[7]))
    if reason is None:
        reason = kernel.objection(spec, q.shape[3], v.shape[3], q.dtype, given)
    if reason is not None:
        return [plain], {**refused, "triton": reason}
    lengths = [size if isinstance(size, int) else None for size in (q.shape[2], k.shape[2])]
    configs = kernel.candidates(spec, (lengths[0], lengths[1]), (q.shape[3], v.shape[3]), q.dtype, given)
    target = torch.ops.fxopt.linear_attention_forward.default
    found = [Candidate(f"triton-{c}", "triton", target, (str(c), training), first=True) for c in configs]
    return [*found, plain], refused


def _objection(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    if any(isinstance(size, int) and size == 0 for x in (q, k, v) for size in x.shape):
        return "an operand is empty"
    return triton_objection((q, k, v), (q.shape[3], v.shape[3]))
