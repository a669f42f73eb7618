"""Finding attention: softmax between two contractions, and operators that are a whole attention."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch.fx import Graph, Node

from fxopt.ir.nodes import arguments, is_call, is_tensor, shape
from fxopt.ir.program import Program
from fxopt.report.flow import (
    contracts_parameter,
    downstream,
    is_contraction,
    is_transparent_or_edit,
    is_view_or_cast,
    namespace,
    origin,
    packet,
    upstream,
)
from fxopt.report.found import Found

aten = torch.ops.aten

ACCEPTED: Final = (
    "softmax over the keys of a score of q @ k.transpose(-2, -1), then @ v, "
    "with q [B,H,S,D], k [B,G,T,D] and v [B,G,T,E]; the weights may be read elsewhere, as they are"
)
_SOFTMAX: Final = frozenset({"softmax", "_softmax", "_safe_softmax", "log_softmax", "_log_softmax", "_sparse_softmax"})
#: What may happen to the weights on their way to the values, besides views and casts.
_KEPT_WEIGHTS: Final = frozenset({"dropout", "native_dropout", "getitem", "contiguous"})
_WHOLE: Final = re.compile(r"attention|attn")


def find_attentions(program: Program, graph: Graph) -> Iterator[Found]:
    """Every attention of ``graph``: whole operators, and softmaxes (composed ones too) between contractions."""
    for node in graph.nodes:
        if _is_whole(node):
            yield Found("attention", node, (node,), _whole_hint(node))
        elif packet(node) in _SOFTMAX or _is_composed_softmax(node):
            yield from _between_contractions(program, node)


def _is_whole(node: Node) -> bool:
    name = packet(node)
    return bool(_WHOLE.search(name)) and "backward" not in name and namespace(node) != "fxopt"


def _whole_hint(node: Node) -> str:
    name = packet(node)
    if name.endswith("scaled_dot_product_attention"):
        return "no rule took this call; it already is one operator and is left to the base compiler"
    return f"no rule reads {name}; it already is one operator and is left as it is"


def _between_contractions(program: Program, softmax: Node) -> Iterator[Found]:
    before = upstream(softmax, is_contraction, is_transparent_or_edit)
    after = downstream(softmax, is_contraction, is_transparent_or_edit)
    contractions = before.ends + after.ends
    if not before.ends or not after.ends:
        return
    if all(contracts_parameter(program, node) for node in contractions):
        return
    region = (softmax, *before.between, *before.ends, *after.between, *after.ends)
    yield Found("attention", softmax, region, _softmax_hint(softmax, after.between))


def _softmax_hint(softmax: Node, after: tuple[Node, ...]) -> str:
    why = _unlike_softmax(softmax) or _unlike_weights(after)
    return f"no rule fits{why and ': '}{why}; the nearest accepted form is {ACCEPTED}"


def _unlike_softmax(softmax: Node) -> str:
    """What sets ``softmax`` apart from one over the keys, if anything does."""
    name = packet(softmax)
    axis: Any = arguments(softmax).get("dim")
    rank = len(shape(softmax)) if is_tensor(softmax) else 0
    if "log_softmax" in name:
        return "the weights are logarithms"
    if "softmax" in name and isinstance(axis, int) and rank and axis % rank != rank - 1:
        return f"the softmax runs over axis {axis} of {rank}, not over the last"
    if name not in _SOFTMAX and not _is_sum(origin(softmax.args[1])):
        return "the weights are divided by more than the sum of their exponentials"
    return ""


def _unlike_weights(after: tuple[Node, ...]) -> str:
    """What is done to the weights before they meet the values, views, casts and dropout aside."""
    edits = (node for node in after if not (is_view_or_cast(node) or packet(node) in _KEPT_WEIGHTS))
    names = dict.fromkeys(packet(node) for node in edits)
    return f"{', '.join(names)} between the softmax and the values" if names else ""


def _is_composed_softmax(node: Node) -> bool:
    """``e / f(e.sum(…))`` with ``e`` an exponential and ``f`` pointwise (a term added, a bound), views and casts
    aside.
    """
    if not is_call(node, aten.div.Tensor, aten.div_.Tensor):
        return False
    numerator, denominator = (origin(operand) for operand in node.args[:2])
    if not (isinstance(denominator, Node) and isinstance(numerator, Node)):
        return False
    sums = (denominator,) if _is_sum(denominator) else upstream(denominator, _is_sum).ends
    if not any(origin(total.args[0]) is numerator for total in sums):
        return False
    return _is_exponential(numerator) or bool(upstream(numerator, _is_exponential, is_view_or_cast).ends)


def _is_sum(node: object) -> bool:
    return isinstance(node, Node) and packet(node) == "sum"


def _is_exponential(node: Node) -> bool:
    return packet(node) in ("exp", "exp2")
