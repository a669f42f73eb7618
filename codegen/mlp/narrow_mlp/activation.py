"""Activations as text for the kernel.

Those of the family ``x·sigmoid`` are computed as ``x / (1 + 2^(x·p(x²)))``, with the polynomials of
``codegen/mlp/gelu.py``: one exponential, one reciprocal and a dozen products and sums.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from fxopt.codegen.mlp.gelu import LARGEST, NORMAL, TANH

_RECIPROCAL: Final = '''
@triton.jit
def reciprocal(x):
    """1 / x by the hardware's instruction, whose error is one unit in the last place of float32."""
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)

'''
_FUNCTION: Final = '''
@triton.jit
def activation(x):
    """{0}."""
{1}

'''
_TITLES: Final = {
    "silu": "SiLU: x * sigmoid(x)",
    "gelu": "GELU: x times the normal distribution function of x",
    "gelu_tanh": "GELU in its tanh form: x * (1 + tanh(y)) / 2 = x * sigmoid(2 * y)",
    "relu": "ReLU, which NaN passes",
    "sigmoid": "1 / (1 + exp(-x))",
}
#: The functions in float64 PyTorch, for the script of a generated file.
IN_TORCH: Final = {
    "silu": "torch.nn.functional.silu(x)",
    "gelu": "torch.nn.functional.gelu(x)",
    "gelu_tanh": 'torch.nn.functional.gelu(x, approximate="tanh")',
    "relu": "torch.relu(x)",
    "sigmoid": "torch.sigmoid(x)",
}


def definition(name: str) -> str:
    """The function ``activation(x)`` of float32 values that will be rounded to half precision."""
    text = _FUNCTION.format(_TITLES[name], "\n".join(f"    {line}" for line in _lines(name)))
    return text if name == "relu" else _RECIPROCAL + text


def _lines(name: str) -> list[str]:
    if name == "relu":
        return ["return tl.where(x < 0, 0.0, x)"]
    if name in ("silu", "sigmoid"):
        factor = "x * " if name == "silu" else ""
        return [f"return {factor}reciprocal(1 + tl.exp2(x * {-1 / math.log(2)!r}))"]
    polynomial = _horner(NORMAL if name == "gelu" else TANH)
    return [f"square = tl.minimum(x * x, {LARGEST!r})", *polynomial, "return x * reciprocal(1 + tl.exp2(x * p))"]


def _horner(coefficients: Sequence[float]) -> list[str]:
    """``p``, of ``square``, so that ``sigmoid(x·p(x²))`` with ``coefficients`` is ``1 / (1 + 2^(x·p))``."""
    lowest, *rest = (-c / math.log(2) for c in reversed(coefficients))
    first, *others = rest
    lines = [f"p = square * {lowest!r} + {first!r}"]
    return [*lines, *(f"p = p * square + {c!r}" for c in others)]
