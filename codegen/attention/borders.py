"""Whether a mask keeps a block of rows and keys, in part or whole, told from its first and last row and key.

Interval arithmetic (Moore, Interval Analysis, 1966) over the expression: what the mask compares lies between two
integers wherever row and key lie within the block. It may leave a block undecided, and is never wrong:

    some is false  =>  no row keeps any key of the block,        every is true  =>  each row keeps every key of it
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Final

from fxopt.codegen.attention.interval import is_uniform
from fxopt.codegen.expression import simplify
from fxopt.ir.attention import Capture
from fxopt.ir.expression import Expr, I, J, Kind, call, capture, const, kind

_NO, _YES = const(False), const(True)
#: A comparison by ``lt`` or ``le``: which one, and whether its operands change places.
_ORDERED: Final = {"lt": ("lt", False), "le": ("le", False), "gt": ("lt", True), "ge": ("le", True)}


@dataclass(frozen=True, slots=True)
class Decision:
    """Conditions on a block, over the captured tensors that hold one value for all rows and keys, and its `borders`."""

    some: Expr = _YES
    every: Expr = _NO

    @property
    def decides(self) -> bool:
        """Whether there is any block that it tells something of."""
        return (self.some, self.every) != (_YES, _NO)


@dataclass(frozen=True, slots=True)
class _Range:
    """An integer from ``low`` to ``high``, both included."""

    low: Expr
    high: Expr


def borders(captures: int) -> tuple[Expr, Expr, Expr, Expr]:
    """What stands for the first and the last row and key of a block: captures beyond ``captures`` others."""
    first, last, start, end = (capture(captures + n) for n in range(4))
    return first, last, start, end


def decision(mask: Expr, captures: Sequence[Capture]) -> Decision:
    """What the borders of a block tell of ``mask``."""
    found = _Walk(tuple(captures)).truth(mask)
    return Decision(simplify(found.some), simplify(found.every))


@dataclass(frozen=True)
class _Walk:
    captures: tuple[Capture, ...]

    def truth(self, expr: Expr) -> Decision:
        if expr.op in ("and", "or"):
            first, second = (self.truth(part) for part in expr.args)
            joined = _all if expr.op == "and" else _any
            return Decision(joined(first.some, second.some), joined(first.every, second.every))
        if expr.op == "not":
            return _opposite(self.truth(expr.args[0]))
        if self._is_uniform(expr) and self._kind(expr) == "bool":
            return Decision(expr, expr)
        sides = [self.range(part) for part in expr.args]
        if len(sides) != 2 or sides[0] is None or sides[1] is None:
            return Decision()
        return _compared(expr.op, sides[0], sides[1])

    def range(self, expr: Expr) -> _Range | None:
        """Between which integers ``expr`` lies; ``None`` where that is not known."""
        if self._kind(expr) != "int":
            return None
        first, last, start, end = borders(len(self.captures))
        if expr in (I, J):
            return _Range(first, last) if expr == I else _Range(start, end)
        if self._is_uniform(expr):
            return _Range(expr, expr)
        parts = [self.range(part) for part in expr.args]
        known = [part for part in parts if part is not None]
        return _combined(expr, known) if known and len(known) == len(parts) else None

    def _kind(self, expr: Expr) -> Kind:
        return kind(expr, tuple(c.kind for c in self.captures))

    def _is_uniform(self, expr: Expr) -> bool:
        """Whether it is the same for all rows and keys."""
        symbols = {leaf.value for leaf in expr.leaves if leaf.op == "symbol"}
        read = (self.captures[int(leaf.value or 0)] for leaf in expr.leaves if leaf.op == "capture")
        return not symbols & {"i", "j", "s"} and all(map(is_uniform, read))


def _combined(expr: Expr, parts: Sequence[_Range]) -> _Range | None:
    first, second = parts[0], parts[-1]
    match expr.op:
        case "add" | "minimum" | "maximum":
            return _Range(call(expr.op, first.low, second.low), call(expr.op, first.high, second.high))
        case "sub":
            return _Range(call("sub", first.low, second.high), call("sub", first.high, second.low))
        case "neg":
            return _Range(call("neg", first.high), call("neg", first.low))
        case "abs":
            below = call("neg", first.low)
            nearest = call("maximum", call("maximum", first.low, call("neg", first.high)), const(0))
            return _Range(nearest, call("maximum", below, first.high))
    return _scaled(expr.op, first, second)


def _scaled(op: str, first: _Range, second: _Range) -> _Range | None:
    """Products, quotients and remainders by a constant."""
    if op == "mul" and first.low.op == "const":
        first, second = second, first
    n = second.low.value
    if second.low != second.high or second.low.op != "const" or type(n) is not int:
        return None
    low, high = (call(op, side, const(n)) for side in (first.low, first.high))
    if op == "mul":
        return _Range(low, high) if n >= 0 else _Range(high, low)
    if op == "floordiv" and n > 0:
        return _Range(low, high)
    if op != "mod" or n < 1:
        return None
    turns = (call("floordiv", side, const(n)) for side in (first.low, first.high))
    within = call("eq", *turns)
    return _Range(call("where", within, low, const(0)), call("where", within, high, const(n - 1)))


def _compared(op: str, left: _Range, right: _Range) -> Decision:
    if op in ("eq", "ne"):
        equal = _equal(left, right)
        return equal if op == "eq" else _opposite(equal)
    if op not in _ORDERED:
        return Decision()
    ordered, flipped = _ORDERED[op]
    low, high = (right, left) if flipped else (left, right)
    return Decision(call(ordered, low.low, high.high), call(ordered, low.high, high.low))


def _equal(first: _Range, second: _Range) -> Decision:
    met = call("and", call("le", first.low, second.high), call("le", second.low, first.high))
    same = call("and", call("eq", first.low, second.high), call("eq", first.high, second.low))
    return Decision(met, same)


def _opposite(found: Decision) -> Decision:
    return Decision(_negated(found.every), _negated(found.some))


def _negated(expr: Expr) -> Expr:
    return {_YES: _NO, _NO: _YES}.get(expr) or call("not", expr)


def _all(first: Expr, second: Expr) -> Expr:
    return _joined("and", _YES, _NO, first, second)


def _any(first: Expr, second: Expr) -> Expr:
    return _joined("or", _NO, _YES, first, second)


def _joined(op: str, neutral: Expr, absorbing: Expr, *parts: Expr) -> Expr:
    if absorbing in parts:
        return absorbing
    return reduce(lambda a, b: call(op, a, b), [part for part in parts if part != neutral] or [neutral])
