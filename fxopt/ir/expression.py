"""Scalar expressions: what an attention site does to one score, as data.

An `Expr` is an immutable tree over one element of the score tensor. Its leaves are constants, the raw
dot product ``s = q·k`` (accumulated in float32), the position ``b, h, i, j`` (batch, query head, query row, key
column), the lengths ``Sq, Sk`` and captured tensors ``c0, c1, …`` read at that position. Its printed form is a
Python expression, which `parse` reads back; nothing is ever evaluated as Python.

    >>> str(parse("where(j <= i, s * 0.125 + c0, -inf)"))
    'where((j <= i), ((s * 0.125) + c0), -inf)'
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Literal

from fxopt.errors import ExpressionError

Kind = Literal["float", "int", "bool"]
Scalar = bool | int | float

#: Every operation an expression may hold, with its number of operands. The meaning of each (PyTorch, Triton,
#: derivative) stands in one table in `fxopt.codegen.expression`.
ARITY: Final[dict[str, int]] = {
    "add": 2, "sub": 2, "mul": 2, "div": 2, "floordiv": 2, "mod": 2, "minimum": 2, "maximum": 2, "pow": 2,
    "neg": 1, "abs": 1, "exp": 1, "log": 1, "tanh": 1, "sigmoid": 1, "sqrt": 1, "rsqrt": 1, "float": 1,
    "lt": 2, "le": 2, "gt": 2, "ge": 2, "eq": 2, "ne": 2, "and": 2, "or": 2, "not": 1, "where": 3,
}  # fmt: skip
SYMBOLS: Final[dict[str, Kind]] = {
    "s": "float", "b": "int", "h": "int", "i": "int", "j": "int", "Sq": "int", "Sk": "int",
}  # fmt: skip

_INFIX: Final[dict[str, str]] = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "floordiv": "//", "mod": "%", "pow": "**",
    "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!=", "and": "&", "or": "|",
}  # fmt: skip
_PREFIX: Final[dict[str, str]] = {"neg": "-", "not": "~"}
_BOOLEAN: Final[frozenset[str]] = frozenset({"lt", "le", "gt", "ge", "eq", "ne", "and", "or", "not"})
_REAL: Final[frozenset[str]] = frozenset({"div", "exp", "log", "tanh", "sigmoid", "sqrt", "rsqrt", "float"})


class _Remembered:
    """Room for what an `Expr` is asked for again and again; unset until then."""

    __slots__ = ("_hash", "_leaves", "_text")

    _hash: int
    _leaves: frozenset[Expr]
    _text: str


@dataclass(frozen=True, slots=True)
class Expr(_Remembered):
    """One node of an expression tree.

    ``op`` is a key of `ARITY`, or ``"const"`` (``value`` a number), ``"symbol"`` (``value`` a key of `SYMBOLS`) or
    ``"capture"`` (``value`` the index of the captured tensor).

    Constants that Python holds equal are equal (``1``, ``1.0`` and ``True``); the printed form tells them apart.
    """

    op: str
    args: tuple[Expr, ...] = ()
    value: Scalar | str | None = None

    def __hash__(self) -> int:
        try:
            return self._hash
        except AttributeError:
            object.__setattr__(self, "_hash", hash((self.op, self.args, self.value)))
            return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Expr):
            return NotImplemented
        alike = hash(self) == hash(other) and self.op == other.op and self.value == other.value
        return alike and self.args == other.args

    def __str__(self) -> str:
        try:
            return self._text
        except AttributeError:
            object.__setattr__(self, "_text", self._print())
            return self._text

    @property
    def leaves(self) -> frozenset[Expr]:
        """The symbols and captures that occur in the tree."""
        try:
            return self._leaves
        except AttributeError:
            own = {self} if self.op in ("symbol", "capture") else set()
            object.__setattr__(self, "_leaves", frozenset(own).union(*(a.leaves for a in self.args)))
            return self._leaves

    def _print(self) -> str:
        if self.op == "const":
            return repr(self.value)
        if self.op == "symbol":
            return str(self.value)
        if self.op == "capture":
            return f"c{self.value}"
        operands = [str(a) for a in self.args]
        if self.op in _INFIX:
            return f"({operands[0]} {_INFIX[self.op]} {operands[1]})"
        if self.op in _PREFIX:
            return f"({_PREFIX[self.op]}{operands[0]})"
        return f"{self.op}({', '.join(operands)})"

    def walk(self) -> Iterator[Expr]:
        """Every node of the tree, operands before the node that reads them."""
        for arg in self.args:
            yield from arg.walk()
        yield self

    def reads(self, leaf: Expr) -> bool:
        """Whether the symbol or capture ``leaf`` occurs in the tree."""
        return leaf in self.leaves

    def replace(self, change: Callable[[Expr], Expr]) -> Expr:
        """The tree rebuilt bottom-up, every node passed through ``change``, which must depend on nothing else."""
        done: dict[int, Expr] = {}

        def rebuilt(expr: Expr) -> Expr:
            known = done.get(id(expr))
            if known is None:
                args = tuple(rebuilt(a) for a in expr.args)
                same = all(new is old for new, old in zip(args, expr.args, strict=True))
                known = done[id(expr)] = change(expr if same else Expr(expr.op, args, expr.value))
            return known

        return rebuilt(self)

    def put(self, leaf: Expr, value: Expr) -> Expr:
        """The tree with ``value`` in the place of the symbol or capture ``leaf``."""
        if leaf not in self.leaves:
            return self
        return value if self == leaf else Expr(self.op, tuple(a.put(leaf, value) for a in self.args), self.value)


def const(value: Scalar) -> Expr:
    """A literal number."""
    return Expr("const", value=value)


def symbol(name: str) -> Expr:
    """One of `SYMBOLS`."""
    if name not in SYMBOLS:
        raise ExpressionError(f"unknown symbol {name!r}; the symbols are {', '.join(SYMBOLS)}")
    return Expr("symbol", value=name)


def capture(index: int) -> Expr:
    """Element ``[b, h, i, j]`` of the ``index``-th captured tensor, broadcast as its `Capture` says."""
    return Expr("capture", value=index)


def call(op: str, *args: Expr) -> Expr:
    """Apply an operation of `ARITY`; raises `ExpressionError` when the name or the number of operands is wrong."""
    if ARITY.get(op) != len(args):
        raise ExpressionError(f"{op!r} with {len(args)} operands is not an operation of the expression language")
    return Expr(op, args)


S: Final = symbol("s")
I: Final = symbol("i")  # noqa: E741 - the query row, as in the formulas
J: Final = symbol("j")
NEG_INF: Final = const(-math.inf)


def kind(expr: Expr, captures: tuple[Kind, ...] = ()) -> Kind:
    """Whether the expression is boolean, integer or real; ``captures`` gives the kinds of the captured tensors."""
    if expr.op == "const":
        value = expr.value
        return "bool" if isinstance(value, bool) else "int" if isinstance(value, int) else "float"
    if expr.op == "symbol":
        return SYMBOLS[str(expr.value)]
    if expr.op == "capture":
        index = int(expr.value or 0)
        return captures[index] if index < len(captures) else "float"
    if expr.op in _BOOLEAN:
        return "bool"
    if expr.op in _REAL:
        return "float"
    operands = expr.args[1:] if expr.op == "where" else expr.args
    kinds = {kind(a, captures) for a in operands}
    return "float" if "float" in kinds else "int"


def conjuncts(mask: Expr | None) -> tuple[Expr, ...]:
    """The terms of a conjunction: ``a & b & c`` gives ``(a, b, c)``; ``None`` (everything kept) gives ``()``."""
    if mask is None:
        return ()
    if mask.op == "and":
        return conjuncts(mask.args[0]) + conjuncts(mask.args[1])
    return (mask,)


def conjunction(terms: tuple[Expr, ...]) -> Expr | None:
    """The inverse of `conjuncts`, each term once."""
    result: Expr | None = None
    for term in dict.fromkeys(terms):
        result = term if result is None else call("and", result, term)
    return result


def parse(text: str) -> Expr:
    """Read the printed form of an expression.

    Raises:
        ExpressionError: the text is not an expression of this language (it is never executed).
    """
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ExpressionError(f"not an expression: {text!r} ({error})") from error
    return _read(tree)


_BINARY: Final[dict[type[ast.AST], str]] = {
    ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "div", ast.FloorDiv: "floordiv", ast.Mod: "mod",
    ast.Pow: "pow", ast.BitAnd: "and", ast.BitOr: "or", ast.Lt: "lt", ast.LtE: "le", ast.Gt: "gt", ast.GtE: "ge",
    ast.Eq: "eq", ast.NotEq: "ne", ast.USub: "neg", ast.Invert: "not",
}  # fmt: skip
_NAMED: Final[dict[str, float]] = {"inf": math.inf, "nan": math.nan}


def _read(node: ast.expr) -> Expr:
    leaf = _read_leaf(node)
    if leaf is not None:
        return leaf
    match node:
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return call(_BINARY[type(op)], _read(left), _read(right))
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _BINARY:
            return call(_BINARY[type(op)], _read(operand))
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _BINARY:
            return call(_BINARY[type(op)], _read(left), _read(right))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]):
            return call(name, *(_read(a) for a in args))
    raise ExpressionError(f"not part of the expression language: {ast.unparse(node)!r}")


def _read_leaf(node: ast.expr) -> Expr | None:
    """A number, symbol or capture; a negative number is one leaf."""
    match node:
        case ast.Constant(value=bool() | int() | float() as value):
            return const(value)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return const(-value)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Name(id=name)) if name in _NAMED:
            return const(-_NAMED[name])
        case ast.Name(id=name):
            return _read_name(name)
    return None


def _read_name(name: str) -> Expr | None:
    if name in _NAMED:
        return const(_NAMED[name])
    if name[0] == "c" and name[1:].isdecimal():
        return capture(int(name[1:]))
    return symbol(name)
