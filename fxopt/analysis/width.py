"""How wide integers grow: kernels compute with 32 bits, where the graph that an expression was read from has 64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch

from fxopt.analysis.domain import Domain
from fxopt.analysis.linear import LARGEST, LONGEST
from fxopt.ir.expression import ARITY, Expr, Kind, kind

_FREE: Final = (-math.inf, math.inf)
_COUNTS: Final = frozenset({"add", "sub", "mul", "neg", "abs", "minimum", "maximum", "floordiv", "mod"})
_COMPARES: Final = frozenset({"lt", "le", "gt", "ge", "eq", "ne"})
_TRUTH: Final = _COMPARES | {"and", "or", "not"}
#: What every integer dtype holds.
_SMALL: Final = range(128)

Reach = tuple[float, float]


def may_overflow(expr: Expr, domain: Domain, captures: Sequence[torch.dtype]) -> bool:
    """Whether an integer on the way may leave 32 bits.

    Captured integers of 32 bits and more are ids or positions of the user's: they may be added to one another and
    compared, but what a product of them reaches isn't known.
    """
    return _Width(domain, captures).overflows(expr)


def is_counted(expr: Expr, index: int, captures: Sequence[torch.dtype]) -> bool:
    """Whether integers are made of capture ``index``, or it is compared with what its own dtype may not hold."""
    kinds = tuple(map(_kind, captures))
    return any(_counts(e, kinds, captures) and any(a.op == "capture" and a.value == index for a in e.args)
               for e in expr.walk())  # fmt: skip


def _counts(expr: Expr, kinds: tuple[Kind, ...], captures: Sequence[torch.dtype]) -> bool:
    if expr.op in _COUNTS:
        return kind(expr, kinds) == "int"
    if expr.op not in _COMPARES:
        return False
    dtypes = {captures[int(a.value or 0)] for a in expr.args if a.op == "capture"}
    small = all(a.op == "capture" or (a.op == "const" and a.value in _SMALL) for a in expr.args)
    return not small or len(dtypes) > 1


def _kind(dtype: torch.dtype) -> Kind:
    return "bool" if dtype is torch.bool else "float" if dtype.is_floating_point else "int"


class _Width:
    """One expression's integers, each seen once."""

    def __init__(self, domain: Domain, captures: Sequence[torch.dtype]) -> None:
        self.domain, self.captures = domain, captures
        self.kinds = tuple(map(_kind, captures))
        self.known: dict[Expr, Reach] = {}

    def overflows(self, expr: Expr) -> bool:
        for part in expr.walk():
            if kind(part, self.kinds) == "float":
                continue
            reach = self.known[part] = self._reach(part)
            if reach != _FREE and max(-reach[0], reach[1]) > LARGEST:
                return True
        return False

    def _reach(self, expr: Expr) -> Reach:
        """What an integer lies between, not knowing where others beside it are."""
        if expr.op not in ARITY or expr.op in _TRUTH:
            return self._leaf(expr)
        parts = [self.known.get(a, _FREE) for a in expr.args[expr.op == "where" :]]
        if any(math.isinf(end) for part in parts for end in part):
            return self._of_free(expr, parts)
        if expr.op == "mul":
            ends = [a * b for a in parts[0] for b in parts[1]]
        elif expr.op == "add":
            ends = [parts[0][0] + parts[1][0], parts[0][1] + parts[1][1]]
        elif expr.op == "sub":
            ends = [parts[0][0] - parts[1][1], parts[0][1] - parts[1][0]]
        else:
            widest = max(abs(end) for part in parts for end in part)
            ends = [-widest, widest]
        return min(ends), max(ends)

    def _of_free(self, expr: Expr, parts: Sequence[Reach]) -> Reach:
        keeps = expr.op != "mul" or any(low >= -1 and high <= 1 for low, high in parts)
        return _FREE if keeps else (0, math.inf)

    def _leaf(self, expr: Expr) -> Reach:
        if expr.op == "const":
            return float(expr.value or 0), float(expr.value or 0)
        if expr.op == "capture":
            dtype = self.captures[int(expr.value or 0)]
            if dtype is torch.bool:
                return 0, 1
            ends = torch.iinfo(dtype)
            return (ends.min, ends.max) if ends.bits < 32 else _FREE
        if expr.op != "symbol":
            return 0, 1
        name = str(expr.value)
        size = self.domain.extent(name) if name in "bhij" else {"Sq": self.domain.rows, "Sk": self.domain.columns}[name]
        return 0, size if isinstance(size, int) else LONGEST
