"""Which nodes may need a gradient."""

from __future__ import annotations

from typing import Final

import torch
from torch import fx

from fxopt.ir.nodes import REQUIRES_GRAD, is_call, is_tensor, tensor

_DETACH: Final = torch.ops.aten.detach.default


def may_need_gradient(node: fx.Node) -> bool:
    """Whether a placeholder that requires a gradient lies above ``node`` (both floating) and nothing detached between
    them, so that one may flow to it.
    """
    if not any(leaf.meta.get(REQUIRES_GRAD) for leaf in node.graph.find_nodes(op="placeholder")):
        return False
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        if not is_tensor(current) or not tensor(current).dtype.is_floating_point or is_call(current, _DETACH):
            continue
        if current.meta.get(REQUIRES_GRAD):
            return True
        fresh = [n for n in current.all_input_nodes if n not in seen]
        seen.update(fresh)
        pending.extend(fresh)
    return False
