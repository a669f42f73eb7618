"""The captured tensors of a site: those that its expressions still read after proofs, as rank-4 views."""

from __future__ import annotations

from dataclasses import replace

from torch.fx import Node

from fxopt.ir.attention import Capture
from fxopt.ir.expression import Expr
from fxopt.passes.attention.masking import Masked
from fxopt.passes.attention.positions import Captured
from fxopt.passes.attention.space import Space
from fxopt.rewriter.builder import Builder


def write_captures(
    builder: Builder, masked: Masked, operands: tuple[Captured, ...], space: Space
) -> tuple[Expr, Expr | None, list[Node], tuple[Capture, ...]]:
    """Build the captures that are read, and renumber the expressions: score, mask, nodes and their descriptions."""
    used = {int(e.value or 0) for expr in (masked.score, masked.mask) if expr for e in expr.walk() if e.op == "capture"}
    order = sorted(used)
    built = [operands[index].capture(builder, space) for index in order]

    def renumber(expr: Expr) -> Expr:
        return replace(expr, value=order.index(int(expr.value or 0))) if expr.op == "capture" else expr

    mask = None if masked.mask is None else masked.mask.replace(renumber)
    return masked.score.replace(renumber), mask, [node for node, _ in built], tuple(text for _, text in built)
