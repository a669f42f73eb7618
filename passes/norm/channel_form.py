"""Reading a scale and a shift per channel: BatchNorm with running statistics, products and sums with weights, and what
they are together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Final

import torch
from torch._ops import OpOverload
from torch.fx import Node

from fxopt.analysis.channels import PERMUTATIONS, axis_order
from fxopt.analysis.state import State
from fxopt.ir.nodes import arguments, is_tensor, same_shape, same_size, scalar, shape, tensor
from fxopt.rewriter.builder import Builder
from fxopt.rewriter.pattern import CASTS, cast_operand

aten = torch.ops.aten

#: Writes ``[C]`` or a single number in float64 into the graph.
Vector = Callable[[Builder], Node]


@dataclass(frozen=True)
class ChannelForm:
    """``scale ⊙ x.permute(order) + shift``, where the channels are the axis ``axis`` of the result.

    ``scale`` and ``shift`` are ``None`` for 1 and 0, ``axis`` while nothing has said which one it is. ``nodes`` are
    those that compute it, the last one first.
    """

    x: Node
    order: tuple[int, ...]
    axis: int | None = None
    scale: Vector | None = None
    shift: Vector | None = None
    nodes: tuple[Node, ...] = field(default=())

    def times(self, factor: Vector) -> ChannelForm:
        """This, scaled."""
        return replace(self, scale=_product(self.scale, factor), shift=self.shift and _product(self.shift, factor))

    def plus(self, term: Vector) -> ChannelForm:
        """This, shifted."""
        return replace(self, shift=_sum(self.shift, term))

    def over(self, node: Node, axis: int | None = None) -> ChannelForm | None:
        """This, computed by ``node`` too, over the channel axis ``axis`` if that says something."""
        if axis is not None and self.axis not in (None, axis):
            return None
        return replace(self, axis=self.axis if axis is None else axis, nodes=(node, *self.nodes))


def read_form(state: State, node: Node) -> ChannelForm | None:
    """What ``node`` computes, if that is a scale per channel, and perhaps a shift, of one tensor."""
    form = _READ[node.target](state, node) if node.op == "call_function" and node.target in _READ else None
    whole = form is not None and form.axis is not None and form.scale is not None
    return form if whole and same_size(shape(node)[form.axis], _channels(form)) else None  # type: ignore[index,union-attr,arg-type]


def is_batch_norm(node: Node) -> bool:
    """Whether ``node`` is a call of batch norm."""
    return node.target is aten.batch_norm.default


def vectors(builder: Builder, form: ChannelForm) -> tuple[Node | None, Node | None]:
    """Scale and shift as ``[C]`` in float64."""
    size = _channels(form)

    def written(vector: Vector | None) -> Node | None:
        if vector is None:
            return None
        node = vector(builder)
        return node if same_shape(shape(node), (size,)) else builder.call(aten.expand.default, node, [size])

    return written(form.scale), written(form.shift)


def _channels(form: ChannelForm) -> Any:
    assert form.axis is not None
    return shape(form.x)[form.order[form.axis]]


def _operand(state: State, node: Node, axis: int | None = None) -> ChannelForm:
    """What ``node``, an operand read by one node only, computes; else the operand itself, behind permutations.

    With ``axis``, what is read over another axis is the operand itself.
    """
    form = _read_operand(state, node)
    return form if axis is None or form.axis in (None, axis) else _plain(node)


def _plain(node: Node) -> ChannelForm:
    return ChannelForm(node, tuple(range(len(shape(node)))))


def _read_operand(state: State, node: Node) -> ChannelForm:
    read = _READ.get(node.target) if node.op == "call_function" and len(node.users) == 1 else None
    form = read(state, node) if read is not None and not state.holds(node) else None
    if form is not None:
        return form
    if node.op == "call_function" and node.target in PERMUTATIONS:
        return _permuted(_operand(state, node.args[0]), node)  # type: ignore[arg-type]
    return _plain(node)


def _permuted(form: ChannelForm, node: Node) -> ChannelForm:
    order = axis_order(node)
    axis = None if form.axis is None else order.index(form.axis)
    return replace(form, order=tuple(form.order[a] for a in order), axis=axis, nodes=(node, *form.nodes))


def _read_permutation(state: State, node: Node) -> ChannelForm | None:
    inner = _operand(state, node.args[0])  # type: ignore[arg-type]
    return _permuted(inner, node) if inner.scale is not None else None


def _read_cast(state: State, node: Node) -> ChannelForm | None:
    inner = cast_operand(node)
    if inner is None or not tensor(node).dtype.is_floating_point or not tensor(inner).dtype.is_floating_point:
        return None
    return _operand(state, inner).over(node)


def _read_batch_norm(state: State, node: Node) -> ChannelForm | None:
    given = arguments(node)
    weight, bias, mean, variance = (given[n] for n in ("weight", "bias", "running_mean", "running_var"))
    weights = [operand for operand in (weight, bias, mean, variance) if operand is not None]
    if given["training"] or mean is None or variance is None or not all(map(state.holds, weights)):
        return None
    inverse = _inverse_root(_weight(variance), float(given["eps"]))
    slope = inverse if weight is None else _product(_weight(weight), inverse)
    offset = _of(aten.neg.default, _product(_weight(mean), slope))
    found = _operand(state, given["input"], 1).times(slope).plus(offset)
    return (found if bias is None else found.plus(_weight(bias))).over(node, 1)


def _read_mul(state: State, node: Node) -> ChannelForm | None:
    for x, factor in (node.args, reversed(node.args)):
        vector = _vector(state, node, factor)
        if vector is not None and is_tensor(x) and same_shape(shape(x), shape(node)) and not state.holds(x):
            return _operand(state, x, vector[1]).times(vector[0]).over(node, vector[1])  # type: ignore[arg-type]
    return None


def _read_div(state: State, node: Node) -> ChannelForm | None:
    x, divisor = node.args
    vector = _vector(state, node, divisor)
    if vector is None or not is_tensor(x) or not same_shape(shape(x), shape(node)):
        return None
    return _operand(state, x, vector[1]).times(_of(aten.reciprocal.default, vector[0])).over(node, vector[1])  # type: ignore[arg-type]


def _read_add(state: State, node: Node) -> ChannelForm | None:
    if scalar(arguments(node)["alpha"]) != 1:
        return None
    for x, term in (node.args[:2], reversed(node.args[:2])):
        vector = _vector(state, node, term)
        if vector is not None and is_tensor(x) and same_shape(shape(x), shape(node)) and not state.holds(x):
            return _operand(state, x, vector[1]).plus(vector[0]).over(node, vector[1])  # type: ignore[arg-type]
    left, right = (_operand(state, x) if isinstance(x, Node) and is_tensor(x) else None for x in node.args[:2])
    return None if left is None or right is None else _added(left, right, node)


def _added(left: ChannelForm, right: ChannelForm, node: Node) -> ChannelForm | None:
    axes = {axis for axis in (left.axis, right.axis) if axis is not None}
    alike = left.x is right.x and left.order == right.order and same_shape(shape(left.x), shape(right.x))
    if not alike or len(axes) != 1 or not same_shape(shape(node), tuple(shape(left.x)[a] for a in left.order)):
        return None
    one = _number(1.0)
    scale = _sum(left.scale or one, right.scale or one)
    shift = _sum(left.shift, right.shift) if left.shift and right.shift else left.shift or right.shift
    return ChannelForm(left.x, left.order, axes.pop(), scale, shift, (node, *left.nodes, *right.nodes))


def _read_sub(state: State, node: Node) -> ChannelForm | None:
    x, term = node.args[:2]
    vector = _vector(state, node, term) if scalar(arguments(node)["alpha"]) == 1 else None
    if vector is None or not is_tensor(x) or not same_shape(shape(x), shape(node)):
        return None
    return _operand(state, x, vector[1]).plus(_of(aten.neg.default, vector[0])).over(node, vector[1])  # type: ignore[arg-type]


def _read_addcmul(state: State, node: Node) -> ChannelForm | None:
    given = arguments(node)
    term, x, factor = (given[n] for n in ("self", "tensor1", "tensor2"))
    shift, scale = _vector(state, node, term), _vector(state, node, factor)
    if scalar(given["value"]) != 1 or shift is None or scale is None or not same_shape(shape(x), shape(node)):
        return None
    if None not in (shift[1], scale[1]) and shift[1] != scale[1]:
        return None
    axis = shift[1] if scale[1] is None else scale[1]
    return _operand(state, x, axis).times(scale[0]).plus(shift[0]).over(node, axis)


def _vector(state: State, node: Node, operand: object) -> tuple[Vector, int | None] | None:
    """``operand`` if it is a weight (or a number) with one value a channel of ``node``, and the axis of the channels;
    or with one value for all, and no axis.
    """
    number = scalar(operand) if not is_tensor(operand) else None
    if number is not None:
        return _number(float(number)), None
    if not is_tensor(operand) or not state.holds(operand) or not tensor(operand).dtype.is_floating_point:
        return None
    behind, rank = shape(operand), len(shape(node))
    wide = [rank - len(behind) + axis for axis, size in enumerate(behind) if not same_size(size, 1)]
    if len(wide) > 1 or len(behind) > rank:
        return None
    return _weight(operand), (wide[0] if wide else None)  # type: ignore[arg-type]


def _written_once(write: Vector) -> Vector:
    """However often it is read, a vector is written into the graph once."""
    return cache(write)


def _weight(node: Node) -> Vector:
    return _written_once(lambda builder: builder.reshape(builder.cast(node, torch.float64), [-1]))


def _number(value: float) -> Vector:
    return _written_once(
        lambda builder: builder.call(
            aten.scalar_tensor.default, value, dtype=torch.float64, device=tensor(builder.at).device
        )
    )


def _product(left: Vector | None, right: Vector) -> Vector:
    return right if left is None else _combined(aten.mul.Tensor, left, right)


def _sum(left: Vector | None, right: Vector) -> Vector:
    return right if left is None else _combined(aten.add.Tensor, left, right)


def _combined(target: OpOverload, left: Vector, right: Vector) -> Vector:
    return _written_once(lambda builder: builder.call(target, left(builder), right(builder)))


def _of(target: OpOverload, vector: Vector) -> Vector:
    return _written_once(lambda builder: builder.call(target, vector(builder)))


def _inverse_root(vector: Vector, eps: float) -> Vector:
    shifted = _written_once(lambda builder: builder.call(aten.add.Tensor, vector(builder), eps))
    return _of(aten.rsqrt.default, shifted)


_READ: Final[dict[Any, Callable[[State, Node], ChannelForm | None]]] = {
    aten.batch_norm.default: _read_batch_norm,
    aten.mul.Tensor: _read_mul,
    aten.div.Tensor: _read_div,
    aten.add.Tensor: _read_add,
    aten.sub.Tensor: _read_sub,
    aten.addcmul.default: _read_addcmul,
    **dict.fromkeys(CASTS, _read_cast),
    **dict.fromkeys(PERMUTATIONS, _read_permutation),
}
