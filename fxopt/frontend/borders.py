"""Where gradients stop: what is computed inside of ``no_grad`` and read outside is detached there, for all to see.

The switches themselves stay, but an operator in place of several, or a tensor read further up than the graph reads it,
may stand on the other side of one. No rewrite looks through ``detach`` where a gradient would flow.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import fx

from fxopt.ir.fake import COMPUTED_FROM, evaluate_fake, operand_values
from fxopt.ir.nodes import REQUIRES_GRAD, is_tensor, tensor
from fxopt.ir.program import Program

SWITCH: Final = torch._C._set_grad_enabled


def detach_at_borders(program: Program) -> None:
    """Detach every value that ``no_grad`` keeps gradients from, where nodes read it that record gradients."""
    graph = program.graph
    if not graph.find_nodes(op="call_function", target=SWITCH):
        return
    recording = _recording(graph)
    for node in _kept_from(graph, recording):
        outside = [user for user in node.users if recording[user] and user.op != "output"]
        if outside and is_tensor(node):
            _detach(program, node, outside)
    program.module.recompile()


def _recording(graph: fx.Graph) -> dict[fx.Node, bool]:
    """Whether each node runs with gradients recorded."""
    found, mode = {}, True
    for node in graph.nodes:
        mode = bool(node.args[0]) if node.target is SWITCH else mode
        found[node] = mode
    return found


def _kept_from(graph: fx.Graph, recording: dict[fx.Node, bool]) -> list[fx.Node]:
    """The nodes that would have a gradient if they, and what they read, were not inside of ``no_grad``."""
    learning = {node for node in graph.find_nodes(op="placeholder") if node.meta.get(REQUIRES_GRAD)}
    hidden: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if node.op != "call_function" or (is_tensor(node) and not tensor(node).dtype.is_floating_point):
            continue
        # One result of several is hidden where they are, wherever it is taken out.
        part = any(source in hidden and not is_tensor(source) for source in node.all_input_nodes)
        reads = any(source in learning or source in hidden for source in node.all_input_nodes)
        if part or (reads and not recording[node]):
            hidden[node] = None
        elif any(source in learning for source in node.all_input_nodes):
            learning.add(node)
    return list(hidden)


def _detach(program: Program, node: fx.Node, readers: list[fx.Node]) -> None:
    with program.graph.inserting_after(node):
        detached = program.graph.call_function(torch.ops.aten.detach.default, (node,))
    detached.meta.update({key: value for key, value in node.meta.items() if key != COMPUTED_FROM})
    detached.meta["val"] = evaluate_fake(detached, program.fake_mode)
    detached.meta[COMPUTED_FROM] = operand_values(detached)
    for reader in readers:
        reader.replace_input_with(node, detached)
