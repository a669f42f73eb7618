"""What every operation of the expression language means: in PyTorch, in Triton and under differentiation.

`RULES` is the only place that knows. `evaluate` computes an expression on tensors, `gradient` differentiates it
symbolically, and `fxopt.codegen.printing` prints it for a Triton kernel.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch

from fxopt.errors import ExpressionError
from fxopt.ir.expression import ARITY, Expr, call, const, parse

#: What a rule wants of its operands. ``number``: truth values count as integers. ``alike``: in Triton integers become
#: real beside real operands as well. ``quotient``: integer tensors become
#: real as well. ``real``: tensors of the computing dtype. ``tensor``: plain numbers become tensors, kinds are kept.
#: ``truth``: boolean tensors. ``any``: as they come.
Operands = Literal["number", "alike", "quotient", "real", "tensor", "truth", "any"]


@dataclass(frozen=True, slots=True)
class Rule:
    """One operation.

    Attributes:
        torch: its function on tensors (and on plain numbers, for ``number``, ``quotient`` and ``any`` operands).
        triton: its Triton text over the operands ``{0}, {1}, {2}``.
        derivative: its differential, an expression over the operands ``x, y, z`` and their differentials
            ``dx, dy, dz``.
        operands: what it wants of its operands.
        integer: its Triton text where all operands are integers and that differs.
    """

    torch: Callable[..., Any]
    triton: str
    derivative: str = "0.0"
    operands: Operands = "number"
    integer: str | None = None


_MINIMUM: Final = "tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)"
_MAXIMUM: Final = "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)"
_INT_POWER: Final = "tl.floor(power({0}.to(tl.float32), {1}.to(tl.float32)) + 0.5).to(tl.int32)"
_POWER_SLOPE: Final = "where(dx == 0.0, 0.0, dx * y * x ** (y - 1)) + where(dy == 0.0, 0.0, dy * x ** y * log(x))"

RULES: Final[dict[str, Rule]] = {
    "add": Rule(operator.add, "({0} + {1})", "dx + dy"),
    "sub": Rule(operator.sub, "({0} - {1})", "dx - dy"),
    "mul": Rule(operator.mul, "({0} * {1})", "dx * y + x * dy"),
    "div": Rule(operator.truediv, "({0} / {1})", "(dx - dy * (x / y)) / y", "quotient"),
    "floordiv": Rule(operator.floordiv, "tl.floor({0} / {1})", integer="floor_divide({0}, {1})"),
    "mod": Rule(operator.mod, "({0} - tl.floor({0} / {1}) * {1})", "dx - dy * (x // y)", integer="modulo({0}, {1})"),
    "minimum": Rule(
        torch.minimum, _MINIMUM, "where(x < y, dx, where(x == y, 0.5 * (dx + dy), dy))", "tensor",
        "tl.minimum({0}, {1})",
    ),
    "maximum": Rule(
        torch.maximum, _MAXIMUM, "where(x > y, dx, where(x == y, 0.5 * (dx + dy), dy))", "tensor",
        "tl.maximum({0}, {1})",
    ),
    "pow": Rule(operator.pow, "power({0}, {1})", _POWER_SLOPE, "alike", _INT_POWER),
    "neg": Rule(operator.neg, "(-{0})", "-dx"),
    "abs": Rule(operator.abs, "tl.abs({0})", "where(x > 0, dx, where(x < 0, -dx, 0.0))"),
    "exp": Rule(torch.exp, "tl.exp({0})", "dx * exp(x)", "real"),
    "log": Rule(torch.log, "tl.log({0})", "dx / x", "real"),
    "tanh": Rule(torch.tanh, "tanh({0}, FAST_TANH)", "dx * (1.0 - tanh(x) * tanh(x))", "real"),
    "sigmoid": Rule(torch.sigmoid, "tl.sigmoid({0})", "dx * (sigmoid(x) * (1.0 - sigmoid(x)))", "real"),
    "sqrt": Rule(torch.sqrt, "tl.sqrt_rn({0})", "dx / (2.0 * sqrt(x))", "real"),
    "rsqrt": Rule(torch.rsqrt, "tl.rsqrt({0})", "dx * (-0.5 * rsqrt(x) / x)", "real"),
    "float": Rule(torch.clone, "{0}", "dx", "real"),
    "lt": Rule(operator.lt, "({0} < {1})", operands="any"),
    "le": Rule(operator.le, "({0} <= {1})", operands="any"),
    "gt": Rule(operator.gt, "({0} > {1})", operands="any"),
    "ge": Rule(operator.ge, "({0} >= {1})", operands="any"),
    "eq": Rule(operator.eq, "({0} == {1})", operands="any"),
    "ne": Rule(operator.ne, "({0} != {1})", operands="any"),
    "and": Rule(torch.logical_and, "({0} & {1})", operands="truth"),
    "or": Rule(torch.logical_or, "({0} | {1})", operands="truth"),
    "not": Rule(torch.logical_not, "({0} == 0)", operands="truth"),
    "where": Rule(torch.where, "tl.where({0}, {1}, {2})", "where(x, dy, dz)", "tensor"),
}  # fmt: skip

_OPERANDS: Final = ("x", "y", "z", "dx", "dy", "dz")


def _read_derivative(text: str) -> Expr:
    return parse(re.sub(r"\bd?[xyz]\b", lambda name: f"c{_OPERANDS.index(name[0])}", text))


_DERIVATIVES: Final[dict[str, Expr]] = {op: _read_derivative(rule.derivative) for op, rule in RULES.items()}
assert RULES.keys() == ARITY.keys()


def evaluate(expr: Expr, env: Mapping[str, Any], captures: Sequence[torch.Tensor] = ()) -> Any:
    """Compute ``expr`` on tensors, with broadcasting.

    Args:
        expr: the expression.
        env: the value of every symbol it reads: a tensor, or a plain (possibly symbolic) number.
        captures: the captured tensors, already laid out so that they broadcast with the symbols.

    Returns:
        A tensor, or a plain number where no tensor takes part. Real values have the dtype of ``env["s"]`` (else of the
        first real tensor, else float64): integers become real in that dtype, not in torch's default.
    """
    tensors = [x for x in (*env.values(), *captures) if isinstance(x, torch.Tensor)]
    dtype = next((x.dtype for x in tensors if x.is_floating_point()), torch.float64)
    device = tensors[0].device if tensors else torch.device("cpu")
    return _Evaluation(env, captures, dtype, device).visit(expr)


class _Evaluation:
    """One run of `evaluate`: equal subexpressions are computed once."""

    def __init__(
        self, env: Mapping[str, Any], captures: Sequence[torch.Tensor], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.env, self.captures, self.dtype, self.device = env, captures, dtype, device
        self.known: dict[Expr, Any] = {}

    def visit(self, expr: Expr) -> Any:
        if expr not in self.known:
            self.known[expr] = self._compute(expr)
        return self.known[expr]

    def _compute(self, expr: Expr) -> Any:
        if expr.op == "const":
            return expr.value
        if expr.op == "symbol":
            return self.env[str(expr.value)]
        if expr.op == "capture":
            return self.captures[int(expr.value or 0)]
        rule = RULES[expr.op]
        return rule.torch(*(self._prepare(self.visit(a), rule.operands) for a in expr.args))

    def _prepare(self, value: Any, wanted: Operands) -> Any:
        if wanted == "any":
            return value
        if not isinstance(value, torch.Tensor):
            return self._number(value, wanted)
        if wanted in ("number", "alike"):
            return value.long() if value.dtype is torch.bool else value
        if wanted in ("real", "quotient"):
            return value.to(self.dtype)
        return value

    def _number(self, value: Any, wanted: Operands) -> Any:
        if wanted in ("number", "alike", "quotient"):
            return int(value) if isinstance(value, bool) else value
        whole = torch.bool if isinstance(value, (bool, torch.SymBool)) else torch.int64
        real = wanted == "real" or isinstance(value, (float, torch.SymFloat))
        return torch.full((), value, dtype=self.dtype if real else whole, device=self.device)


def gradient(expr: Expr, leaf: Expr) -> Expr:
    """The derivative of ``expr`` with respect to ``leaf`` (``s`` or a capture), as an expression.

    Ties of ``minimum`` and ``maximum`` are halved and ``abs`` has slope 0 at 0, as in PyTorch's autograd. Everything
    that is constant is folded away, so a linear score differentiates to a constant.
    """
    if expr == leaf:
        return const(1.0)
    slopes = [gradient(a, leaf) for a in expr.args]
    if all(_is_number(d, 0) for d in slopes):
        return const(0.0)
    values = dict(zip((f"c{n}" for n in range(6)), (*_padded(expr.args), *_padded(slopes)), strict=True))

    def substitute(node: Expr) -> Expr:
        return values[str(node)] if node.op == "capture" else _simplify(node)

    if expr.op not in _DERIVATIVES:
        raise ExpressionError(f"{expr.op!r} has no derivative rule")
    return _DERIVATIVES[expr.op].replace(substitute)


def _padded(args: Sequence[Expr]) -> tuple[Expr, ...]:
    return (*args, *(const(0.0),) * (3 - len(args)))


def simplify(expr: Expr) -> Expr:
    """``expr`` with constants folded and ``x + 0``, ``x * 1``, ``x * 0`` and decided ``where`` removed."""
    return expr.replace(_simplify)


def _simplify(node: Expr) -> Expr:
    node = fold(node)
    if node.op == "where" and node.args[0].op == "const":
        return node.args[1] if node.args[0].value else node.args[2]
    if node.op == "where" and node.args[1] == node.args[2]:
        return node.args[1]
    if node.op in ("add", "mul"):
        return _simplify_commutative(node.op, *node.args) or _simplify_commutative(node.op, *node.args[::-1]) or node
    if node.op in ("sub", "div") and _is_number(node.args[1], {"sub": 0, "div": 1}[node.op]):
        return node.args[0]
    return node


def _simplify_commutative(op: str, first: Expr, second: Expr) -> Expr | None:
    if _is_number(first, {"add": 0, "mul": 1}[op]):
        return second
    if op == "mul" and _is_number(first, 0):
        return const(0.0)
    if op == "add" and _is_integer(first) and second.op == "add" and _is_integer(second.args[1]):
        return _simplify(call("add", second.args[0], fold(call("add", second.args[1], first))))
    return None


def _is_integer(expr: Expr) -> bool:
    return expr.op == "const" and type(expr.value) is int


def _is_number(expr: Expr, value: int) -> bool:
    return expr.op == "const" and not isinstance(expr.value, (bool, str)) and expr.value == value


def fold(node: Expr) -> Expr:
    """``node`` computed, if its operands are constants and it is arithmetic."""
    numeric = node.op in RULES and RULES[node.op].operands in ("number", "alike", "quotient", "any")
    if not numeric or any(a.op != "const" for a in node.args):
        return node
    try:
        value = RULES[node.op].torch(*(a.value for a in node.args))
    except (ArithmeticError, ValueError):
        return node
    return const(value) if isinstance(value, (bool, int, float)) else node
