"""Numeric verification: every rewritten site and what it replaced, run on the site's own shapes against float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Final

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

from fxopt.analysis.constants import Constants
from fxopt.errors import VerificationError
from fxopt.ir.attention import read_spec
from fxopt.ir.nodes import is_call, is_tensor, tensor
from fxopt.ir.operators import overload
from fxopt.ir.program import Program
from fxopt.rewriter.passes import PassResult, Replacement
from fxopt.testing.budget import compare
from fxopt.testing.draws import equal_draws
from fxopt.testing.evaluation import evaluate
from fxopt.testing.inputs import draw
from fxopt.testing.oracle import oracle_gradients

_DISTRIBUTIONS: Final = ("normal", "large", "equal")


def verify_numerically(before: Program, after: Program, outcome: PassResult) -> None:
    """Check each rewritten site of a pass on its own operands' shapes: outputs and gradients within the error budget.

    Operands are drawn from normal, large and constant values; what depends on no input but buffers keeps its real
    value. The oracle is the replaced region in float64; the budget derives from its error in its own dtype. Where
    there is dropout, all three drop the same weights; how a lowered kernel draws them is not looked at here.

    Raises:
        VerificationError: names the rule, the user's line and the result that left its budget.
    """
    constants = Constants(before, buffers=True)
    for replacement in outcome.replacements:
        if replacement.site.kind:
            _verify_site(before, after, replacement, constants)


def _verify_site(before: Program, after: Program, replacement: Replacement, constants: Constants) -> None:
    roots = _roots(before, after, replacement)
    if not roots:
        return
    old, new = (list(nodes) for nodes in zip(*roots, strict=True))
    old_names = {node.name for node in before.graph.nodes} - _below(new)
    new_names = {node.name for node in after.graph.nodes} - _below(old)
    shared = {*_boundary(old, new_names), *_boundary(new, old_names)}
    by_name = {node.name: node for node in before.graph.nodes}
    inputs = [by_name[name] for name in sorted(shared)]
    original = _callable(before, old, inputs)
    rewritten = _callable(after, new, inputs)
    # Fused kernels draw numbers as their dtype suits them, which says nothing about a rewrite.
    draws = equal_draws() if any(map(_drops, _cone(after, new, set()))) else nullcontext()
    with unset_fake_temporarily(), draws:
        for distribution in _DISTRIBUTIONS:
            operands = _operands(inputs, constants, distribution)
            _check(original, rewritten, operands, replacement, distribution)


def _drops(node: fx.Node) -> bool:
    return (
        is_call(node, overload("attention"), overload("attention_with_lse"))
        and read_spec(str(node.args[4])).dropout > 0
    )


def _check(
    original: Callable[..., Any],
    rewritten: Callable[..., Any],
    operands: Sequence[Any],
    replacement: Replacement,
    distribution: str,
) -> None:
    torch.manual_seed(0)
    eager = evaluate(original, *operands)
    torch.manual_seed(0)
    reference = oracle_gradients(original, *operands)
    torch.manual_seed(0)
    actual = evaluate(rewritten, *operands)
    failures = [report for report in compare(actual, eager, reference, floor=1.0) if not report.ok]
    if failures:
        raise VerificationError(
            f"rule {replacement.rule} at {replacement.site.source} leaves the error budget on {distribution} inputs: "
            f"{failures[0]}"
        )


def _roots(before: Program, after: Program, replacement: Replacement) -> list[tuple[fx.Node, fx.Node]]:
    """Every replaced node of the old graph, with the node that took its place in the new one."""
    old = {node.name: node for node in before.graph.nodes}
    new = {node.name: node for node in after.graph.nodes}
    names = [(a, b) for a, b in replacement.outputs if a in old and b in new]
    if names:
        return [(old[a], new[b]) for a, b in names]
    # What took its place was replaced in turn by a later rule of the pass: the last of the site's nodes that are left.
    created = [node for node in after.graph.nodes if node.name in replacement.site.nodes[1:]]
    first = old.get(replacement.site.nodes[0])
    return [(first, created[-1])] if first is not None and created else []


def _boundary(roots: Sequence[fx.Node], known: set[str]) -> set[str]:
    """Names of the nearest nodes above ``roots`` that the other graph has too (constants aside)."""
    found: set[str] = set()
    pending, seen = list(roots), set(roots)
    while pending:
        node = pending.pop()
        if node not in roots and node.name in known:
            found.add(node.name)
            continue
        fresh = [n for n in node.all_input_nodes if n not in seen]
        seen.update(fresh)
        pending.extend(fresh)
    return found


def _below(roots: Sequence[fx.Node]) -> set[str]:
    """Names of everything that is computed from ``roots``: a value in both graphs, but not the same one."""
    below = set(roots)
    for node in roots[0].graph.nodes:
        if not below.isdisjoint(node.all_input_nodes):
            below.add(node)
    return {node.name for node in below}


def _callable(program: Program, roots: Sequence[fx.Node], inputs: Sequence[fx.Node]) -> Callable[..., Any]:
    """The part of ``program`` from ``inputs`` to ``roots`` as a function."""
    graph = fx.Graph()
    made = {node.name: graph.placeholder(node.name) for node in inputs}
    copies: dict[fx.Node, fx.Node] = {n: made[n.name] for n in program.graph.nodes if n.name in made}
    for node in _cone(program, roots, set(copies)):
        copies[node] = graph.node_copy(node, lambda operand: copies[operand])
    graph.output(tuple(copies[root] for root in roots))
    return fx.GraphModule(program.module, graph)


def _cone(program: Program, roots: Sequence[fx.Node], stop: set[fx.Node]) -> list[fx.Node]:
    needed, pending = set(roots), list(roots)
    while pending:
        fresh = [n for n in pending.pop().all_input_nodes if n not in needed and n not in stop]
        needed.update(fresh)
        pending.extend(fresh)
    return [node for node in program.graph.nodes if node in needed]


def _operands(inputs: Sequence[fx.Node], constants: Constants, distribution: str) -> list[Any]:
    """A value for each of ``inputs``; truth values that are made of others of them agree with those."""
    drawn = {node: _operand(node, constants, distribution, seed) for seed, node in enumerate(inputs)}
    for node in (n for n in inputs[0].graph.nodes if n in drawn) if inputs else ():
        made = node.op == "call_function" and is_tensor(node) and tensor(node).dtype is torch.bool
        if made and node.all_input_nodes and all(n in drawn for n in node.all_input_nodes):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), drawn.__getitem__)
            drawn[node] = node.target(*args, **kwargs)
    return [drawn[node] for node in inputs]


def _operand(node: fx.Node, constants: Constants, distribution: str, seed: int) -> Any:
    value = node.meta["val"]
    if constants.is_constant(node):
        return constants.value(node)
    if not isinstance(value, Tensor):
        return int(value.node.hint) if isinstance(value, torch.SymInt) else value
    sizes = [s if isinstance(s, int) else int(s.node.hint) for s in value.shape]
    if value.dtype is torch.bool:
        return draw(sizes, seed=seed, device=value.device) > -0.5
    if not value.dtype.is_floating_point:
        return torch.zeros(sizes, dtype=value.dtype, device=value.device)
    return draw(sizes, distribution, dtype=value.dtype, device=value.device, seed=seed).requires_grad_()
