"""The residual stream around a norm: every value that is a sum of what layers write, and everything that reads one.

Subtracting from each value of the stream its mean over the channels, ``P = I − 11ᵀ/C``, commutes with all that stands
between writers and readers (sums, scalar factors, moves of whole channels), and a LayerNorm does not see it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import torch
from torch.fx import Node

from fxopt.analysis.channels import Obstacle, moved_axis
from fxopt.analysis.readers import Layer, moved_from, read_layer, weights_objection
from fxopt.analysis.state import State, weight_objection
from fxopt.ir.nodes import arguments, is_tensor, same_size, scalar, shape, source
from fxopt.ir.operators import overload
from fxopt.ir.program import operator_name

aten = torch.ops.aten

_NORMS: Final = (aten.layer_norm.default, overload("layer_norm"))


@dataclass
class Stream:
    """A residual stream.

    Attributes:
        axes: the axis of the channels of each value.
        layers: the linear layers that write into it.
        lookups: the embeddings that do.
        tables: the weights that are added or joined as they are (positions, a class token).
        norms: the LayerNorms that read it.
    """

    axes: dict[Node, int] = field(default_factory=dict)
    layers: dict[Node, Layer] = field(default_factory=dict)
    lookups: list[Node] = field(default_factory=list)
    tables: dict[Node, int] = field(default_factory=dict)
    norms: list[Node] = field(default_factory=list)

    @property
    def writers(self) -> int:
        """How many layers, embeddings and weights write into it."""
        return len(self.layers) + len(self.lookups) + len(self.tables)


def find_stream(state: State, norm: Node) -> Stream | Obstacle:
    """The stream that ``norm`` reads; an obstacle if something writes it that can't be centred, or something reads it
    that sees the mean.
    """
    walk = _Walk(state, Stream())
    x = arguments(norm)["input" if norm.target is _NORMS[0] else "x"]
    walk.pending.append((x, len(shape(x)) - 1))
    while walk.pending:
        node, axis = walk.pending.pop()
        if walk.stream.axes.setdefault(node, axis) != axis:
            return Obstacle(f"{node} is read with its channels as two different axes", (node,))
        if node in walk.seen:
            continue
        walk.seen.add(node)
        objection = walk.write(node, axis) or next(filter(None, walk.read(node, axis)), None)
        if objection:
            return objection
    return walk.stream


def reads_channels(norm: Node) -> bool:
    """Whether ``norm`` is a LayerNorm over one axis."""
    if norm.op != "call_function" or norm.target not in _NORMS:
        return False
    given = arguments(norm)
    return bool((given["axes"] if "axes" in given else len(given["normalized_shape"])) == 1)


@dataclass
class _Walk:
    state: State
    stream: Stream
    pending: list[tuple[Node, int]] = field(default_factory=list)
    seen: set[Node] = field(default_factory=set)

    def write(self, node: Node, axis: int) -> Obstacle | None:
        """Follow what ``node`` is made of."""
        layer = read_layer(node)
        if layer is not None:
            objection = _layer_objection(layer, axis) or weights_objection(self.state, layer)
            self.stream.layers[node] = layer
            return _at(node, objection) if objection else None
        if node.target is aten.embedding.default:
            objection = _table_objection(self.state, node.args[0]) or _axis_objection(node, axis)
            self.stream.lookups.append(node)
            return _at(node, objection) if objection else None
        operands = _operands(node, axis)
        if operands is None:
            return _at(node, "it writes into the stream and can't be centred")
        obstacles = (self._add(operand, place) for operand, place in operands)
        return next(filter(None, obstacles), None)

    def read(self, node: Node, axis: int) -> Iterator[Obstacle | None]:
        """Follow what reads ``node``."""
        for user in node.users:
            if reads_channels(user) and axis == len(shape(node)) - 1 and user.args[0] is node:
                if user not in self.stream.norms:
                    self.stream.norms.append(user)
            elif user.op == "output":
                yield Obstacle("the stream is also a result of the model", (user,))
            else:
                place = _result_axis(user, node, axis)
                if place is None:
                    yield _at(user, "it reads the stream without a LayerNorm")
                else:
                    self.pending.append((user, place))

    def _add(self, node: Node, axis: int) -> Obstacle | None:
        if not self.state.holds(node):
            self.pending.append((node, axis))
            return None
        objection = _table_objection(self.state, node)
        self.stream.tables[node] = axis
        return _at(node, objection) if objection else None


def _table_objection(state: State, node: object) -> str:
    return weight_objection(state, node) if isinstance(node, Node) else f"{node} is no weight"


def _layer_objection(layer: Layer, axis: int) -> str:
    if layer.written != axis:
        return "it does not write its channels as channels"
    if layer.groups > 1:
        return f"its {layer.groups} groups write channels from inputs of their own, which have no mean weight in common"
    return ""


def _axis_objection(node: Node, axis: int) -> str:
    return "" if axis == len(shape(node)) - 1 else "it does not write its channels as channels"


def _at(node: Node, reason: str) -> Obstacle:
    where = source(node).location
    return Obstacle(f"{operator_name(node)}{f' at {where}' if where else ''}: {reason}", (node,))


def _operands(node: Node, axis: int) -> list[tuple[Node, int]] | None:
    """The values that ``node`` adds, joins, scales or moves, with their channel axes; ``None`` for anything else."""
    if node.op != "call_function":
        return None
    if node.target in (aten.add.Tensor, aten.sub.Tensor):
        sides = [(x, _aligned(x, node, axis)) for x in node.args[:2]]
        return None if any(place is None for _, place in sides) else sides  # type: ignore[return-value]
    if node.target is aten.cat.default:
        given = arguments(node)
        joined = int(given["dim"]) % len(shape(node)) != axis
        return [(x, axis) for x in given["tensors"]] if joined else None
    if node.target in (aten.mul.Tensor, aten.div.Tensor) and scalar(node.args[1]) is not None:
        return [(node.args[0], axis)]  # type: ignore[list-item]
    found = moved_from(node, axis, shifted=False)
    return None if isinstance(found, str) else [found]


def _aligned(x: object, node: Node, axis: int) -> int | None:
    """The axis of the operand ``x`` of ``node`` that is broadcast to ``axis``, if it is there in full."""
    if not is_tensor(x):
        return None
    place = axis - len(shape(node)) + len(shape(x))
    return place if place >= 0 and same_size(shape(x)[place], shape(node)[axis]) else None


def _result_axis(user: Node, node: Node, axis: int) -> int | None:
    """Where ``user`` has the channels of ``node``, if it adds, joins, scales or moves; ``None`` for anything else."""
    if user.op != "call_function":
        return None
    if user.target in (aten.add.Tensor, aten.sub.Tensor):
        return axis + len(shape(user)) - len(shape(node))
    if user.target is aten.cat.default:
        return axis
    if user.target in (aten.mul.Tensor, aten.div.Tensor):
        return axis if user.args[0] is node and scalar(user.args[1]) is not None else None
    moved = moved_axis(user, node, axis, shifted=False)
    return moved if isinstance(moved, int) else None
