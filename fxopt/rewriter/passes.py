"""The pass contract: what a pass is, what it gives back, and passes made of rules."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch.fx import Node

from fxopt.ir.nodes import has_effect, same_shape, source
from fxopt.ir.program import Program, operator_name
from fxopt.ir.site import Site, Tier
from fxopt.rewriter.builder import Builder
from fxopt.rewriter.pattern import Miss, Pattern, find
from fxopt.rewriter.rule import Rejection, Rule


@dataclass(frozen=True)
class Replacement:
    """One rewrite that was applied: the rule, the spelling it matched, and what stood where.

    ``outputs`` are the names of every replaced value and of what took its place, the site's own first.
    """

    rule: str
    spelling: str
    site: Site
    operator: str
    outputs: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class NearMiss:
    """The best partial match of a rule at one node: how many nodes fitted, and why the next did not."""

    rule: str
    spelling: str
    depth: int
    reason: str
    node: str
    kind: str = ""
    site: Site | None = None


@dataclass(frozen=True)
class PassResult:
    """What a pass did to the program it was given (which it edited in place)."""

    modified: bool
    replacements: tuple[Replacement, ...] = ()
    near_misses: tuple[NearMiss, ...] = ()


@runtime_checkable
class Pass(Protocol):
    """A rewrite of a whole program.

    A pass is a frozen dataclass: ``name`` (kebab-case, its file's name), ``tier``, its options as typed fields, and
    `run`.
    It receives a valid program that it may edit freely and must leave a valid one; the pipeline verifies the result and
    puts the old program back when the pass fails. ``requires`` names passes that must have run before.
    """

    name: ClassVar[str]
    tier: ClassVar[Tier]
    requires: ClassVar[tuple[str, ...]]

    def run(self, program: Program) -> PassResult:
        """Rewrite ``program`` in place."""
        ...


@dataclass
class _Trace:
    replacements: list[Replacement] = field(default_factory=list)
    near_misses: dict[tuple[str, str], NearMiss] = field(default_factory=dict)

    def miss(self, miss: NearMiss) -> None:
        key = (miss.rule, miss.node)
        best = self.near_misses.get(key)
        if best is None or miss.depth > best.depth:
            self.near_misses[key] = miss


def apply_rules(program: Program, rules: Iterable[Rule]) -> PassResult:
    """Try every rule at every node, last node first, and replace what matches.

    The replacement must have the shape, dtype and device of what it replaces, or it is undone and recorded as a near
    miss. A rejection and the furthest partial match of two or more nodes are recorded too.
    """
    trace = _Trace()
    attempts = _by_root(rules)
    for node in reversed(list(program.graph.nodes)):
        if node.op == "call_function" and not node._erased:
            _rewrite_at(program, node, attempts.get(node.target, attempts[None]), trace)
    if trace.replacements:
        program.module.recompile()
    return PassResult(bool(trace.replacements), tuple(trace.replacements), tuple(trace.near_misses.values()))


@dataclass(frozen=True)
class _Attempt:
    """One spelling of one rule."""

    rule: Rule
    spelling: str
    pattern: Pattern


def _by_root(rules: Iterable[Rule]) -> dict[object, list[_Attempt]]:
    """What to try at a node, in order, by the operator that it calls; ``None`` is the key of all other operators."""
    attempts = [_Attempt(rule, name, pattern) for rule in rules for name, pattern in rule.patterns.items()]
    roots = [attempt.pattern.roots() for attempt in attempts]
    targets = {target for found in roots if found for target in found}
    index: dict[object, list[_Attempt]] = {None: [a for a, found in zip(attempts, roots, strict=True) if found is None]}
    for target in targets:
        index[target] = [a for a, found in zip(attempts, roots, strict=True) if found is None or target in found]
    return index


def _rewrite_at(program: Program, node: Node, attempts: list[_Attempt], trace: _Trace) -> None:
    for attempt in attempts:
        rule, spelling = attempt.rule, attempt.spelling
        found = find(attempt.pattern, node)
        if isinstance(found, Miss):
            _record_partial(rule, spelling, found, node, trace)
            continue
        bindings = rule.check(found)
        if bindings is None:
            continue
        if isinstance(bindings, Rejection):
            trace.miss(_rejected(rule, spelling, bindings, node, len(found.nodes)))
        elif _replace(program, node, rule, spelling, bindings, trace):
            return


def _record_partial(rule: Rule, spelling: str, miss: Miss, node: Node, trace: _Trace) -> None:
    if miss.depth > 1:
        trace.miss(NearMiss(rule.name, spelling, miss.depth, miss.reason, node.name, rule.kind))


def _rejected(rule: Rule, spelling: str, rejection: Rejection, node: Node, depth: int) -> NearMiss:
    blamed = tuple(n.name for n in rejection.nodes) or (node.name,)
    site = Site(rule.kind, "kept", rule.name, rejection.reason, source(node), blamed) if rule.kind else None
    return NearMiss(rule.name, spelling, 1000 + depth, rejection.reason, node.name, rule.kind, site)


def _replace(program: Program, node: Node, rule: Rule, spelling: str, bindings: object, trace: _Trace) -> bool:
    builder = Builder(program, node, rule.name)
    new = rule.rewrite(builder, bindings)
    replaced = [(node, new), *((further.old, further.new) for further in builder.further)]
    flaw = next(filter(None, (difference(before, after) for before, after in replaced)), "")
    if flaw:
        for created in _readers_first(builder.created):
            program.graph.erase_node(created)
        trace.miss(_rejected(rule, spelling, Rejection(f"the replacement would have {flaw}"), node, 0))
        return False
    covered = (node.name, *(n.name for n in builder.created))
    name = _chief_operator(new, builder)
    became = f"{spelling} -> {name}{_titles(builder)}"
    reason = "; ".join(text for text in (became, rule.describe(bindings)) if text)
    site = Site(rule.kind, "rewritten", rule.name, reason, source(node), covered)
    outputs = tuple((before.name, after.name) for before, after in replaced)
    for before, after in replaced:
        before.replace_all_uses_with(after)
        erase_unused(program, before)
    trace.replacements.append(Replacement(rule.name, spelling, site, name, outputs))
    return True


def _titles(builder: Builder) -> str:
    """What the site gives, where that is more than its result."""
    titles = dict.fromkeys(further.title for further in builder.further)
    return f" (out, {', '.join(titles)})" if titles else ""


def _readers_first(nodes: list[Node]) -> list[Node]:
    """``nodes`` in the reverse of their order in the graph."""
    order = {node: position for position, node in enumerate(nodes[0].graph.nodes)} if nodes else {}
    return sorted(nodes, key=lambda node: order[node], reverse=True)


def _chief_operator(new: Node, builder: Builder) -> str:
    """What a site became: the canonical operator among the new nodes, or else the last of them."""
    names = [operator_name(node) for node in builder.created]
    canonical = [name for name in names if name.startswith("fxopt.")]
    return canonical[-1] if canonical else operator_name(new) if new.op == "call_function" else new.name


def erase_unused(program: Program, node: Node) -> None:
    """Erase the replaced ``node`` if nothing reads it, then whatever only it read; effects and inputs stay.

    A random draw that only the replaced node read goes with it: the rule has taken it over.
    """
    pending = [node]
    while pending:
        current = pending.pop()
        effect = current is not node and has_effect(current)
        if current.users or current._erased or current.op == "placeholder" or effect:
            continue
        operands = current.all_input_nodes
        program.graph.erase_node(current)
        pending.extend(operands)


def difference(old: Node, new: Node) -> str:
    """How the value of ``new`` differs from that of ``old`` in shape, dtype or device; empty when it does not."""
    before: Any = old.meta.get("val")
    after: Any = new.meta.get("val")
    if not hasattr(before, "shape") or not hasattr(after, "shape"):
        return "" if type(before) is type(after) else f"type {type(after).__name__} instead of {type(before).__name__}"
    if not same_shape(tuple(before.shape), tuple(after.shape)):
        return f"shape {tuple(after.shape)} instead of {tuple(before.shape)}"
    if before.dtype != after.dtype:
        return f"dtype {after.dtype} instead of {before.dtype}"
    if before.device != after.device:
        return f"device {after.device} instead of {before.device}"
    return ""
