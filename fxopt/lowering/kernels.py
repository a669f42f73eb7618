"""The generated kernels of a lowered program."""

from __future__ import annotations

import torch

from fxopt.codegen.attention.operator import source_of
from fxopt.codegen.attention.weights import operator as weights
from fxopt.ir.nodes import tensor
from fxopt.ir.program import Program


def kernel_sources(program: Program) -> dict[str, str]:
    """The source of every generated kernel that ``program`` runs, by the name of the node that calls it."""
    calls = program.graph.find_nodes(op="call_function", target=torch.ops.fxopt.attention_forward.default)
    sources: dict[str, str] = {}
    for node in calls:
        q, _, v, _, spec, config = node.args[:6]
        text = source_of(str(spec), int(tensor(q).shape[3]), int(tensor(v).shape[3]), tensor(q).dtype, str(config))
        if text not in sources.values():
            sources[node.name] = text
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.fxopt.attention_weights_forward.default):
        q, _, _, spec, kind, config = node.args
        text = weights.source_of(str(spec), int(tensor(q).shape[3]), tensor(q).dtype, str(kind), str(config))
        if text not in sources.values():
            sources[node.name] = text
    return sources
