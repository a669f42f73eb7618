"""Expressions as text: for a Triton kernel, and for plain PyTorch in float64."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from fxopt.codegen.expression import RULES, Rule, fold
from fxopt.ir.expression import Expr, Kind, call, const, kind

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
    "sigmoid": '''\
@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), where the language has none of its own."""
    return 1 / (1 + tl.exp(-x))
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
        node = fold(node)
        if node.op == "div" and _usable_divisor(node.args[1]):
            node = call("mul", node.args[0], const(1.0 / float(node.args[1].value or 0)))
        if node.op == "mul" and _is_real(node.args[1]) and node.args[0].op == "mul" and _is_real(node.args[0].args[1]):
            inner, first = node.args[0].args
            return call("mul", inner, fold(call("mul", first, node.args[1])))
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
