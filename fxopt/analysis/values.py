"""Element values: conversions between dtypes, and arithmetic on values that are one of two constants.

    float(m) -> where(m, 1.0, 0.0)         f(where(m, a, b), c) -> where(m, f(a, c), f(b, c))

so that masks written as arithmetic, ``(1 - mask) * lowest``, are seen to be masks.

An expression stands for integers without bounds and whole reals without rounding; dtypes have both. `holds` tells where
that makes no difference. What it does not hold for is no expression: a value that wraps around or is rounded on the
way proves nothing.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, Final

import torch

from fxopt.analysis.linear import Bounds, as_expr, as_sum
from fxopt.analysis.simplify import simplify
from fxopt.ir.expression import Expr, Scalar, call, const

_COMPUTE: Final[dict[str, Callable[..., Any]]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv, "neg": operator.neg,
    "minimum": min, "maximum": max, "abs": abs, "floordiv": operator.floordiv, "mod": operator.mod,
    "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge, "eq": operator.eq, "ne": operator.ne,
}  # fmt: skip
#: Largest integers that floating dtypes hold exactly.
EXACT: Final = {torch.float64: 2**53, torch.float32: 2**24, torch.bfloat16: 2**8, torch.float16: 2**11}
COMPARISONS: Final = frozenset({"lt", "le", "gt", "ge", "eq", "ne"})


def is_two_valued(expr: Expr) -> bool:
    """Whether the value is one of two constants."""
    return expr.op == "where" and expr.args[1].op == expr.args[2].op == "const"


def apply(op: str, args: tuple[Expr, ...], dtype: torch.dtype) -> Expr:
    """``op`` on element values; constants and two-valued operands are computed, in ``dtype``."""
    if all(a.op == "const" for a in args):
        return _computed(op, args, dtype)
    chosen = [a for a in args if is_two_valued(a)]
    conditions = {a.args[0] for a in chosen}
    if len(conditions) == 1 and all(a.op == "const" or is_two_valued(a) for a in args):
        (condition,) = conditions
        branches = (apply(op, tuple(a.args[n] if is_two_valued(a) else a for a in args), dtype) for n in (1, 2))
        return choose(condition, *branches)
    whole = _on_positions(op, args) if dtype.is_floating_point else None
    if whole is not None:
        return whole
    result = simplify(call(op, *args)) if op not in COMPARISONS else call(op, *args)
    # ``x / 7 * 7`` is rounded twice: its factors cancel, but it isn't whole.
    return call(op, *args) if result.op == "float" and result not in args else result


def holds(dtype: torch.dtype, expr: Expr, bounds: Bounds) -> bool:
    """Whether a tensor of ``dtype`` holds what ``expr`` says: integers that don't wrap around, whole reals unrounded.

    Integers that may be as large as their dtype holds because captured ones are, wrap around in kernels as they do in
    the graph; a real made of them must be known to be exact only where half precision rounds small numbers too.
    """
    if expr.op == "where":
        return all(holds(dtype, branch, bounds) for branch in expr.args[1:])
    if expr.op in ("const", "capture") or dtype is torch.bool:
        return True
    if dtype.is_floating_point:
        captured = any(leaf.op == "capture" for leaf in expr.leaves)
        return expr.op != "float" or (captured and dtype.itemsize > 2) or _is_exact(expr.args[0], dtype, bounds)
    low, high = bounds.between(expr)
    kept = torch.iinfo(dtype)
    return (math.isinf(low) or low >= kept.min) and (math.isinf(high) or high <= kept.max)


def is_unrounded(expr: Expr) -> bool:
    """Whether a real is what its leaves are: nothing was computed that a dtype could round."""
    if expr.op in ("const", "capture", "float"):
        return True
    operands = {"where": expr.args[1:], "minimum": expr.args, "maximum": expr.args, "neg": expr.args, "abs": expr.args}
    return expr.op in operands and all(is_unrounded(a) for a in operands[expr.op])


def is_coarser(dtype: torch.dtype, than: torch.dtype) -> bool:
    """Whether reals of ``dtype`` have fewer digits."""
    return dtype.is_floating_point and EXACT.get(dtype, 0) < EXACT.get(than, 0)


def _is_exact(expr: Expr, dtype: torch.dtype, bounds: Bounds, margin: int = 0) -> bool:
    """Whether the floating ``dtype`` holds every value of an integer expression, and the ``margin`` next to it."""
    low, high = bounds.between(expr)
    return max(-low, high) + margin <= EXACT.get(dtype, 0)


def _on_positions(op: str, args: tuple[Expr, ...]) -> Expr | None:
    """``float(x) ± float(y) -> float(x ± y)`` for positions, where the dtype `holds` the result."""
    if op not in ("add", "sub", "mul", "neg"):
        return None
    whole = [_whole(a) for a in args]
    if None in whole or any(e.op == "capture" for a in args for e in a.walk()):
        return None
    return call("float", as_expr(as_sum(call(op, *whole))))  # type: ignore[arg-type]


def choose(condition: Expr, kept: Expr, otherwise: Expr) -> Expr:
    """``where(condition, kept, otherwise)``; of truth values a formula."""
    if condition.op == "const":
        return kept if condition.value else otherwise
    if kept == otherwise and type(kept.value) is type(otherwise.value):
        return kept
    if kept == const(True) and isinstance(kept.value, bool) and otherwise.value is False:
        return condition
    if kept.value is False and otherwise.value is True:
        return call("not", condition)
    return call("where", condition, kept, otherwise)


def _computed(op: str, args: tuple[Expr, ...], dtype: torch.dtype) -> Expr:
    try:
        value = _COMPUTE[op](*(a.value for a in args))
    except (ZeroDivisionError, OverflowError):
        return call(op, *args)
    return const(value) if op in COMPARISONS else rounded(value, dtype)


def rounded(value: Scalar, dtype: torch.dtype) -> Expr:
    """A number as ``dtype`` holds it."""
    if dtype is torch.bool:
        return const(bool(value))
    if not dtype.is_floating_point:
        lowest = torch.iinfo(dtype).min
        return const((int(value) - lowest) % 2 ** torch.iinfo(dtype).bits + lowest)
    # Adding 0 takes the sign off a zero, which nothing here tells apart.
    return const(float(torch.tensor(value, dtype=torch.float64).to(dtype)) + 0.0)


def converted(expr: Expr, before: torch.dtype, after: torch.dtype, bounds: Bounds) -> Expr | None:
    """A value of dtype ``before`` in dtype ``after``; ``None`` where the result can't be said exactly."""
    found = _converted(expr, before, after, bounds)
    return found if found is not None and holds(after, found, bounds) else None


