"""Finding MLPs: a projection, an activation, a projection."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from torch.fx import Graph, Node

from fxopt.ir.program import Program
from fxopt.report.flow import Reach, downstream, is_contraction, is_projection, is_transparent, packet, upstream
from fxopt.report.found import Found

_ACTIVATIONS: Final = frozenset(
    {"gelu", "silu", "relu", "relu6", "glu", "elu", "selu", "celu", "leaky_relu", "prelu", "mish", "hardswish"}
)
#: Parts of activations that are written out: ``x * f(x)``.
_GATES: Final = frozenset({"sigmoid", "tanh", "erf", "erfc"})


def find_mlps(program: Program, graph: Graph) -> Iterator[Found]:
    """Every MLP of ``graph``, once for each set of outgoing projections (a gated MLP is one)."""
    seen: set[tuple[Node, ...]] = set()
    for node in graph.nodes:
        found = _around(program, node) if _is_activation(node) else None
        if found is None or found[1].ends in seen:
            continue
        before, after = found
        seen.add(after.ends)
        region = (node, *before.ends, *before.between, *after.between, *after.ends)
        yield Found("mlp", node, region, _hint(node))


def _around(program: Program, activation: Node) -> tuple[Reach, Reach] | None:
    before, after = upstream(activation, is_contraction), downstream(activation, is_contraction)
    if not before.ends or not after.ends:
        return None
    if not all(is_projection(program, node) for node in before.ends + after.ends):
        return None
    return before, after


def _is_activation(node: Node) -> bool:
    return packet(node) in _ACTIVATIONS or (packet(node) in _GATES and _gates_itself(node))


def _gates_itself(gate: Node) -> bool:
    """Whether what ``gate`` was computed from is multiplied by what it computes: ``x * sigmoid(x)`` and its kin."""
    inner = upstream(gate, is_contraction)
    origins = {*inner.between, *inner.ends}
    products = downstream(gate, _is_product, _is_unary)
    return any(origins & _other_sources(product, gate) for product in products.ends)


def _is_product(node: Node) -> bool:
    return packet(node) == "mul" and len(node.all_input_nodes) == 2


def _other_sources(product: Node, gate: Node) -> set[Node]:
    """What ``product`` is computed from by unary steps, other than through ``gate``."""
    reach = upstream(product, lambda n: n is gate or is_contraction(n), _is_unary)
    return {*reach.between, *reach.ends} - {gate}


def _is_unary(node: Node) -> bool:
    return is_transparent(node) and len(node.all_input_nodes) == 1


def _hint(activation: Node) -> str:
    name = packet(activation)
    if name in _GATES:
        return f"no rule fits what is written out around {name}; the nearest accepted forms are gelu, silu and glu"
    return f"linear, {name} and linear already are one operator each and are left to the base compiler"
