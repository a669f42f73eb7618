"""What every operation of the expression language means: in PyTorch, in Triton and under differentiation.

`RULES` is the only place that knows. `evaluate` computes an expression on tensors, `emit` prints it for a Triton
kernel and `gradient` differentiates it symbolically; none of them names an operation.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch

from fxopt.errors import ExpressionError
from fxopt.ir.expression import ARITY, Expr, Kind, call, const, kind, parse

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

#: Device functions that the Triton texts above call. ``tanh.approx`` is right to 2⁻¹¹, as float16 rounding is; float32
#: inputs take the exact form (no cancellation below 0.25, no overflow above).
HELPERS: Final[dict[str, str]] = {
    "tanh": '''\
@triton.jit
def tanh(x, FAST: tl.constexpr):
    """tanh, by the hardware instruction where its 11 bits are enough."""
    if FAST:
        y = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        x2 = x * x
        small = x * (1 + x2 * (-1 / 3 + x2 * (2 / 15 + x2 * (-17 / 315 + x2 * (62 / 2835 - x2 * (1382 / 155925))))))
        decay = tl.exp(-2 * tl.abs(x))
        large = (1 - decay) / (1 + decay)
        y = tl.where(tl.abs(x) < 0.25, small, tl.where(x < 0, -large, large))
    return y
''',
    "power": '''\
@triton.jit
def power(x, y):
    """x to the power y; a negative x wants a whole y."""
    size = tl.where(y == 0, 1.0, tl.exp2(y * tl.log2(tl.abs(x))))
    signed = tl.where(y - 2 * tl.floor(y / 2) == 1, -size, size)
    signed = tl.where(tl.floor(y) == y, signed, float("nan"))
    return tl.where(x < 0, signed, size)
''',
    "modulo": '''\
@triton.jit
def modulo(x, y):
    """Python's x % y on integers (the machine truncates)."""
    return (x % y + y) % y
''',
    "floor_divide": '''\
@triton.jit
def floor_divide(x, y):
    """Python's x // y on integers (the machine truncates)."""
    return (x - (x % y + y) % y) // y