def _converted(expr: Expr, before: torch.dtype, after: torch.dtype, bounds: Bounds) -> Expr | None:
    if expr.op == "const":
        value = expr.value
        assert isinstance(value, bool | int | float)
        whole = after.is_floating_point or after is torch.bool or abs(value) < 2**53
        return rounded(value, after) if whole and (before is after or not _is_ambiguous(value, after)) else None
    if is_two_valued(expr):
        kept, otherwise = (converted(a, before, after, bounds) for a in expr.args[1:])
        return None if kept is None or otherwise is None else choose(expr.args[0], kept, otherwise)
    if after is torch.bool:
        return expr if before is torch.bool else _truth(expr, before)
    if before is torch.bool:
        return call("where", expr, rounded(1, after), rounded(0, after))
    if after.is_floating_point:
        return _as_real(expr, before, after) if before.is_floating_point else call("float", expr)
    if before.is_floating_point:
        return expr.args[0] if expr.op == "float" and _is_exact(expr.args[0], before, bounds) else None
    narrowed = after.itemsize < before.itemsize and any(leaf.op == "capture" for leaf in expr.leaves)
    return expr if after in (torch.int32, torch.int64) and not narrowed else None


def _is_ambiguous(value: Scalar, dtype: torch.dtype) -> bool:
    """Whether a number among the whole ones of half precision would be rounded: some devices and operators compute with
    it as it is.
    """
    limit = 2 * EXACT.get(dtype, 0) if dtype.itemsize <= 2 else 0
    return float(value).is_integer() and abs(value) <= limit and rounded(value, dtype) != const(value)


def _as_real(expr: Expr, before: torch.dtype, after: torch.dtype) -> Expr | None:
    """A real in another precision: a captured number loses digits where it is narrowed, and what was computed in fewer
    digits than the rest is, was rounded.
    """
    if is_coarser(after, before):
        return None if expr.op == "capture" else expr
    return None if is_coarser(before, after) and not is_unrounded(expr) else expr


def _truth(expr: Expr, dtype: torch.dtype) -> Expr | None:
    if dtype.is_floating_point:
        return call("ne", expr, const(0.0)) if expr.op == "capture" else _difference_counts(expr, dtype)
    return call("ne", expr, const(0))


def _difference_counts(expr: Expr, dtype: torch.dtype) -> Expr | None:
    """``x - y != 0`` is ``x != y`` in floating point too, for integers of which one is small."""
    sides = [_whole(a) for a in expr.args] if expr.op == "sub" else []
    small = [s for s in sides if s is not None and s.op == "const" and abs(int(s.value or 0)) < EXACT[dtype]]
    return call("ne", *sides) if len(small) == 1 and None not in sides else None  # type: ignore[arg-type]


def known_here(expr: Expr, condition: Expr, holds: bool) -> Expr:
    """``expr`` where ``condition`` holds or doesn't: ``x`` is ``n`` where ``x == n``."""
    if condition.op != ("eq" if holds else "ne") or condition.args[1].op != "const":
        return expr
    unknown, number = condition.args
    return simplify(expr.replace(lambda e: number if e == unknown else e))


def compared(op: str, left: Expr, right: Expr, dtype: torch.dtype, bounds: Bounds) -> Expr | None:
    """A comparison of two values of ``dtype``; ``None`` where rounding could decide it.

    Rounding keeps order, so it is enough that one side, and the numbers next to it, are exact; or that both sides are.
    """
    result = apply(op, (left, right), dtype)
    if result.args != (left, right) or not dtype.is_floating_point:
        return result
    if {left.op, right.op} <= {"capture", "const"}:
        return result
    first, second = (_whole(a) for a in (left, right))
    if first is None or second is None:
        return None
    one = any(_is_exact(a, dtype, bounds, 1) for a in (first, second))
    return call(op, first, second) if one or all(_is_exact(a, dtype, bounds) for a in (first, second)) else None


def _whole(expr: Expr) -> Expr | None:
    """The integer that a real value is known to be."""
    if expr.op == "float":
        return expr.args[0]
    if expr.op == "const" and isinstance(expr.value, float) and expr.value.is_integer():
        return const(int(expr.value))
    return None
