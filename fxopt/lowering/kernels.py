"""The generated kernels of a lowered program."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import Node

from fxopt.analysis.gradients import may_need_gradient
from fxopt.codegen.attention.backward.config import RECOMPUTE, split_config
from fxopt.codegen.attention.backward.operator import source_of as backward_source_of
from fxopt.codegen.attention.operator import source_of
from fxopt.codegen.attention.weights import operator as weights
from fxopt.codegen.linear_attention import operator as linear_attention
from fxopt.ir.nodes import tensor
from fxopt.ir.program import Program


def kernel_sources(program: Program) -> dict[str, str]:
    """The source of every generated kernel that ``program`` runs, by the name of the node that calls it; that of its
    backward by the same name with ``_backward``.
    """
    calls = program.graph.find_nodes(op="call_function", target=torch.ops.fxopt.attention_forward.default)
    sources: dict[str, str] = {}
    for node in calls:
        for name, text in _sources(node):
            if text not in sources.values():
                sources[name] = text
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.fxopt.attention_weights_forward.default):
        q, _, _, spec, kind, config = node.args
        text = weights.source_of(str(spec), int(tensor(q).shape[3]), tensor(q).dtype, str(kind), str(config))
        if text not in sources.values():
            sources[node.name] = text
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.fxopt.linear_attention_forward.default):
        text = linear_attention.source_of_call(*map(_value, node.args))
        if text not in sources.values():
            sources[node.name] = text
    return sources


def _value(argument: object) -> object:
    """The fake tensor that an argument of a call computes; constants are what they are."""
    return tensor(argument) if isinstance(argument, Node) else argument


def _sources(node: Node) -> Iterator[tuple[str, str]]:
    q, _, v, captures, spec, config = node.args[:6]
    sizes = (str(spec), int(tensor(q).shape[3]), int(tensor(v).shape[3]), tensor(q).dtype)
    yield node.name, source_of(*sizes, str(config))
    backward = split_config(str(config))[1]
    if backward and backward != RECOMPUTE:
        assert isinstance(captures, list | tuple)
        wanted = [isinstance(c, Node) and may_need_gradient(c) for c in captures]
        yield f"{node.name}_backward", backward_source_of(*sizes, backward, wanted)
