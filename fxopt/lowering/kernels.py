"""The generated kernels of a lowered program."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch.fx import Node

from fxopt.analysis.gradients import may_need_gradient
from fxopt.codegen.attention.backward.config import RECOMPUTE, split_config
from fxopt.codegen.attention.backward.operator import source_of as backward_source_of
from fxopt.codegen.attention.operator import source_of
from fxopt.codegen.attention.weights import operator as weights
from fxopt.codegen.norm.residual_norm import kernel as residual_norm
from fxopt.codegen.norm.residual_norm.config import split_config as residual_norm_configs
from fxopt.codegen.norm.residual_norm.problem import problem_of
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
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.fxopt.residual_norm_forward.default):
        for name, text in _norm_sources(node):
            if text not in sources.values():
                sources[name] = text
    return sources


def _norm_sources(node: Node) -> Iterator[tuple[str, str]]:
    x, residual, weight, bias, kind, eps, scale_after_cast, config = node.args[:8]
    w, b = (None if operand is None else tensor(operand) for operand in (weight, bias))
    problem = problem_of(tensor(x), tensor(residual), w, b, str(kind), float(str(eps)), bool(scale_after_cast))
    forward, backward = residual_norm_configs(str(config))
    yield node.name, residual_norm.source(problem, forward)
    if backward:
        learning = {"weight": weight, "bias": bias}
        wanted = [name for name, w in learning.items() if isinstance(w, Node) and may_need_gradient(w)]
        total = replace(problem, x=problem.total, residual=problem.total)
        yield f"{node.name}_backward", residual_norm.backward_source(total, backward, wanted)


def _sources(node: Node) -> Iterator[tuple[str, str]]:
    q, _, v, captures, spec, config = node.args[:6]
    sizes = (str(spec), int(tensor(q).shape[3]), int(tensor(v).shape[3]), tensor(q).dtype)
    yield node.name, source_of(*sizes, str(config))
    backward = split_config(str(config))[1]
    if backward and backward != RECOMPUTE:
        assert isinstance(captures, list | tuple)
        wanted = [isinstance(c, Node) and may_need_gradient(c) for c in captures]
        yield f"{node.name}_backward", backward_source_of(*sizes, backward, wanted)
