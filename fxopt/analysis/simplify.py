"""Algebra on score and mask expressions: identities that hold in real arithmetic."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, Final

from fxopt.ir.expression import Expr, call, const

_FOLD: Final[dict[str, Callable[..., Any]]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv, "neg": operator.neg,
    "floordiv": operator.floordiv, "mod": operator.mod, "minimum": min, "maximum": max, "abs": abs,
    "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge, "eq": operator.eq, "ne": operator.ne,
    "and": lambda a, b: a and b, "or": lambda a, b: a or b, "not": operator.not_, "float": float, "tanh": math.tanh,
}  # fmt: skip
_TRUE: Final = const(True)
_FALSE: Final = const(False)


def simplify(expr: Expr) -> Expr:
    """Fold constants, drop neutral operands, gather constant factors of a product; never reorders sums."""
    return expr.replace(_simplify_node)


def _simplify_node(expr: Expr) -> Expr:
    if expr.args and expr.op in _FOLD and all(a.op == "const" for a in expr.args):
        return _fold(expr)
    step = _STEPS.get(expr.op)
    return step(expr) if step else expr


def _fold(expr: Expr) -> Expr:
    try:
        return const(_FOLD[expr.op](*(a.value for a in expr.args)))
    except (ZeroDivisionError, OverflowError, ValueError):
        return expr


def _product(expr: Expr) -> Expr:
    left, right = expr.args
    if left.op == "const":
        left, right = right, left
    if right.op != "const":
        return call("mul", left, right)
    if right.value == 1:
        return left
    if left.op == "mul" and left.args[1].op == "const":
        return _product(call("mul", left.args[0], _fold(call("mul", left.args[1], right))))
    return call("mul", left, right)


def _quotient(expr: Expr) -> Expr:
    left, right = expr.args
    if right.op != "const" or not isinstance(right.value, int | float) or right.value == 0:
        return expr
    return _product(call("mul", left, const(1.0 / right.value)))


def _sum(expr: Expr) -> Expr:
    left, right = expr.args
    if right == const(0) or right == const(0.0):
        return left
    if expr.op == "add" and (left == const(0) or left == const(0.0)):
        return right
    return expr


def _where(expr: Expr) -> Expr:
    condition, true, false = expr.args
    if condition.op == "const":
        return true if condition.value else false
    if condition.op == "not":
        return call("where", condition.args[0], false, true)
    return expr


def _and(expr: Expr) -> Expr:
    left, right = expr.args
    if _FALSE in (left, right):
        return _FALSE
    return right if left == _TRUE else left if right == _TRUE else expr


def _not(expr: Expr) -> Expr:
    (operand,) = expr.args
    if operand.op == "not":
        return operand.args[0]
    opposite = _OPPOSITE.get(operand.op)
    return call(opposite, *operand.args) if opposite else expr


_OPPOSITE: Final = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt", "eq": "ne", "ne": "eq"}
_STEPS: Final[dict[str, Callable[[Expr], Expr]]] = {
    "mul": _product, "div": _quotient, "add": _sum, "sub": _sum, "where": _where, "and": _and, "not": _not,
}  # fmt: skip
