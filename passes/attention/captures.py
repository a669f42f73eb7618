"""The captured tensors of a site: those that its expressions still read after proofs, as rank-4 views."""

from __future__ import annotations

from dataclasses import replace

from torch.fx import Node

from fxopt.ir.attention import Capture
from fxopt.ir.expression import Expr
from fxopt.passes.attention.masking import Masked
from fxopt.passes.attention.positions import Captured
from fxopt.passes.attention.proofs import captures_of
from fxopt.passes.attention.space import Space
from fxopt.rewriter.builder import Builder


def write_captures(
    builder: Builder, masked: Masked, operands: tuple[Captured, ...], space: Space
) -> tuple[Expr, Expr | None, list[Node], tuple[Capture, ...]]:
    """Build the captures that are read, and renumber the expressions: score, mask, nodes and their descriptions."""
    score, mask, order = renumbered(masked)
    built = [operands[index].capture(builder, space) for index in order]
    return score, mask, [node for node, _ in built], tuple(text for _, text in built)


def renumbered(masked: Masked) -> tuple[Expr, Expr | None, list[int]]:
    """Score and mask with the captures that they read numbered from 0, and which those are."""
    order = sorted(captures_of(masked.score, masked.mask))

    def change(expr: Expr) -> Expr:
        return replace(expr, value=order.index(int(expr.value or 0))) if expr.op == "capture" else expr

    return masked.score.replace(change), masked.mask and masked.mask.replace(change), order
