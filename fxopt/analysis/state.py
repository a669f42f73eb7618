"""Which nodes are weights: parameters, buffers, constants, and what is computed from them alone."""

from __future__ import annotations

from typing import Final

import torch
from torch.fx import Node

from fxopt.ir.nodes import tensor
from fxopt.ir.program import Program

#: Dtypes with the range for a product of weights.
_WIDE_ENOUGH: Final = (torch.bfloat16, torch.float32, torch.float64)


class State:
    """Tells the weights of one program from what depends on its inputs.

    A buffer that the program edits is no weight, nor is anything that draws random numbers.
    """

    def __init__(self, program: Program) -> None:
        bound = program.signature.bound if program.signature is not None else {}
        edited = {node.args[0] for node in program.graph.nodes if _is_edit(node)}
        inputs = program.graph.find_nodes(op="placeholder")
        self._leaves = {node for node in inputs if node.name in bound or _is_static(node)} - edited
        self._known: dict[Node, bool] = {}

    def holds(self, node: object) -> bool:
        """Whether ``node`` is a weight."""
        if not isinstance(node, Node):
            return False
        pending = [node]
        while pending:
            current = pending[-1]
            unknown = [n for n in current.all_input_nodes if n not in self._known] if _may_be(current) else []
            if unknown:
                pending.extend(unknown)
                continue
            self._known[pending.pop()] = self._is_weight(current)
        return self._known[node]

    def _is_weight(self, node: Node) -> bool:
        if node.op == "placeholder":
            return node in self._leaves
        return node.op == "get_attr" or (_may_be(node) and all(self._known[n] for n in node.all_input_nodes))


def weight_objection(state: State, node: Node) -> str:
    """Why something can't be folded into ``node`` as a weight; empty if it can."""
    if not state.holds(node):
        return f"the weight {node} depends on the inputs"
    if tensor(node).dtype not in _WIDE_ENOUGH:
        return f"a weight in {tensor(node).dtype} may not hold the product of two weights"
    return ""


def _may_be(node: Node) -> bool:
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload) or node.is_impure():
        return False
    return torch.Tag.nondeterministic_seeded not in target.tags


def _is_static(node: Node) -> bool:
    """Whether Dynamo says that it is a parameter or buffer."""
    return "_dynamo_static_input_type" in (node.meta.get("tensor_dict") or {})


def _is_edit(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
