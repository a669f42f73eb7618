"""What the folds share: a plan or a refusal for each norm, writing the folded layers, and the record of both."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import torch
from torch import fx
from torch.fx import Node

from fxopt.analysis.readers import Layer
from fxopt.ir.nodes import source
from fxopt.ir.program import Program, operator_name
from fxopt.ir.site import Site
from fxopt.passes.norm.weights import Affine, read_through
from fxopt.rewriter.builder import Builder
from fxopt.rewriter.passes import NearMiss, PassResult, Replacement, difference, erase_unused

aten = torch.ops.aten

_ORIGIN: Final = ("stack_trace", "nn_module_stack", "source_fn_stack")


@dataclass(frozen=True)
class Refusal:
    """A norm that keeps its weights: the kind of site, why, and the nodes to blame, the norm first."""

    reason: str
    nodes: tuple[Node, ...]
    kind: str = "norm"


@dataclass(frozen=True)
class Folded:
    """What took whose place: the replaced values in pairs, the nodes of the site, and what became of it in words."""

    node: Node
    pairs: tuple[tuple[Node, Node], ...]
    created: tuple[Node, ...]
    became: str
    kind: str = "norm"


def frozen_objection(program: Program) -> str:
    """Why weights of ``program`` may not be folded, whatever the norm; empty if they may."""
    if program.frozen:
        return ""
    if program.entry == "dynamo":
        return (
            "its weights could be folded into linear layers, but in a compiled graph weights are inputs, which may "
            "change from call to call; fxopt.rewrite folds them"
        )
    return (
        "its weights could be folded into linear layers, but they may still be trained; fxopt.rewrite folds them in "
        "evaluation mode, for calls that record no gradients"
    )


def run_folds(program: Program, rule: str, attempts: Iterable[Folded | Refusal]) -> PassResult:
    """Put the results of ``attempts``, made one by one, into the graph, and tell of them."""
    replacements: list[Replacement] = []
    misses: list[NearMiss] = []
    for attempt in attempts:
        flaw = "" if isinstance(attempt, Refusal) else _flaw(attempt)
        if isinstance(attempt, Refusal):
            misses.append(_miss(rule, attempt))
        elif flaw:
            _undo(program, attempt)
            misses.append(_miss(rule, Refusal(f"the folded layer would have {flaw}", (attempt.node,), attempt.kind)))
        else:
            replacements.append(_replace(program, rule, attempt))
    if replacements:
        program.module.recompile()
    return PassResult(bool(replacements), tuple(replacements), tuple(misses))


def rebuilt(builder: Builder, start: Node, new: Node, between: Iterable[Node]) -> dict[Node, Node]:
    """``new`` for ``start`` and, for each of the moves ``between``, the same move of what takes its operand's place."""
    copies = {start: new}
    for node in between:
        with builder.before(node):
            copies[node] = move(builder, node, copies)
    return copies


def rebuilt_here(builder: Builder, start: Node, new: Node, between: Iterable[Node]) -> dict[Node, Node]:
    """The same, all of it where the builder stands; lines and modules are those of the originals."""
    copies = {start: new}
    for node in between:
        copies[node] = move(builder, node, copies)
    for old, copied in copies.items():
        copied.meta.update({key: old.meta[key] for key in _ORIGIN if key in old.meta})
    return copies


def move(builder: Builder, node: Node, copies: dict[Node, Node]) -> Node:
    """``node`` once more, reading the copies of its operands."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: copies.get(n, n))
    # The strides of what is moved may be others now.
    target = aten.reshape.default if node.target in (aten.view.default, aten._unsafe_view.default) else node.target
    assert callable(target)
    return builder.call(target, *args, **kwargs)


def into_readers(
    builder: Builder, affine: Affine, copies: dict[Node, Node], layers: Iterable[Layer]
) -> tuple[tuple[Node, Node], ...]:
    """Each of ``layers`` with the affine folded in, reading the copies; the old and the new call in pairs."""
    pairs = []
    for layer in layers:
        with builder.before(layer.node):
            pairs.append((layer.node, read_through(builder, layer, copies[layer.x], affine)))
    return tuple(pairs)


def count_layers(layers: Iterable[Layer], affine: Affine) -> str:
    """``3 linear layers (2 get a bias)``, for reports."""
    layers = tuple(layers)
    noun = "linear layer" if len(layers) == 1 else "linear layers"
    made = 0 if affine.shift is None else sum(layer.bias is None for layer in layers)
    note = f" ({made} get{'s' if made == 1 else ''} a bias)" if made else ""
    return f"{len(layers)} {noun}{note}"


def _flaw(folded: Folded) -> str:
    return next(filter(None, (difference(before, after) for before, after in folded.pairs)), "")


def _undo(program: Program, folded: Folded) -> None:
    order = {node: place for place, node in enumerate(program.graph.nodes)}
    for node in sorted(folded.created, key=lambda n: order[n], reverse=True):
        program.graph.erase_node(node)


def _replace(program: Program, rule: str, folded: Folded) -> Replacement:
    covered = tuple(dict.fromkeys((folded.node.name, *(n.name for n in folded.created))))
    site = Site(folded.kind, "rewritten", rule, folded.became, source(folded.node), covered)
    outputs = tuple((before.name, after.name) for before, after in folded.pairs)
    name = operator_name(folded.pairs[-1][1])
    for before, after in folded.pairs:
        before.replace_all_uses_with(after)
        erase_unused(program, before)
    return Replacement(rule, folded.became, site, name, outputs)


def _miss(rule: str, refusal: Refusal) -> NearMiss:
    node, names = refusal.nodes[0], tuple(n.name for n in refusal.nodes)
    site = Site(refusal.kind, "kept", rule, refusal.reason, source(node), names)
    return NearMiss(rule, rule, 1000, refusal.reason, node.name, refusal.kind, site)
