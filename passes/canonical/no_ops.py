"""Operations that give back their operand disappear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from fxopt.ir.nodes import same_shape, shape, tensor
from fxopt.ir.program import Program
from fxopt.ir.site import Tier
from fxopt.rewriter.passes import PassResult, apply_rules
from fxopt.rewriter.pattern import Const, Match, Op, Var
from fxopt.rewriter.registry import register_pass
from fxopt.rewriter.rule import Rejection, Rule

aten = torch.ops.aten


def _same_value(match: Match) -> Match | Rejection:
    before, after = tensor(match["x"]), tensor(match.root)
    if before.dtype != after.dtype or before.device != after.device:
        return Rejection(f"it converts {before.dtype} on {before.device} to {after.dtype} on {after.device}")
    if not same_shape(shape(match["x"]), shape(match.root)):
        return Rejection(f"it changes the shape from {shape(match['x'])} to {shape(match.root)}")
    if before.stride() != after.stride():
        return Rejection("it changes the memory layout")
    return match


RULES = (
    Rule(
        name="no-op",
        patterns={
            "cast": Op(aten.to.dtype, Var("x"), Const("dtype")),
            "cast with layout": Op(
                aten.to.dtype_layout, Var("x"), dtype=Const("dtype"), layout=Const("layout"), device=Const("device")
            ),
            "move": Op(aten.to.device, Var("x"), Const("device"), Const("dtype")),
            "cast like": Op(aten.type_as.default, Var("x"), Var("like")),
            "contiguous": Op(aten.contiguous.default, Var("x")),
            "view": Op((aten.view.default, aten.reshape.default), Var("x"), Const("size")),
            "expand": Op(aten.expand.default, Var("x"), Const("size")),
            "alias": Op((aten.alias.default, aten.lift_fresh.default), Var("x")),
        },
        check=_same_value,
        rewrite=lambda builder, match: match["x"],
    ),
)


@register_pass
@dataclass(frozen=True)
class NoOps:
    """``x.to(x.dtype)``, ``x.contiguous()`` of contiguous ``x``, ``x.view(x.shape)``, ``x.expand(x.shape)`` ``-> x``.

    Only where shape, dtype, device and strides are provably those of the operand; assertions on metadata that the graph
    already proves go too.
    """

    name: ClassVar[str] = "no-ops"
    tier: ClassVar[Tier] = "exact"
    requires: ClassVar[tuple[str, ...]] = ()

    def run(self, program: Program) -> PassResult:
        """Remove them."""
        assertions = program.graph.find_nodes(op="call_function", target=aten._assert_tensor_metadata.default)
        for node in assertions:
            program.graph.erase_node(node)
        result = apply_rules(program, RULES)
        return PassResult(result.modified or bool(assertions), result.replacements)
