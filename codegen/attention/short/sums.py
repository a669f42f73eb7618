"""Scores split into what changes from step to step of a program and what does not, which is computed once.

x = moving + fixed        such as s·scale + (bias + shift mask) over windows with the same shift mask
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Final

from fxopt.codegen.expression import fold
from fxopt.ir.attention import Capture
from fxopt.ir.expression import Expr, S, call, const

_LINEAR: Final = frozenset({"add", "sub", "mul", "div", "neg"})
#: Numbers above this may be stand-ins for infinity.
_PLAIN: Final = 1e30


def split_sum(score: Expr, moves: Callable[[Expr], bool]) -> tuple[Expr, Expr | None]:
    """``score`` as the sum of its addends that move and, where there are both, of those that don't."""
    terms = _addends(score)
    moving = [term for term in terms if moves(term)]
    fixed = [term for term in terms if not moves(term)]
    if not moving or not fixed:
        return score, None
    return _sum(moving), _sum(fixed)


def _addends(expr: Expr) -> list[Expr]:
    if expr.op == "add":
        return [term for arg in expr.args for term in _addends(arg)]
    if expr.op == "sub":
        first, second = expr.args
        return [*_addends(first), *(call("neg", term) for term in _addends(second))]
    return [expr]


def _sum(terms: Sequence[Expr]) -> Expr:
    return reduce(lambda total, term: call("add", total, term), terms)


def moves_with(axis: str, captures: Sequence[Capture]) -> Callable[[Expr], bool]:
    """Whether an expression changes with the raw score, or along ``axis`` (``"b"``, or ``"i"``)."""
    place = "bhij".index(axis)

    def moves(expr: Expr) -> bool:
        for leaf in expr.walk():
            if leaf.op == "symbol" and leaf.value in ("s", axis):
                return True
            if leaf.op == "capture" and captures[int(leaf.value or 0)].dims[place] == axis:
                return True
        return False

    return moves


def is_linear(moving: Expr) -> bool:
    """Whether ``moving`` is linear in the raw score, with plain numbers.

    Then beyond the last key, where the raw score is 0, adding −∞ is as good as leaving the key out. (The raw score of a
    query that is not finite is NaN there, but then its row is NaN by its keys alone. A soft cap could hide that.)
    """

    def without_score(node: Expr) -> Expr:
        return const(0.0) if node == S else fold(node)

    value = moving.replace(without_score)
    plain = value.op == "const" and isinstance(value.value, (int, float)) and abs(value.value) < _PLAIN
    return plain and all(node.op in _LINEAR for node in moving.walk() if node.args)
