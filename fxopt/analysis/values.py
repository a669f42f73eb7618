"""Element values: conversions between dtypes, and arithmetic on values that are one of two constants.

    float(m) -> where(m, 1.0, 0.0)         f(where(m, a, b), c) -> where(m, f(a, c), f(b, c))

so that masks written as arithmetic, ``(1 - mask) * lowest``, are seen to be masks.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Final

import torch

from fxopt.analysis.linear import as_expr, as_sum
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
    return simplify(call(op, *args)) if op not in COMPARISONS else call(op, *args)


def _on_positions(op: str, args: tuple[Expr, ...]) -> Expr | None:
    """``float(x) ± float(y) -> float(x ± y)`` for positions, which are far from where reals stop being whole."""
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


def converted(expr: Expr, before: torch.dtype, after: torch.dtype) -> Expr | None:
    """A value of dtype ``before`` in dtype ``after``; ``None`` where the result can't be said exactly."""
    if expr.op == "const":
        value = expr.value
        assert isinstance(value, bool | int | float)
        whole = after.is_floating_point or after is torch.bool or abs(value) < 2**53
        return rounded(value, after) if whole else None
    if is_two_valued(expr):
        kept, otherwise = (converted(a, before, after) for a in expr.args[1:])
        return None if kept is None or otherwise is None else choose(expr.args[0], kept, otherwise)
    if after is torch.bool:
        return expr if before is torch.bool else _truth(expr, before)
    if before is torch.bool:
        return call("where", expr, rounded(1, after), rounded(0, after))
    if after.is_floating_point:
        return expr if before.is_floating_point else call("float", expr)
    if before.is_floating_point:
        return expr.args[0] if expr.op == "float" and before in (torch.float32, torch.float64) else None
    return expr if after in (torch.int32, torch.int64) else None


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


def compared(op: str, left: Expr, right: Expr, dtype: torch.dtype) -> Expr | None:
    """A comparison of two values of ``dtype``; ``None`` where rounding could decide it."""
    result = apply(op, (left, right), dtype)
    if result.args != (left, right) or not dtype.is_floating_point:
        return result
    if {left.op, right.op} <= {"capture", "const"}:
        return result
    whole = [_whole(a) for a in (left, right)]
    if dtype not in (torch.float32, torch.float64) or whole[0] is None or whole[1] is None:
        return None
    return call(op, whole[0], whole[1])


def _whole(expr: Expr) -> Expr | None:
    """The integer that a real value is known to be."""
    if expr.op == "float":
        return expr.args[0]
    if expr.op == "const" and isinstance(expr.value, float) and expr.value.is_integer():
        return const(int(expr.value))
    return None
