"""Linear layers as readers and writers of channels: whether their weights can take over a scale and a shift."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch.fx import Node

from fxopt.analysis.channels import End, Obstacle, follow_channels, moved_axis
from fxopt.analysis.convolutions import CONVOLUTIONS, read_convolution
from fxopt.analysis.state import State, weight_objection
from fxopt.ir.nodes import arguments, is_tensor, scalar, shape, source
from fxopt.ir.program import Program, operator_name

aten = torch.ops.aten

Form = Literal["linear", "addmm", "matmul", "convolution"]


@dataclass(frozen=True)
class Layer:
    """A linear layer with weights of the model: ``y = x·W + c`` or a convolution.

    Attributes:
        node: the call.
        form: how it is spelled: ``linear`` and ``convolution`` have ``W [out, in, …]``, ``addmm`` and ``matmul``
            ``[in, out]``.
        x: what it reads.
        weight: ``W``.
        bias: ``c [out]``, or ``None``.
        read: the axis of ``x`` that holds the channels.
        written: the axis of the result that holds the channels.
        groups: groups of channels (1 unless a convolution has more).
        padded: whether zeros are read around ``x``.
    """

    node: Node
    form: Form
    x: Node
    weight: Node
    bias: Node | None
    read: int
    written: int
    groups: int = 1
    padded: bool = False


def find_readers(
    program: Program, state: State, start: Node, axis: int, *, shifted: bool
) -> tuple[tuple[Node, ...], tuple[Layer, ...]] | Obstacle:
    """The moves between ``start`` and the layers that read its channels, and those layers; an obstacle if there is
    a reader of another kind, or one whose weights can't take over a scale and, if ``shifted``, a shift per channel.
    """
    reach = follow_channels(start, axis, shifted=shifted)
    if isinstance(reach, Obstacle):
        return reach
    if not reach.ends:
        return Obstacle(f"nothing reads {start}", (start,))
    layers: list[Layer] = []
    for end in reach.ends:
        layer = _reader(state, end, shifted)
        if isinstance(layer, str):
            return Obstacle(layer, (end.node,))
        layers.append(layer)
    return reach.between, tuple(layers)


def _reader(state: State, end: End, shifted: bool) -> Layer | str:
    if end.node.op == "output":
        return "it is also a result of the model"
    where = source(end.node).location
    name = f"{operator_name(end.node)}{f' at {where}' if where else ''}"
    layer = read_layer(end.node)
    if layer is None or layer.x is not end.x or end.node.all_input_nodes.count(end.x) > 1:
        return f"{name} reads it too, which is no linear layer"
    if layer.read != end.axis:
        return f"{name} does not read its channels as channels"
    if layer.padded and shifted:
        return f"{name} pads with zeros, which would become the shift of the norm"
    return weights_objection(state, layer) or layer


@dataclass(frozen=True)
class Writer:
    """A layer that computes a tensor, and the moves ``between`` them in the order of the graph."""

    layer: Layer
    between: tuple[Node, ...]


def find_writer(state: State, x: Node, axis: int, readers: set[Node], *, shifted: bool) -> Writer | Obstacle:
    """The layer whose output channels are the axis ``axis`` of ``x`` and go nowhere but, moved about, to ``readers``.

    An obstacle where there is none, or its weights can't take over a scale and, if ``shifted``, a shift per channel.
    """
    between: list[Node] = []
    while True:
        others = [user for user in x.users if user not in readers]
        if others:
            return Obstacle(f"{operator_name(others[0]) or others[0].op} reads {x} too", (x, others[0]))
        layer = read_layer(x)
        if layer is not None and (layer.written != axis or weights_objection(state, layer)):
            objection = weights_objection(state, layer)
            return Obstacle(objection or f"{operator_name(x)} does not write its channels as channels", (x,))
        if layer is not None:
            return Writer(layer, tuple(reversed(between)))
        step = moved_from(x, axis, shifted=shifted)
        if isinstance(step, str):
            return Obstacle(step, (x,))
        between.append(x)
        readers = {x}
        x, axis = step


def moved_from(node: Node, axis: int, *, shifted: bool) -> tuple[Node, int] | str:
    """What ``node`` moves the channels of, and where they are there; a reason if it does not."""
    x = node.args[0] if node.op == "call_function" and node.args else None
    name = operator_name(node) if node.op == "call_function" else f"the input {node}"
    if not is_tensor(x):
        return f"no linear layer writes {name}"
    answers = [moved_axis(node, x, place, shifted=shifted) for place in range(len(shape(x)))]  # type: ignore[arg-type]
    if axis in answers:
        return x, answers.index(axis)  # type: ignore[return-value]
    return next((answer for answer in answers if isinstance(answer, str)), f"{name} is no linear layer")


def weights_objection(state: State, layer: Layer) -> str:
    """Why the weights of ``layer`` can't take over anything; empty if they can."""
    operands = [operand for operand in (layer.weight, layer.bias) if operand is not None]
    return next(filter(None, (weight_objection(state, operand) for operand in operands)), "")


def read_layer(node: Node) -> Layer | None:
    """The linear layer that ``node`` computes; ``None`` for anything else. Whether its weights are the model's own is
    for `weights_objection` to say.
    """
    read = _LAYERS.get(node.target) if node.op == "call_function" else None
    return None if read is None else read(node)


def _linear(node: Node) -> Layer | None:
    given = arguments(node)
    x = given["input"]
    if len(shape(given["weight"])) != 2:
        return None
    return Layer(node, "linear", x, given["weight"], given["bias"], len(shape(x)) - 1, len(shape(node)) - 1)


def _matmul(node: Node) -> Layer | None:
    x, weight = node.args[:2]
    if not isinstance(x, Node) or not isinstance(weight, Node) or len(shape(weight)) != 2 or len(shape(x)) < 2:
        return None
    return Layer(node, "matmul", x, weight, None, len(shape(x)) - 1, len(shape(node)) - 1)


def _addmm(node: Node) -> Layer | None:
    given = arguments(node)
    bias, x, weight = given["self"], given["mat1"], given["mat2"]
    if scalar(given["alpha"]) != 1 or scalar(given["beta"]) != 1 or len(shape(bias)) != 1:
        return None
    return Layer(node, "addmm", x, weight, bias, 1, 1)


def _convolution(node: Node) -> Layer | None:
    found = read_convolution(node)
    if found is None:
        return None
    place = len(shape(found.x)) - len(found.kernel) - 1
    return Layer(node, "convolution", found.x, found.weight, found.bias, place, place, found.groups, any(found.padding))


_LAYERS: Final[dict[object, Callable[[Node], Layer | None]]] = {
    aten.linear.default: _linear,
    aten.matmul.default: _matmul,
    aten.mm.default: _matmul,
    aten.addmm.default: _addmm,
    **dict.fromkeys(CONVOLUTIONS, _convolution),
}
