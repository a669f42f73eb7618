"""Lowering of attention weights and of statistics of them; and outputs computed from weights that are there anyway."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Node

from fxopt.codegen.attention.weights import kernel, operator
from fxopt.ir.attention import AttentionSpec, read_spec
from fxopt.ir.nodes import tensor
from fxopt.ir.operators import overload
from fxopt.lowering.candidate import Candidate, triton_objection

__all__ = ["candidates", "from_known_weights", "operator"]


def candidates(site: Node) -> tuple[list[Candidate], dict[str, str]]:
    """The ways to run a call of ``attention_weights`` or ``attention_statistics``; and why others can't."""
    q, k = tensor(site.args[0]), tensor(site.args[1])
    whole = site.target is overload("attention_weights")
    assert isinstance(site.target, torch._ops.OpOverload)
    plain = Candidate("aten", "aten", site.target)
    refused = {"sdpa": "scaled_dot_product_attention returns no weights"}
    spec = read_spec(str(site.args[3]))
    reason = _objection(spec, q, k)
    if reason is not None:
        return [plain], {**refused, "triton": reason}
    rows = q.shape[2] if isinstance(q.shape[2], int) else None
    configs = kernel.candidates(spec, q.shape[3], q.dtype, rows)
    target = torch.ops.fxopt.attention_weights_forward.default
    extra: tuple[str, ...] = ("weights",) if whole else ()
    return [*(Candidate(f"triton-{c}", "triton", target, (*extra, str(c))) for c in configs), plain], refused


def _objection(spec: AttentionSpec, q: Tensor, k: Tensor) -> str | None:
    if any(isinstance(size, int) and size == 0 for x in (q, k) for size in x.shape):
        return "an operand is empty"
    general = triton_objection((q, k), (q.shape[3],))
    return general if general is not None else kernel.objection(spec, q.shape[3], q.dtype)


def from_known_weights(site: Node) -> Candidate | None:
    """The product of weights and values, where the graph computes the whole weights of the attention ``site`` anyway.

    That is what the model itself did, so a site whose weights are read elsewhere is never slower than it was.
    """
    q, k, v, captures, text = site.args
    spec = read_spec(str(text))
    if spec.dropout or not isinstance(q, Node):
        return None
    order = {node: position for position, node in enumerate(site.graph.nodes)}
    for node in q.users:
        same = node.target is overload("attention_weights") and (*node.args[:2], node.args[2]) == (q, k, captures)
        if same and _alike(read_spec(str(node.args[3])), spec) and order[node] < order[site]:
            return Candidate("weights", "aten", overload("attention_values"), arguments=(node, v, text))
    return None


def _alike(first: AttentionSpec, second: AttentionSpec) -> bool:
    """Whether two specifications have the same weights."""
    return replace(first, out_dtype=second.out_dtype, out_layout=second.out_layout) == second
