"""Lowering: every canonical operator becomes what was chosen to run it."""

from __future__ import annotations

import operator as python_operator
from functools import partial
from typing import Final

import torch
from torch.fx import Node

import fxopt.codegen.meanings  # noqa: F401 - canonical operators decompose into their references
from fxopt.ir.decision import Decision
from fxopt.ir.nodes import source, tensor
from fxopt.ir.operators import overload
from fxopt.ir.program import Program
from fxopt.lowering import mlp, residual_norm, together
from fxopt.lowering.attention import choose, prepare
from fxopt.lowering.base import get_ready
from fxopt.lowering.candidate import DRAW_SEED, SEED_RANGE, Candidate, seed_options
from fxopt.lowering.packed import forget
from fxopt.lowering.postponed import Postponed
from fxopt.lowering.probe import Base
from fxopt.rewriter.builder import Builder
from fxopt.rewriter.passes import difference

_LOWERED: Final = (
    "attention", "attention_with_lse", "attention_weights", "attention_statistics", "linear_attention",
)  # fmt: skip
#: What lowers pieces that the base compiler could make as well.
_CONTESTED: Final = (residual_norm, mlp)


def lower(
    program: Program,
    *,
    training: bool,
    option: str = "auto",
    strict: bool = False,
    base: Base | None = None,
    postponed: Postponed | None = None,
) -> tuple[Program, tuple[Decision, ...]]:
    """A copy of ``program`` in which every site runs as decided, and the decisions.

    Canonical operators other than attention, its weights, linear attention, residual norms and feed-forward blocks
    decompose into their reference, which the base compiler fuses; ``base`` says how it will compile the rest of the
    graph. What ``postponed`` puts off is decided on when that is finished; until then its candidates are built.
    """
    lowered = program.copy()
    # Outputs first: one may be computed from weights that another node computes anyway.
    sites = [site for name in _LOWERED for site in _calls(lowered, name)]
    pieces = [(kind, site) for kind in _CONTESTED for name in kind.NAMES for site in _calls(lowered, name)]
    devices = {tensor(site.args[0]).device for site in (*sites, *(site for _, site in pieces))}
    # Candidates that draw random numbers do so when they are measured; the program's own must not depend on that.
    with torch.random.fork_rng([device for device in devices if device.type == "cuda"]):
        groups = together.groups(lowered)
        grouped = {site for group in groups for site in group.members}
        later = {site: None if site in grouped else postponed and postponed.put_off(site.name) for site in sites}
        if option == "auto":
            now = [site for site in sites if later[site] is None]
            prepare(now, training, [partial(get_ready, (base or Base()).options)])
        choices = {site: later[site] or choose(site, training, option, strict) for site in sites}
        decisions = [d for group in groups if (d := _lower_group(lowered, group, choices, training, option))]
        decisions += [_lower_site(lowered, *choice) for choice in choices.items()]
        for kind, site in pieces:
            decisions.append(_lower_site(lowered, site, kind.choose(site, training, option, strict, base)))
    lowered.graph.lint()
    lowered.module.recompile()
    if postponed is not None:
        postponed.start()
    return lowered, tuple(decisions)


def _calls(program: Program, name: str) -> list[Node]:
    return list(program.graph.find_nodes(op="call_function", target=overload(name)))


def _lower_group(
    program: Program, group: together.Group, choices: dict[Node, together.Choice], training: bool, option: str
) -> Decision | None:
    """The decision for a whole group, whose members are no longer among ``choices``; ``None`` where they stay apart."""
    choice = together.choose(group, choices, training, option)
    if choice is None:
        return None
    together.write(program, group, choice)
    for node in group.members:
        del choices[node]
    return choice[1]


def _lower_site(program: Program, site: Node, choice: tuple[Candidate, Decision]) -> Decision:
    candidate, decision = choice
    if candidate.target is site.target:
        return decision
    new = _write(Builder(program, site, f"lower-{candidate.family}"), site, candidate)
    flaw = difference(site, new)
    if flaw:
        return Decision((site.name,), "aten", f"{candidate.name} would give {flaw} at {source(site)}")
    name, operands = site.name, site.all_input_nodes
    site.replace_all_uses_with(new)
    program.graph.erase_node(site)
    for operand in operands:
        forget(operand)
    return Decision((name,), decision.chosen, decision.reason, decision.seconds)


def _write(builder: Builder, site: Node, candidate: Candidate) -> Node:
    assert isinstance(candidate.target, torch._ops.OpOverload)
    operands = site.args if candidate.arguments is None else candidate.arguments
    device = tensor(site.args[0]).device
    seeds = (builder.call(DRAW_SEED, *SEED_RANGE, **seed_options(device)),) if candidate.seeded else ()
    call = builder.call(candidate.target, *operands, *candidate.extra, *seeds)
    return builder.call(python_operator.getitem, call, 0) if candidate.first else call
