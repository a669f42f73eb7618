"""Autocast inside of a graph: which region a node stands in, and running something as if it stood there."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from typing import Any, Final

import torch
from torch import fx

ENTER: Final = torch.amp.autocast_mode._enter_autocast
EXIT: Final = torch.amp.autocast_mode._exit_autocast


def autocast_at(node: fx.Node) -> AbstractContextManager[Any]:
    """The autocast that ``node`` runs under, as far as its graph switches it."""
    stack = ExitStack()
    if not node.graph.find_nodes(op="call_function", target=ENTER):
        return stack
    for entered in _around(node):
        device, dtype, enabled, cached = entered.args
        stack.enter_context(torch.autocast(device, dtype, enabled, cached))  # type: ignore[arg-type]
    return stack


def is_autocast(node: fx.Node, device: str) -> bool:
    """Whether ``node`` runs under autocast of ``device``, switched on by its graph or around it."""
    with autocast_at(node):
        return torch.is_autocast_enabled(device)


def _around(node: fx.Node) -> list[fx.Node]:
    """The switches that are on at ``node``, the outermost first."""
    entered: list[fx.Node] = []
    for before in node.graph.nodes:
        if before is node:
            break
        if before.target is ENTER:
            entered.append(before)
        elif before.target is EXIT:
            entered.remove(before.args[0])
    return entered
