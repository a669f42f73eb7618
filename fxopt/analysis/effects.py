"""What stands between two nodes and may change what they read, or whether they learn."""

from __future__ import annotations

import torch
from torch.fx import Node

from fxopt.ir.nodes import has_effect


def disturbance(start: Node, stop: Node) -> Node | None:
    """The first node between the two that writes into a tensor or switches a mode; assertions do neither."""
    node = start.next
    while node is not stop:
        writes = not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.is_mutable
        if node.op == "call_function" and has_effect(node) and writes:
            return node
        node = node.next
    return None
