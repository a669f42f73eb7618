"""Masks that a module takes and its model may leave out: a call without them is a graph of its own.

What ``None`` means is the module's affair: no mask, one that it makes itself, or a flag of its attention instead of a
tensor. transformers, for one, gives masks to a captured model that a running model does without.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch
from torch.fx import Node
from torch.utils import _pytree as pytree

from fxopt.ir.attention import read_spec
from fxopt.passes.linear_attention.capture import Isolated, attentions
from fxopt.rewriter.progressive import Call


def optional(captured: Isolated) -> dict[int, bool]:
    """The places, among the flattened arguments, of tensors from which attentions get their masks, and nothing else.

    Each with whether it hides the same keys from all queries.

    Args:
        captured: of one module, canonical, its attentions still there.
    """
    program = captured.program
    assert program.signature is not None
    bound, sites = program.signature.bound, attentions(program)
    inputs = [node for node in program.graph.find_nodes(op="placeholder") if node.name not in bound]
    mixed = _behind(x for site in sites for x in site.args[:3])
    masks = [mask for site in sites for mask in _masks(site)]
    beside, of_pairs = _behind(x for x, _ in masks), _behind(x for x, axes in masks if axes[2] != "-")
    count = len(inputs) + len(captured.constants)
    places = [place for place in range(count) if place not in captured.constants]
    named = zip(places, inputs, strict=True)
    return {place: x not in of_pairs for place, x in named if x in beside and x not in mixed}


def _masks(site: Node) -> list[tuple[object, str]]:
    """What an attention captures, by which axes, without what differs by head and not by sequence: that is a bias."""
    dims = [capture.dims for capture in read_spec(str(site.args[4])).captures]
    given = zip(site.args[3], dims, strict=True)  # type: ignore[arg-type]
    return [(x, axes) for x, axes in given if axes[:2] != "-h"]


def choices(places: Sequence[int]) -> list[tuple[int, ...]]:
    """Which of them a call may be without: each alone, and all."""
    return list(dict.fromkeys([*((place,) for place in places), *([tuple(places)] if places else [])]))


def without(call: Call, places: Collection[int]) -> Call:
    """``call`` with ``None`` for the flattened arguments at ``places``."""
    leaves, spec = pytree.tree_flatten((call.args, dict(call.kwargs)))
    args, kwargs = pytree.tree_unflatten([None if n in places else x for n, x in enumerate(leaves)], spec)
    return Call(args, kwargs)


def _behind(results: Iterable[object]) -> set[Node]:
    """What ``results`` are computed from; a tensor whose size alone is read is not among it."""
    found: set[Node] = set()
    waiting = [node for node in results if isinstance(node, Node)]
    while waiting:
        node = waiting.pop()
        if node in found or node.target is torch.ops.aten.sym_size.int:
            continue
        found.add(node)
        waiting += node.all_input_nodes
    return found
