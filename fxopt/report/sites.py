"""The sites of a model: every attention, norm, MLP and patch convolution, and what became of each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch.fx import Graph, GraphModule, Node

from fxopt.ir.nodes import source
from fxopt.ir.operators import NAMESPACE
from fxopt.ir.program import Program, operator_name
from fxopt.ir.site import Site
from fxopt.report.attentions import find_attentions
from fxopt.report.flow import namespace, packet
from fxopt.report.found import Found
from fxopt.report.mlps import find_mlps
from fxopt.report.norms import find_norms
from fxopt.report.patches import find_patch_convolutions
from fxopt.rewriter.passes import NearMiss
from fxopt.rewriter.pipeline import PipelineResult

#: The kind of site that a canonical operator stands for.
_CANONICAL = {
    "attention": "attention", "attention_with_lse": "attention", "attention_weights": "attention",
    "attention_statistics": "attention", "linear_attention": "attention", "layer_norm": "norm", "rms_norm": "norm",
    "residual_layer_norm": "norm", "residual_rms_norm": "norm", "glu": "mlp",
    "mlp": "mlp",
}  # fmt: skip


def collect_sites(result: PipelineResult) -> tuple[Site, ...]:
    """Every attention, norm, MLP and patch convolution of the model, in the order of the final graph.

    Rewritten sites come from the rules that rewrote them. Kept ones are found in the final program, each with the
    reason of the rule that came nearest. A site rewritten twice (made canonical, then fused) is listed once, with the
    last rule.
    """
    rewritten = _rewritten(result)
    touched = {(site.kind, name) for site in rewritten for name in site.nodes}
    canonical = [s for s in _canonical(result.program) if (s.kind, s.nodes[0]) not in touched]
    touched |= {(site.kind, name) for site in canonical for name in site.nodes}
    kept = [_kept(found, result) for found in _find(result.program) if (found.kind, found.anchor.name) not in touched]
    nested = _nested(result.program)
    order = {node.name: index for index, node in enumerate(result.program.graph.nodes)}
    return tuple(sorted((*rewritten, *canonical, *kept, *nested), key=lambda site: _position(site, order)))


def _position(site: Site, order: dict[str, int]) -> float:
    return min((order[name] for name in site.nodes if name in order), default=math.inf)


def _rewritten(result: PipelineResult) -> list[Site]:
    """Sites of the replacements; one that replaced a node made for an earlier site of its kind takes its place."""
    sites: list[Site] = []
    for record in result.records:
        # A pass visits the last node first.
        for replacement in reversed(record.result.replacements):
            _add(sites, replacement.site)
    return sites


def _add(sites: list[Site], site: Site) -> None:
    if not site.kind:
        return
    replaced = site.nodes[0] if site.nodes else ""
    for index, earlier in enumerate(sites):
        if earlier.kind == site.kind and replaced in earlier.nodes:
            sites[index] = replace(site, nodes=tuple(dict.fromkeys((*earlier.nodes, *site.nodes))))
            return
    sites.append(site)


def _canonical(program: Program) -> Iterator[Site]:
    """Canonical operators that a rule without a kind produced, or that the model called itself."""
    for node in program.graph.nodes:
        kind = _CANONICAL.get(packet(node)) if namespace(node) == NAMESPACE else None
        if kind:
            rule = str(node.meta.get("fxopt_rule", ""))
            yield Site(kind, "rewritten", rule, f"canonical {operator_name(node)}", source(node), (node.name,))


def _find(program: Program, graph: Graph | None = None) -> Iterator[Found]:
    graph = program.graph if graph is None else graph
    yield from find_attentions(program, graph)
    yield from find_norms(graph)
    yield from find_mlps(program, graph)
    yield from find_patch_convolutions(graph)


def _nested(program: Program) -> Iterator[Site]:
    """Sites inside the branches and regions of higher-order operators, which no pass enters."""
    for node in program.graph.nodes:
        if not isinstance(node.target, torch._ops.HigherOrderOperator) or "attention" in packet(node):
            continue
        for graph in _regions(program, node):
            for found in _find(program, graph):
                reason = f"it lies inside a region of {packet(node)}, which no pass enters"
                yield Site(found.kind, "kept", "", reason, source(found.anchor), (node.name, found.anchor.name))


def _regions(program: Program, node: Node) -> Iterator[Graph]:
    for operand in node.all_input_nodes:
        region = getattr(program.module, str(operand.target), None) if operand.op == "get_attr" else None
        if isinstance(region, GraphModule):
            yield region.graph


def _kept(found: Found, result: PipelineResult) -> Site:
    names = tuple(node.name for node in found.region)
    miss = _nearest(found.kind, frozenset(names), result.near_misses)
    where = source(found.anchor)
    if miss is None:
        return Site(found.kind, "kept", "", found.hint, where, names)
    blamed = miss.site.nodes if miss.site is not None else (miss.node,)
    return Site(found.kind, "kept", miss.rule, _explain(miss), where, tuple(dict.fromkeys((*blamed, *names))))


def _nearest(kind: str, names: frozenset[str], misses: tuple[NearMiss, ...]) -> NearMiss | None:
    """The refusal of a complete match at the site, else the partial match that went furthest."""
    candidates = [miss for miss in misses if miss.kind == kind and names & {miss.node, *_blamed(miss)}]
    return max(candidates, key=lambda m: (m.site is not None, m.node in names, m.depth), default=None)


def _blamed(miss: NearMiss) -> tuple[str, ...]:
    return miss.site.nodes if miss.site is not None else ()


def _explain(miss: NearMiss) -> str:
    if miss.site is not None:
        return miss.site.reason
    nodes = "1 node" if miss.depth == 1 else f"{miss.depth} nodes"
    return f"matched {nodes} of the spelling {miss.spelling!r}; then: {miss.reason}"
