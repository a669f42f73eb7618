"""From the scores to the softmax: the pointwise region of an attention site, lifted into an expression.

The walk starts at the softmax's operand and goes up through pointwise operations, casts and views until it meets the
contraction of queries and keys. Every other operand that is broadcast onto the scores is lifted as it is: numbers as
constants, tensors as captures.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch.fx import Node

from fxopt.analysis.constants import Constants
from fxopt.analysis.values import is_coarser
from fxopt.ir.expression import NEG_INF, Expr, S, call, capture, const
from fxopt.ir.nodes import Size, is_call, is_tensor, same_size, scalar, shape, tensor
from fxopt.passes.attention.axes import round_trip
from fxopt.passes.attention.pointwise import CHOICES, LIFTED, OF_TRUTH, POINTWISE, Obstacle, schema_name
from fxopt.passes.attention.space import Operand
from fxopt.passes.attention.two_valued import two_values
from fxopt.rewriter.rule import Rejection

aten = torch.ops.aten

CONTRACTION: Final = aten.matmul.default
#: Views and copies that keep elements where they are in row-major order.
RESHAPES: Final = (
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.contiguous.default, aten.clone.default, aten.expand.default, aten.alias.default, aten.view_as.default,
    aten.flatten.using_ints, aten.unflatten.int,
)  # fmt: skip
CASTS: Final = (aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default, aten.type_as.default, aten.to.device)


class _Lift:
    """One walk: which nodes carry scores, and the expression of each. Without ``scores``, nothing carries them."""

    def __init__(self, constants: Constants, *, scores: bool = True) -> None:
        self.constants = constants
        self.scores = scores
        self.contraction: Node | None = None
        self.operands: list[Operand] = []
        self.nodes: list[Node] = []
        self.dtypes: set[torch.dtype] = set()
        self._carries: dict[Node, bool] = {}
        self.stage: tuple[Size, ...] | None = None
        self.precision: torch.dtype | None = None

    def carries(self, value: object) -> bool:
        """Whether ``value`` is computed from a contraction by pointwise operations and views alone."""
        if not self.scores or not isinstance(value, Node):
            return False
        if value not in self._carries:
            self._carries[value] = self._find(value)
        return self._carries[value]

    def _find(self, node: Node) -> bool:
        if is_call(node, CONTRACTION):
            return True
        if there_and_back := round_trip(node):
            return self.carries(there_and_back[-1].args[0])
        if not is_call(node, *POINTWISE, *RESHAPES, *CASTS):
            return False
        return any(self.carries(operand) for operand in node.all_input_nodes)

    def lift(self, node: Node) -> Expr:
        """The expression of a node that carries scores; raises `Obstacle`."""
        self.dtypes.add(tensor(node).dtype)
        if is_call(node, CONTRACTION):
            return self._root(node)
        if there_and_back := round_trip(node):
            self.nodes.extend(there_and_back)
            return self.lift(_first(there_and_back[-1]))
        self.nodes.append(node)
        if is_call(node, *RESHAPES):
            return self._through_view(node)
        if is_call(node, *CASTS):
            return self._through_cast(node)
        if not is_call(node, *POINTWISE):
            raise Obstacle(f"{schema_name(node)} is not a pointwise operation on the scores", node)
        return POINTWISE[node.target](self, node)

    def operand(self, value: Any, stage: Node) -> Expr:
        """The expression of one operand of the pointwise node ``stage``."""
        if self.carries(value) and self.contraction in (None, self.root_of(value)):
            return self.lift(value)
        number = scalar(value) if not is_tensor(value) else self.constants.number(value)
        if number is not None:
            return const(number)
        if not is_tensor(value):
            raise Obstacle(f"{value} is neither a number nor a tensor", stage)
        if tensor(value).dtype.is_complex:
            raise Obstacle(f"{value} is complex", stage)
        if self._unfolds(value):
            return self._unfold(value, stage)
        pair = two_values(value, self.constants)
        if pair is not None:
            self.dtypes.add(tensor(value).dtype)
            return call("where", self.operand(pair[0], stage), *map(const, pair[1:]))
        operand = Operand(value, self.stage or shape(stage))
        if operand not in self.operands:
            self.operands.append(operand)
        return capture(self.operands.index(operand))

    def _unfolds(self, value: Node) -> bool:
        """Whether an operand is better lifted than captured: it spreads smaller tensors, or one part of it is constant.

        A padding vector combined with a causal mask is then read as a vector and proved as a mask, not built as a
        plane. What was rounded more than the scores are is captured.
        """
        if not is_call(value, *LIFTED) or self.constants.is_constant(value):
            return False
        dtype = tensor(value).dtype
        if self.precision is not None and is_coarser(dtype, self.precision) and value.target not in CHOICES:
            return False
        if not dtype.is_floating_point and value.target not in (OF_TRUTH if dtype is torch.bool else CHOICES):
            return False
        parts = [node for node in value.all_input_nodes if is_tensor(node) and not self.constants.is_constant(node)]
        constant = len(parts) < len(value.all_input_nodes)
        return constant or (bool(parts) and all(_spreads(part, value) for part in parts))

    def _unfold(self, value: Node, stage: Node) -> Expr:
        """Lift the parts of ``value``, each broadcast onto the scores at the stage where ``value`` meets them."""
        outer = self.stage
        self.stage = outer or shape(stage)
        self.dtypes.add(tensor(value).dtype)
        try:
            return LIFTED[value.target](self, value)
        finally:
            self.stage = outer

    def root_of(self, node: Node) -> Node:
        """The contraction that a carrying node is computed from (the first one, where there are several)."""
        while not is_call(node, CONTRACTION):
            last = (node, *round_trip(node))[-1]
            node = next(operand for operand in last.all_input_nodes if self.carries(operand))
        return node

    def _root(self, node: Node) -> Expr:
        self.contraction = node
        return S

    def _through_view(self, node: Node) -> Expr:
        before, after = shape(node.args[0]), shape(node)
        if len(after) < 2 or not (same_size(before[-1], after[-1]) and same_size(before[-2], after[-2])):
            raise Obstacle(f"{schema_name(node)} rearranges the scores from {before} to {after}", node)
        return self.lift(_first(node))

    def _through_cast(self, node: Node) -> Expr:
        if not tensor(node).dtype.is_floating_point:
            raise Obstacle(f"the scores are converted to {tensor(node).dtype}", node)
        return self.lift(_first(node))


def _first(node: Node) -> Node:
    operand = node.args[0]
    assert isinstance(operand, Node)
    return operand


def _spreads(part: Node, whole: Node) -> bool:
    """Whether ``whole`` repeats ``part`` along an axis."""
    known, full = shape(part), shape(whole)
    known = (1,) * (len(full) - len(known)) + known
    return any(same_size(a, 1) and not same_size(b, 1) for a, b in zip(known, full, strict=True))


@dataclass(frozen=True)
class Region:
    """A lifted region: the contraction of queries and keys, the expression, its captures, and the nodes it covers.

    ``dtypes`` are those that the scores, and the masks and biases lifted with them, pass through. ``kept``: where the
    weights are not set to 0 after the softmax, if some are.
    """

    scores: Node
    expression: Expr
    operands: tuple[Operand, ...]
    nodes: tuple[Node, ...]
    dtypes: frozenset[torch.dtype]
    stages: list[tuple[Size, ...]] = field(default_factory=list)
    kept: Expr | None = None

    @property
    def whole(self) -> Expr:
        """The expression, where the weights are kept."""
        return self.expression if self.kept is None else call("where", self.kept, self.expression, NEG_INF)


def lift_region(logits: Node, constants: Constants) -> Region | Rejection:
    """Lift what lies between the contraction of queries and keys and ``logits``, the operand of the softmax."""
    lift = _Lift(constants)
    if not lift.carries(logits):
        return Rejection(
            f"no contraction reaches the softmax through pointwise operations; it stops at {_blame(logits)}", (logits,)
        )
    lift.precision = tensor(lift.root_of(logits)).dtype
    try:
        expression = lift.lift(logits)
    except Obstacle as obstacle:
        return Rejection(str(obstacle), (obstacle.node,))
    assert lift.contraction is not None
    nodes = (*lift.nodes, lift.contraction)
    dtypes, stages = frozenset(lift.dtypes), [shape(node) for node in nodes]
    return Region(lift.contraction, expression, tuple(lift.operands), nodes, dtypes, stages)


@dataclass(frozen=True)
class LiftedMask:
    """A mask or bias that was lifted: its expression, what it captures, and the dtypes that it passes through."""

    expression: Expr
    operands: tuple[Operand, ...]
    dtypes: frozenset[torch.dtype]


def lift_mask(mask: Node, sizes: tuple[Size, ...], constants: Constants) -> LiftedMask | Rejection:
    """Lift a mask or bias that is broadcast onto scores of shape ``sizes``."""
    lift = _Lift(constants, scores=False)
    lift.stage = sizes
    try:
        expression = lift.operand(mask, mask)
    except Obstacle as obstacle:
        return Rejection(str(obstacle), (obstacle.node,))
    return LiftedMask(expression, tuple(lift.operands), frozenset({*lift.dtypes, tensor(mask).dtype}))


def _blame(node: Node) -> str:
    """The first operator on the way up that the scores can't be followed through."""
    while is_call(node, *POINTWISE, *RESHAPES, *CASTS):
        whole = [n for n in node.all_input_nodes if is_tensor(n) and len(shape(n)) == len(shape(node))]
        if not whole:
            break
        node = max(whole, key=lambda n: sum(same_size(a, b) for a, b in zip(shape(n), shape(node), strict=True)))
    return schema_name(node) if node.op == "call_function" else node.name
