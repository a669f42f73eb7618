"""Finding norms: whole operators, and compositions that scale by an inverse root of a second moment."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from torch.fx import Graph, Node

from fxopt.ir.nodes import arguments, is_tensor, same_shape, scalar, shape
from fxopt.report.flow import Reach, downstream, is_view_or_cast, namespace, packet, upstream
from fxopt.report.found import Found

_WHOLE: Final = re.compile(r"(layer|rms|batch|group|instance)_?norm")
_INNER: Final = frozenset({"add", "clamp", "clamp_min", "maximum", "mul", "div", "getitem"})
_OUTER: Final = _INNER | {"reciprocal"}
_TAIL: Final = frozenset({"mul", "add", "to", "_to_copy", "type_as"})
_WHOLE_HINT: Final = "it already is one operator and is left to the base compiler"
_COMPOSED_HINT: Final = (
    "no rule fits; the nearest accepted forms are (x - mean) * rsqrt(var + eps) * weight + bias and "
    "x * rsqrt(mean(x * x) + eps) * weight over the trailing axes"
)


def find_norms(graph: Graph) -> Iterator[Found]:
    """Every norm of ``graph``: layer, RMS, batch, group and instance norm, whole or composed."""
    for node in graph.nodes:
        name = packet(node)
        if _WHOLE.search(name) and "backward" not in name and namespace(node) != "fxopt":
            yield Found("norm", node, (node,), _WHOLE_HINT)
        elif _is_root(node) or _is_spread(node):
            yield from _composed(node)


def _is_root(node: Node) -> bool:
    if packet(node) == "pow":
        return scalar(arguments(node).get("exponent")) in (0.5, -0.5)
    return packet(node) in ("rsqrt", "sqrt")


def _composed(root: Node) -> Iterator[Found]:
    moment = upstream(root, _is_moment, lambda n: packet(n) in _INNER or is_view_or_cast(n))
    if not (_is_spread(root) or any(_is_normalised(end, moment) for end in moment.ends)):
        return
    scale = downstream(root, lambda n: _scales(n, root), lambda n: packet(n) in _OUTER or is_view_or_cast(n))
    if not scale.ends:
        return
    tail = _tail(scale.ends[0])
    yield Found("norm", root, (root, *moment.ends, *moment.between, *scale.between, *scale.ends, *tail), _COMPOSED_HINT)


def _is_spread(node: Node) -> bool:
    return packet(node) == "std"


def _is_normalised(moment: Node, reach: Reach) -> bool:
    """Whether the moment is a mean: a sum of squares must be divided on the way."""
    return packet(moment) != "sum" or any(packet(node) in ("div", "mul") for node in reach.between)


def _is_moment(node: Node) -> bool:
    """A variance, or the mean (or sum, to be divided) of squares."""
    if packet(node) in ("var", "var_mean"):
        return True
    if packet(node) not in ("mean", "sum"):
        return False
    return bool(upstream(node, _is_square, is_view_or_cast).ends)


def _is_square(node: Node) -> bool:
    if packet(node) == "pow":
        return scalar(arguments(node).get("exponent")) == 2
    same = packet(node) == "mul" and len(node.args) > 1 and node.args[0] is node.args[1]
    return same or packet(node) == "square"


def _scales(node: Node, root: Node) -> bool:
    """Whether ``node`` multiplies or divides a larger tensor by what ``root`` computes."""
    if packet(node) not in ("mul", "div") or not is_tensor(node) or not is_tensor(root):
        return False
    if len(node.all_input_nodes) < 2:
        return False
    return not same_shape(shape(node), shape(root))


def _tail(node: Node) -> tuple[Node, ...]:
    """The weight, bias and cast that follow: the chain of single readers (assertions about metadata do not count)."""
    chain: list[Node] = []
    while len(readers := [n for n in node.users if packet(n) != "_assert_tensor_metadata"]) == 1:
        node = readers[0]
        if packet(node) not in _TAIL:
            break
        chain.append(node)
    return tuple(chain)
