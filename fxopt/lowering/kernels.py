"""The generated kernels of a lowered program."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor
from torch.fx import Node

from fxopt.analysis.gradients import may_need_gradient
from fxopt.codegen.attention.backward.config import RECOMPUTE, split_config
from fxopt.codegen.attention.backward.operator import source_of as backward_source_of
from fxopt.codegen.attention.decided import config_of
from fxopt.codegen.attention.operator import source_of
from fxopt.codegen.attention.packed import read_places, unpacked
from fxopt.codegen.attention.weights import operator as weights
from fxopt.codegen.attention.weights import together
from fxopt.codegen.attention.weights.wants import read_wants, text_of_want
from fxopt.codegen.linear_attention import operator as linear_attention
from fxopt.codegen.mlp.narrow_mlp import kernel as narrow_mlp
from fxopt.codegen.mlp.narrow_mlp.problem import problem_of as mlp_problem_of
from fxopt.codegen.norm.residual_norm import kernel as residual_norm
from fxopt.codegen.norm.residual_norm.config import split_config as residual_norm_configs
from fxopt.codegen.norm.residual_norm.problem import problem_of
from fxopt.ir.nodes import tensor
from fxopt.ir.program import Program


def kernel_sources(program: Program) -> dict[str, str]:
    """The source of every generated kernel that ``program`` runs, by the name of the node that calls it; that of its
    backward by the same name with ``_backward``.
    """
    sources: dict[str, str] = {}
    for operator, sources_of in _GENERATED.items():
        target = getattr(torch.ops.fxopt, operator).default
        for node in program.graph.find_nodes(op="call_function", target=target):
            sources |= {name: text for name, text in sources_of(node) if text not in sources.values()}
    return sources


def _attention(node: Node) -> Iterator[tuple[str, str]]:
    q, _, v, captures, spec, config = node.args[:6]
    yield from _with_backward(node, tensor(q), tensor(v).shape[3], captures, str(spec), str(config))


def _packed(node: Node) -> Iterator[tuple[str, str]]:
    packed, captures, spec, places, config = node.args[:5]
    assert isinstance(places, list | tuple)
    q, _, v = unpacked(tensor(packed), read_places([int(str(number)) for number in places]))
    yield from _with_backward(node, q, v.shape[3], captures, str(spec), str(config))


def _with_backward(
    node: Node, q: Tensor, value_dim: int, captures: object, spec: str, config: str
) -> Iterator[tuple[str, str]]:
    sizes = (spec, int(q.shape[3]), int(value_dim), q.dtype)
    yield node.name, source_of(*sizes, config)
    backward = split_config(config)[1]
    if backward and backward != RECOMPUTE:
        assert isinstance(captures, list | tuple)
        wanted = [isinstance(c, Node) and may_need_gradient(c) for c in captures]
        yield f"{node.name}_backward", backward_source_of(*sizes, backward, wanted)


def _decided(node: Node) -> Iterator[tuple[str, str]]:
    q, _, v, _, spec, key = node.args
    config = config_of(str(key))
    if config is not None:
        sizes = (int(tensor(q).shape[3]), int(tensor(v).shape[3]), tensor(q).dtype)
        yield node.name, source_of(str(spec), *sizes, config)


def _weights(node: Node) -> Iterator[tuple[str, str]]:
    q, _, _, spec, kind, config = node.args
    yield node.name, weights.source_of(str(spec), int(tensor(q).shape[3]), tensor(q).dtype, str(kind), str(config))


def _attention_and_weights(node: Node) -> Iterator[tuple[str, str]]:
    q, _, v, _, spec, wants, config = node.args[:7]
    rows, width, dtype = tensor(q).shape[2], int(tensor(q).shape[3]), tensor(q).dtype
    sizes, walks = (str(spec), width, int(tensor(v).shape[3]), dtype), together.walks_of(str(config))
    if not walks:
        yield node.name, together.source_of(*sizes, str(config), str(wants))
        return
    yield node.name, source_of(*sizes, together.config_of(str(config)))
    for n, (want, walk) in enumerate(zip(read_wants(str(wants)), walks, strict=True)):
        text = text_of_want(str(spec), want, rows if isinstance(rows, int) else 0)
        yield f"{node.name}_weights_{n}", weights.source_of(text, width, dtype, want.kind, walk, known=True)


def _linear_attention(node: Node) -> Iterator[tuple[str, str]]:
    yield node.name, linear_attention.source_of_call(*map(_value, node.args))


def _value(argument: object) -> object:
    """The fake tensor that an argument of a call computes; constants are what they are."""
    return tensor(argument) if isinstance(argument, Node) else argument


def _residual_norm(node: Node) -> Iterator[tuple[str, str]]:
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


def _mlp(node: Node) -> Iterator[tuple[str, str]]:
    *operands, activation, config = node.args
    x, up, up_bias, down, down_bias, residual = (None if x is None else tensor(x) for x in operands)
    assert x is not None and up is not None and down is not None
    problem = mlp_problem_of(x, up, up_bias, down, down_bias, residual, str(activation))
    yield node.name, narrow_mlp.source(problem, str(config))


#: How the operators that launch generated kernels are called, and what that generates.
_GENERATED: Final[Mapping[str, Callable[[Node], Iterator[tuple[str, str]]]]] = {
    "attention_forward": _attention,
    "attention_packed": _packed,
    "attention_decided": _decided,
    "attention_weights_forward": _weights,
    "attention_and_weights_forward": _attention_and_weights,
    "linear_attention_forward": _linear_attention,
    "residual_norm_forward": _residual_norm,
    "mlp_forward": _mlp,
}
