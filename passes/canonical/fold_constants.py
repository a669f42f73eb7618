"""Input-independent single numbers become literals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from fxopt.analysis.constants import Constants
from fxopt.ir.nodes import arguments, is_call, is_tensor, source, tensor
from fxopt.ir.program import Program, operator_name
from fxopt.ir.site import Site, Tier
from fxopt.rewriter.builder import Builder
from fxopt.rewriter.passes import PassResult, Replacement, difference, erase_unused
from fxopt.rewriter.registry import register_pass

aten = torch.ops.aten

#: Operators whose tensor operand may be a literal instead: (operator, argument, operator with the literal).
_LITERAL_FORMS = {
    aten.masked_fill.Tensor: ("value", aten.masked_fill.Scalar),
    aten.where.self: ("other", aten.where.ScalarOther),
    aten.pow.Tensor_Tensor: ("exponent", aten.pow.Tensor_Scalar),
    aten.add.Tensor: ("other", aten.add.Tensor),
    aten.sub.Tensor: ("other", aten.sub.Tensor),
    aten.mul.Tensor: ("other", aten.mul.Tensor),
    aten.div.Tensor: ("other", aten.div.Tensor),
}


@register_pass
@dataclass(frozen=True)
class FoldConstants:
    """``op(x, constant tensor holding one number) -> op(x, number)``.

    Applies to masked_fill, where, pow and the four arithmetic operators, when the node's result keeps its shape and
    dtype (type promotion of a literal differs from that of a tensor, so the result is checked).
    """

    name: ClassVar[str] = "fold-constants"
    tier: ClassVar[Tier] = "exact"
    requires: ClassVar[tuple[str, ...]] = ()

    def run(self, program: Program) -> PassResult:
        """Fold them."""
        constants = Constants(program)
        done = [r for node in list(program.graph.nodes) if (r := _fold(program, node, constants))]
        if done:
            program.module.recompile()
        return PassResult(bool(done), tuple(done))


def _fold(program: Program, node: Node, constants: Constants) -> Replacement | None:
    if not is_call(node, *_LITERAL_FORMS):
        return None
    operand_name, target = _LITERAL_FORMS[node.target]  # type: ignore[index]
    given: dict[str, Any] = dict(arguments(node))
    operand = given[operand_name]
    if not is_tensor(operand) or constants.is_constant(node):
        return None
    number = constants.number(operand)
    if number is None or _loses_precision(number, tensor(operand).dtype):
        return None
    builder = Builder(program, node, "fold-constants")
    given[operand_name] = number
    only_named = {a.name for a in node.target._schema.arguments if a.kwarg_only}  # type: ignore[union-attr]
    named = {name: given.pop(name) for name in only_named & given.keys()}
    new = builder.call(target, *given.values(), **named)
    if difference(node, new):
        program.graph.erase_node(new)
        return None
    site = Site("", "rewritten", "fold-constants", f"{operand} = {number}", source(node), (node.name,))
    node.replace_all_uses_with(new)
    erase_unused(program, node)
    return Replacement("fold-constants", "one number", site, operator_name(new))


def _loses_precision(number: float | int | bool, dtype: torch.dtype) -> bool:
    return not isinstance(number, bool) and isinstance(number, int) and abs(number) >= 2**53 and dtype.is_floating_point
