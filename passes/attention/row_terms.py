"""Terms of a score that are the same for all keys of a row, which a softmax does not see.

    softmax_j(x + t) = softmax_j(x)        for a finite t that does not depend on j

Only what is proved to be finite goes: numbers, positions, integers and constant tensors. A real tensor that comes at
run time may hold −inf, as masks of rows do, or NaN, and then the row is NaN; and it has a gradient, though one of 0.

Only what is added to the scores themselves goes. ``s + c·(j - i)`` keeps its distance: ``s + c·j`` is the same to a
softmax, but as large as the position and rounded as such, where the weights are near the diagonal (in float32 50 times
the error, with 2048 keys and a slope of 1/2). Kernels split distances block by block, where both parts are small.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch.fx import Node

from fxopt.analysis.constants import Constants
from fxopt.analysis.logic import readable
from fxopt.analysis.simplify import simplify
from fxopt.ir.expression import NEG_INF, Expr, J, S, call
from fxopt.ir.nodes import same_size, shape, tensor
from fxopt.passes.attention.positions import Captured, ReadTensor

#: Numbers from here on may stand for −inf, and leave nothing of scores that they are added to.
_LARGE: Final = 1e4
#: Operations that make finite numbers of finite ones.
_TAME: Final = frozenset({
    "const", "symbol", "capture", "add", "sub", "mul", "neg", "abs", "minimum", "maximum", "float", "tanh", "sigmoid",
    "where", "lt", "le", "gt", "ge", "eq", "ne", "and", "or", "not",
})  # fmt: skip
_BY_A_NUMBER: Final = frozenset({"div", "floordiv", "mod"})


@dataclass(frozen=True)
class Reduced:
    """A score without the terms that a softmax does not see, and what the report says of these."""

    score: Expr
    notes: tuple[str, ...] = ()


def without_row_terms(score: Expr, operands: Sequence[Captured], constants: Constants) -> Reduced:
    """Drop what is added to ``score`` and is a finite number for each row.

    Products with factors that are the same for all keys are looked into, and what −inf masks keep; nothing else is, as
    ``tanh(s + t)`` depends on ``t``, and so does the choice between ``s + t`` and a number.
    """
    walk = _Walk(operands, constants)
    found = simplify(walk.reduced(score))
    dropped = ", ".join(map(walk.named, walk.dropped))
    return Reduced(found, (f"dropped, the same for all keys: {dropped}",) if dropped else ())


class _Walk:
    """One way from the logits to the scores."""

    def __init__(self, operands: Sequence[Captured], constants: Constants) -> None:
        self.operands = operands
        self.constants = constants
        self.dropped: list[Expr] = []

    def reduced(self, expr: Expr) -> Expr:
        """``expr`` without what is dropped on the way to the scores."""
        if expr.op in ("add", "sub"):
            return self._sum(expr)
        if expr.op == "neg":
            return call("neg", self.reduced(expr.args[0]))
        if expr.op == "mul":
            return self._product(expr)
        if expr.op == "where" and NEG_INF in expr.args[1:]:
            condition, *choices = expr.args
            return call("where", condition, *(self.reduced(x) if x.reads(S) else x for x in choices))
        return expr

    def _sum(self, expr: Expr) -> Expr:
        first, second = expr.args
        if first.reads(S) == second.reads(S):
            return expr
        if first.reads(S):
            rest = self.reduced(first)
            return rest if self._drops(second) else call(expr.op, rest, second)
        rest = self.reduced(second)
        if not self._drops(first):
            return call(expr.op, first, rest)
        return rest if expr.op == "add" else call("neg", rest)

    def _drops(self, term: Expr) -> bool:
        if not self._is_finite_row(term):
            return False
        self.dropped.append(term)
        return True

    def _product(self, expr: Expr) -> Expr:
        first, second = expr.args
        scores, factor = (second, first) if second.reads(S) else (first, second)
        return call("mul", self.reduced(scores), factor) if self._is_finite_row(factor) else expr

    def _is_finite_row(self, term: Expr) -> bool:
        """Whether ``term`` is the same finite number for all keys of a row."""
        return all(self._is_tame(part) for part in term.walk())

    def _is_tame(self, part: Expr) -> bool:
        if part.op == "const":
            return abs(float(part.value or 0)) < _LARGE
        if part.op == "capture":
            operand = self.operands[int(part.value or 0)]
            return not _varies_by_key(operand) and self._is_finite(operand.node)
        if part.op in _BY_A_NUMBER:
            return part.args[1].op == "const" and bool(part.args[1].value)
        return part.op in _TAME and part not in (S, J)

    def _is_finite(self, node: Node) -> bool:
        if not tensor(node).dtype.is_floating_point:
            return True
        value = self.constants.value(node)
        return isinstance(value, torch.Tensor) and bool((value.abs() < _LARGE).all())

    def named(self, term: Expr) -> str:
        """``term`` as the report prints it: captured tensors by their names in the graph."""
        return re.sub(r"\bc(\d+)\b", lambda m: self.operands[int(m[1])].node.name, readable(term))


def _varies_by_key(operand: Captured) -> bool:
    if isinstance(operand, ReadTensor):
        return "j" in operand.reading.letters
    return any(not same_size(size, 1) for size in shape(operand.node)[-1:])
