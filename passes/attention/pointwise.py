"""Pointwise operators of the scores, of masks and of biases: how each is read as an expression."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Protocol

import torch
from torch.fx import Node

from fxopt.ir.expression import Expr, call, const
from fxopt.ir.nodes import arguments, scalar, shape

aten = torch.ops.aten


class Walk(Protocol):
    """What a handler asks of the walk that it serves."""

    def carries(self, value: object) -> bool:
        """Whether ``value`` is computed from the scores."""
        ...

    def operand(self, value: Any, stage: Node) -> Expr:
        """The expression of one operand of the pointwise node ``stage``."""
        ...


class Obstacle(Exception):
    """The region can't be lifted: why, and at which node."""

    def __init__(self, reason: str, node: Node) -> None:
        super().__init__(reason)
        self.node = node


def schema_name(node: Node) -> str:
    """``aten::relu`` for an operator call, the target as text for anything else."""
    target = node.target
    return target._schema.name if isinstance(target, torch._ops.OpOverload) else str(target)


Handler = Callable[[Walk, Node], Expr]


def _plain(op: str, *names: str) -> Handler:
    """A handler for an operator whose arguments ``names`` are the operands of the expression ``op``."""

    def handle(walk: Walk, node: Node) -> Expr:
        given = arguments(node)
        return call(op, *_in_carrier_order(walk, node, [given[name] for name in names]))

    return handle


def _in_carrier_order(walk: Walk, node: Node, values: list[Any]) -> list[Expr]:
    """Operands lifted with the score-carrying ones first, so that a second contraction becomes a capture."""
    order = sorted(range(len(values)), key=lambda index: not _is_full(walk, values[index], node))
    lifted = {index: walk.operand(values[index], node) for index in order}
    return [lifted[index] for index in range(len(values))]


def _is_full(walk: Walk, value: Any, stage: Node) -> bool:
    return walk.carries(value) and len(shape(value)) == len(shape(stage))


def _scaled(op: str) -> Handler:
    """``self ± alpha·other``."""

    def handle(walk: Walk, node: Node) -> Expr:
        given = arguments(node)
        left, right = _in_carrier_order(walk, node, [given["self"], given["other"]])
        alpha = given.get("alpha", 1)
        factor = scalar(alpha)
        if factor is None:
            raise Obstacle("alpha is not a number", node)
        return call(op, left, right if factor == 1 else call("mul", right, const(factor)))

    return handle


def _reversed_subtraction(walk: Walk, node: Node) -> Expr:
    difference = _scaled("sub")(walk, node)
    return call("neg", difference) if scalar(arguments(node).get("alpha", 1)) == 1 else _refuse(node)


def _division(walk: Walk, node: Node) -> Expr:
    if arguments(node).get("rounding_mode") is not None:
        _refuse(node)
    return _plain("div", "self", "other")(walk, node)


def _masked_fill(walk: Walk, node: Node) -> Expr:
    given = arguments(node)
    scores, condition = _in_carrier_order(walk, node, [given["self"], given["mask"]])
    return call("where", condition, walk.operand(given["value"], node), scores)


def _clamp(walk: Walk, node: Node) -> Expr:
    given = arguments(node)
    result = walk.operand(given["self"], node)
    if given["min"] is not None:
        result = call("maximum", result, walk.operand(given["min"], node))
    if given["max"] is not None:
        result = call("minimum", result, walk.operand(given["max"], node))
    return result


def _relu(walk: Walk, node: Node) -> Expr:
    return call("maximum", walk.operand(arguments(node)["self"], node), const(0.0))


def _refuse(node: Node) -> Expr:
    raise Obstacle(f"this form of {schema_name(node)} is not lifted", node)


POINTWISE: Final[dict[Any, Handler]] = {
    aten.add.Tensor: _scaled("add"),
    aten.add.Scalar: _scaled("add"),
    aten.sub.Tensor: _scaled("sub"),
    aten.sub.Scalar: _scaled("sub"),
    aten.rsub.Scalar: _reversed_subtraction,
    aten.rsub.Tensor: _reversed_subtraction,
    aten.mul.Tensor: _plain("mul", "self", "other"),
    aten.mul.Scalar: _plain("mul", "self", "other"),
    aten.div.Tensor: _division,
    aten.div.Scalar: _division,
    aten.div.Tensor_mode: _division,
    aten.neg.default: _plain("neg", "self"),
    aten.abs.default: _plain("abs", "self"),
    aten.tanh.default: _plain("tanh", "self"),
    aten.sigmoid.default: _plain("sigmoid", "self"),
    aten.exp.default: _plain("exp", "self"),
    aten.log.default: _plain("log", "self"),
    aten.relu.default: _relu,
    aten.clamp.default: _clamp,
    aten.maximum.default: _plain("maximum", "self", "other"),
    aten.minimum.default: _plain("minimum", "self", "other"),
    aten.where.self: _plain("where", "condition", "self", "other"),
    aten.where.ScalarOther: _plain("where", "condition", "self", "other"),
    aten.where.ScalarSelf: _plain("where", "condition", "self", "other"),
    aten.masked_fill.Scalar: _masked_fill,
    aten.masked_fill.Tensor: _masked_fill,
}


#: Operators that choose among their operands: nothing is computed, which the dtype of integers could not hold.
CHOICES: Final = (
    aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.masked_fill.Scalar, aten.masked_fill.Tensor,
)  # fmt: skip
#: Operators that make truth values of truth values.
OF_TRUTH: Final = (
    *CHOICES, aten.__and__.Tensor, aten.__or__.Tensor, aten.bitwise_and.Tensor, aten.bitwise_or.Tensor,
    aten.bitwise_not.default, aten.logical_and.default, aten.logical_or.default, aten.logical_not.default,
)  # fmt: skip
#: Operators through which the operands of a mask or bias are lifted where that makes what is captured smaller.
LIFTED: Final[dict[Any, Handler]] = POINTWISE | {
    aten.__and__.Tensor: _plain("and", "self", "other"),
    aten.__or__.Tensor: _plain("or", "self", "other"),
    aten.bitwise_and.Tensor: _plain("and", "self", "other"),
    aten.bitwise_or.Tensor: _plain("or", "self", "other"),
    aten.logical_and.default: _plain("and", "self", "other"),
    aten.logical_or.default: _plain("or", "self", "other"),
    aten.bitwise_not.default: _plain("not", "self"),
    aten.logical_not.default: _plain("not", "self"),
}
