"""Scores to which a multiple of the distance of key and row is added, such as ALiBi's, in a generated Hopper backward.

    r(s) + c·float(j − i) − lse = r(s) + c·float(j − n) + (c·float(n − i) − lse)       for the block of rows from n on

The part of a row is ready before products of queries and keys are, and an exponent is two operations for each weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fxopt.codegen.attention.backward.plan import Weights
from fxopt.codegen.attention.distance import sloped
from fxopt.codegen.attention.gluon import as_gluon
from fxopt.codegen.attention.interval import linear
from fxopt.codegen.attention.softmax import LOG2E, split_factor
from fxopt.codegen.printing import emit
from fxopt.ir.attention import AttentionSpec
from fxopt.ir.expression import Expr, I, S, capture

#: ``across`` counts the rows of a block, with their sign in the distance; it is computed anew, to spare registers.
_PARTS: Final = """\
nil = gl.inline_asm_elementwise("mov.b32 $0, 0;", "=r,r", [start], dtype=gl.int32, is_pure=True, pack=1)
m = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, SCORES))
across = (nil {sign} m // 2 % 4 * 2).to(gl.float32) {sign} (m // 8 * 8 + m % 2).to(gl.float32)
across = across[None, :]
steep = ({factor}) * {log2e}
row_part = steep * across - shift[None, :]
key_part = steep * {distance}"""


@dataclass(frozen=True, slots=True)
class Sloped:
    """Text before products are there, what is computed of them, and the weight of that."""

    parts: str
    inner: Expr
    weight: str


def sloped_weights(spec: AttentionSpec, weights: Weights) -> Sloped | None:
    """How weights are computed anew where ``spec`` adds a multiple of the distance to a function of ``s``."""
    found = sloped(spec.score, spec.captures)
    if found is None or weights.recounted or any(leaf.op == "symbol" and leaf != S for leaf in found[0].walk()):
        return None
    rest, factor, distance = found
    inner, scale = split_factor(rest)
    return Sloped(_parts(factor, distance, spec), inner, f"gl.exp2(x * {scale * LOG2E!r} + row_part + key_part)")


def _parts(factor: Expr, distance: Expr, spec: AttentionSpec) -> str:
    found = linear(distance.args[0], spec.captures)
    # A name beyond those of the captured tensors, which the emitter treats alike.
    first = capture(len(spec.captures))
    fixed = distance.replace(lambda node: first if node == I else node)
    factor_text, distance_text = (
        as_gluon(emit(expr, {str(first): "start"}, (*spec.capture_kinds, "int"))) for expr in (factor, fixed)
    )
    sign = "+" if found is not None and found.row == 1 else "-"
    return _PARTS.format(sign=sign, factor=factor_text, distance=distance_text, log2e=repr(LOG2E))