''',
}

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


def emit(expr: Expr, names: Mapping[str, str], captures: tuple[Kind, ...] = ()) -> str:
    """Print ``expr`` as Triton (where no helper is called, also Python) text.

    Args:
        expr: the expression.
        names: the variable that holds each symbol or capture, by its printed name; itself where none is given.
        captures: the kinds of the captured tensors.

    Returns:
        The text. Integers are int32, real values float32; constants beyond float32 become infinite, as they do when
        torch mixes them with float32 tensors. A division by a constant is a product with its inverse.
    """
    return without_parentheses(_Emission(names, captures).text(_lean(expr)))


def print_torch(expr: Expr) -> str:
    """Print ``expr`` as PyTorch text over tensors named by its leaves (``Sq`` and ``Sk`` too), in float64."""
    if not expr.args:
        return str(expr).replace("inf", 'float("inf")').replace("nan", 'float("nan")')
    rule = RULES[expr.op]
    texts = [print_torch(a) for a in expr.args]
    if expr.op == "float":
        return f"{texts[0]}.double()"
    if isinstance(rule.torch, type(operator.add)) and rule.torch.__module__ == operator.add.__module__:
        return str(Expr(expr.op, tuple(Expr("symbol", value=text) for text in texts)))
    if expr.op != "where":
        texts = [f"torch.tensor({t})" if a.op == "const" else t for a, t in zip(expr.args, texts, strict=True)]
    return f"torch.{rule.torch.__name__}({', '.join(texts)})"


def helpers(text: str) -> tuple[str, ...]:
    """The definitions of the device functions that emitted ``text`` calls."""
    return tuple(HELPERS[name] for name in sorted(HELPERS) if re.search(rf"(?<![.\w]){name}\(", text))


@dataclass(frozen=True, slots=True)
class _Emission:
    names: Mapping[str, str]
    captures: tuple[Kind, ...]

    def text(self, expr: Expr) -> str:
        if expr.op == "const":
            return _literal(expr.value)
        if not expr.args:
            return self.names.get(str(expr), str(expr))
        rule = RULES[expr.op]
        kinds = {kind(a, self.captures) for a in expr.args}
        whole = rule.integer is not None and "float" not in kinds
        operands = (self.operand(a, rule, "float" in kinds) for a in expr.args)
        return (rule.integer or "" if whole else rule.triton).format(*operands)

    def operand(self, expr: Expr, rule: Rule, mixed: bool) -> str:
        found = kind(expr, self.captures)
        if rule.operands in ("real", "quotient") and found != "float":
            return self.cast(expr, "float32")
        if rule.operands == "alike" and mixed and found != "float":
            return self.cast(expr, "float32")
        if rule.operands in ("number", "alike") and found == "bool":
            return self.cast(expr, "float32" if mixed else "int32")
        return self.text(expr)

    def cast(self, expr: Expr, dtype: str) -> str:
        if expr.op == "const":
            return _literal(float(expr.value or 0) if dtype == "float32" else int(expr.value or 0))
        return f"{self.text(expr)}.to(tl.{dtype})"


def without_parentheses(text: str) -> str:
    """``text`` without the parentheses that enclose it all, if any do."""
    depth = 0
    for position, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if depth == 0:
            return text[1:-1] if position > 0 and position == len(text) - 1 and char == ")" and text[0] == "(" else text
    return text


_FLOAT32_MAX: Final = (2 - 2**-23) * 2.0**127
_FLOAT32_TINY: Final = 2.0**-126


def _literal(value: object) -> str:
    if not isinstance(value, float):
        return repr(value)
    if math.isnan(value):
        return 'float("nan")'
    if abs(value) > _FLOAT32_MAX:
        return f'float("{"-" if value < 0 else ""}inf")'
    return repr(value) if abs(value) >= _FLOAT32_TINY else "0.0"


def _lean(expr: Expr) -> Expr:
    """Constants folded, divisions by constants turned into products, small whole powers into repeated products."""

    def change(node: Expr) -> Expr:
        node = _fold(node)
        if node.op == "div" and _usable_divisor(node.args[1]):
            node = call("mul", node.args[0], const(1.0 / float(node.args[1].value or 0)))
        if node.op == "mul" and _is_real(node.args[1]) and node.args[0].op == "mul" and _is_real(node.args[0].args[1]):
            inner, first = node.args[0].args
            return call("mul", inner, _fold(call("mul", first, node.args[1])))
        if node.op == "pow" and node.args[1].value in (2, 3, 4) and node.args[1].op == "const":
            base = node.args[0]
            square = call("mul", base, base)
            return {2: square, 3: call("mul", square, base), 4: call("mul", square, square)}[int(node.args[1].value)]
        return node

    return expr.replace(change)


def _is_real(expr: Expr) -> bool:
    return expr.op == "const" and isinstance(expr.value, float) and 1e-30 < abs(expr.value) < 1e30


def _usable_divisor(expr: Expr) -> bool:
    return expr.op == "const" and 1e-30 < abs(float(expr.value or 0)) < 1e30


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
    node = _fold(node)
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
        return _simplify(call("add", second.args[0], _fold(call("add", second.args[1], first))))
    return None


def _is_integer(expr: Expr) -> bool:
    return expr.op == "const" and type(expr.value) is int


def _is_number(expr: Expr, value: int) -> bool:
    return expr.op == "const" and not isinstance(expr.value, (bool, str)) and expr.value == value


def _fold(node: Expr) -> Expr:
    numeric = node.op in RULES and RULES[node.op].operands in ("number", "alike", "quotient", "any")
    if not numeric or any(a.op != "const" for a in node.args):
        return node
    try:
        value = RULES[node.op].torch(*(a.value for a in node.args))
    except (ArithmeticError, ValueError):
        return node
    return const(value) if isinstance(value, (bool, int, float)) else node
