"""What stands around a residual norm or a feed-forward block, as far as it decides what a kernel of its own costs.

The base compiler computes pointwise operations in the kernel that makes or reads their operands; a kernel of one's own
keeps it from that. So it is tried only where sum and norm stand alone between operations with kernels of their own:
matrix products, convolutions, attentions, and what goes in and out of the graph.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch.fx import Node

from fxopt.analysis.gradients import may_need_gradient
from fxopt.ir.nodes import arguments, is_call, tensor
from fxopt.ir.program import operator_name

#: Operations that run as kernels of their own, whatever stands around them.
_APART: Final = frozenset({
    "aten.linear", "aten.matmul", "aten.mm", "aten.bmm", "aten.addmm", "aten.baddbmm", "aten.einsum",
    "aten.convolution", "aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.scaled_dot_product_attention",
    "fxopt.attention", "fxopt.attention_forward", "fxopt.attention_packed", "fxopt.attention_sdpa",
    "fxopt.attention_values", "fxopt.attention_weights_forward", "fxopt.attention_and_weights_forward",
    "fxopt.mlp", "fxopt.mlp_forward",
})  # fmt: skip
_BIASED: Final = {"aten.linear": "bias", "aten.addmm": "self", "aten.conv1d": "bias", "aten.conv2d": "bias"}
_VIEWS: Final = ("aten.reshape", "aten.flatten", "aten.unflatten")


@dataclass(frozen=True)
class Surroundings:
    """What a measurement has to have besides the norm itself.

    Attributes:
        sum_read: whether the sum is read by anything but the norm.
        gradients: how many gradients of the norm are added up before the backward.
        sum_gradients: the same of the sum.
        biases: how many layers before the sum have a bias that learns: the sum over the rows of the gradient.
    """

    sum_read: bool
    gradients: int = 1
    sum_gradients: int = 0
    biases: int = 0


def surroundings(site: Node, training: bool) -> Surroundings:
    """Those of a residual norm; without training only what is read matters."""
    normal, total = (list(_readers(site, n)) for n in (0, 1))
    if not training:
        return Surroundings(bool(total))
    biases = sum(_has_learning_bias(_origin(operand)) for operand in site.args[:2] if isinstance(operand, Node))
    return Surroundings(bool(total), max(len(normal), 1), len(total), biases)


@dataclass(frozen=True)
class Followers:
    """Who reads the result of a feed-forward block.

    Attributes:
        fused: whether any reader is computed in the kernel that adds the residual, where the base compiler makes it.
        kept: whether the result is read by anything else.
    """

    fused: bool
    kept: bool


def followers(site: Node) -> Followers:
    """Those of a feed-forward block."""
    apart = [reader.op == "output" or _stands_apart(reader) for reader, _ in _read_by(site)]
    return Followers(not all(apart), any(apart))


def residual_objection(site: Node) -> str | None:
    """Why the base compiler may do better with what makes the residual of a block, or ``None`` if it doesn't: what the
    block itself reads, or another operation, it has to write anyway.
    """
    given = arguments(site)
    if given["residual"] is None:
        return None
    made = _origin(given["residual"])
    alone = made is not _origin(given["x"]) and all(reader is site for reader, _ in _read_by(made))
    return _together(made, "the sum") if alone and not _stands_apart(made) else None


def fusion_objection(site: Node) -> str | None:
    """Why the base compiler may do better with what stands around the site, or ``None`` if nothing does."""
    x, residual = site.args[:2]
    assert isinstance(x, Node) and isinstance(residual, Node)
    for operand, other in ((x, residual), (residual, x)):
        made = _origin(operand)
        if not _stands_apart(made) and not _is_above(made, other):
            return _together(made, "the sum")
        if made is operand and _is_bare_product(operand):
            return (
                f"the base compiler may have {operand} ({operator_name(operand)}) add the other operand as it is made"
            )
    for n, name in enumerate(("the norm", "the sum")):
        for reader, given in _readers(site, n):
            below = any(_is_above(site, operand) for operand in reader.all_input_nodes if operand is not given)
            if reader.op != "output" and not _stands_apart(reader) and not below:
                return _together(reader, name)
    return None


def _together(node: Node, name: str) -> str:
    return f"the base compiler may compute {node} ({operator_name(node)}) in the same kernel as {name}"


def _is_bare_product(node: Node) -> bool:
    """Whether ``node`` is a product of two matrices to which nothing is added yet."""
    linear = is_call(node, torch.ops.aten.linear.default) and arguments(node)["bias"] is None
    product = is_call(node, torch.ops.aten.mm.default, torch.ops.aten.matmul.default)
    return tensor(node).dim() == 2 and (linear or product)


def _stands_apart(node: Node) -> bool:
    return node.op in ("placeholder", "get_attr") or (node.op == "call_function" and operator_name(node) in _APART)


def _is_view(node: Node) -> bool:
    if node.op != "call_function":
        return False
    view = isinstance(node.target, torch._ops.OpOverload) and node.target.is_view
    return view or operator_name(node) in _VIEWS


def _origin(node: Node) -> Node:
    """What computes ``node``, behind views and the choice of one of several results."""
    while _is_view(node) or is_call(node, operator.getitem):
        node = node.all_input_nodes[0]
    return node


def _readers(site: Node, result: int) -> Iterator[tuple[Node, Node]]:
    """Who reads a result of ``site``, behind views, each with the operand through which it does."""
    return _read_by(*(user for user in site.users if is_call(user, operator.getitem) and user.args[1] == result))


def _read_by(*nodes: Node) -> Iterator[tuple[Node, Node]]:
    pending = list(nodes)
    while pending:
        node = pending.pop()
        for user in node.users:
            if _is_view(user):
                pending.append(user)
            else:
                yield user, node


def _is_above(node: Node, other: Node) -> bool:
    """Whether ``other`` is computed from ``node``: what stands before it in the graph can't be."""
    pending, seen = [other], {other}
    while pending:
        current = pending.pop()
        if current is node:
            return True
        fresh = [n for n in current.all_input_nodes if n not in seen and not n < node]
        seen.update(fresh)
        pending.extend(fresh)
    return False


def _has_learning_bias(node: Node) -> bool:
    name = _BIASED.get(operator_name(node)) if node.op == "call_function" else None
    bias = arguments(node).get(name) if name else None
    return isinstance(bias, Node) and may_need_gradient(bias)
