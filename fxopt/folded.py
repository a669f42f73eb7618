"""Folded weights of a program: computed once from the model's own, kept, and renewed when one of those changes."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad
from torch.fx import Node

from fxopt.ir.nodes import FOLDED
from fxopt.ir.program import Program
from fxopt.rewriter.passes import erase_unused


@dataclass(frozen=True)
class Division:
    """A program in two: what computes folded weights from weights, and the rest, which reads them as inputs.

    Attributes:
        prologue: takes the weights called ``sources`` and gives the folded ones, in the order of ``names``.
        sources: parameters and buffers, by name.
        constants: tensors of the program itself that folded weights are made of too.
        names: the folded weights; each names the parameter or buffer that it stands in for first of all.
        rest: takes what the program takes, then the folded weights.
    """

    prologue: fx.GraphModule
    sources: tuple[str, ...]
    constants: tuple[Tensor, ...]
    names: tuple[str, ...]
    rest: fx.GraphModule


def divide(program: Program) -> Division | None:
    """The two parts of ``program``; ``None`` if it has no folded weights."""
    roots = [node for node in program.graph.nodes if FOLDED in node.meta]
    if not roots or program.signature is None:
        return None
    bound = program.signature.bound
    cone = _cone(program, roots)
    sources = [node for node in program.graph.find_nodes(op="placeholder") if node in cone]
    prologue, computed = _prologue(program, roots, cone, sources)
    distinct = list(dict.fromkeys(computed))
    names = _names(roots, computed, bound)
    rest = _rest(program, roots, [distinct.index(node) for node in computed], names)
    constants = tuple(_attribute(program, node) for node in cone if node.op == "get_attr")
    return Division(prologue, tuple(bound[node.name] for node in sources), constants, names, rest)


def _attribute(program: Program, node: Node) -> Tensor:
    value: Any = operator.attrgetter(str(node.target))(program.module)
    assert isinstance(value, Tensor)
    return value


def _cone(program: Program, roots: list[Node]) -> set[Node]:
    needed, pending = set(roots), list(roots)
    while pending:
        fresh = [node for node in pending.pop().all_input_nodes if node not in needed]
        needed.update(fresh)
        pending.extend(fresh)
    return needed


def _prologue(
    program: Program, roots: list[Node], cone: set[Node], sources: list[Node]
) -> tuple[fx.GraphModule, list[Node]]:
    """The graph of the folded weights, equal computations made once, and its node for each of ``roots``."""
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in sources}
    made: dict[str, Node] = {}
    for node in (n for n in program.graph.nodes if n in cone and n not in copies):
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), copies.__getitem__)
        key = str((node.op, node.target, args, kwargs))
        if key not in made:
            made[key] = graph.node_copy(node, copies.__getitem__)
        copies[node] = made[key]
    computed = [copies[root] for root in roots]
    graph.output(tuple(dict.fromkeys(computed)))
    return fx.GraphModule(program.module, graph, "FoldedWeights"), computed


def _names(roots: list[Node], computed: list[Node], bound: Mapping[str, str]) -> tuple[str, ...]:
    """A name for each distinct folded weight, after the parameter whose place it takes."""
    names: dict[Node, str] = {}
    for root, node in zip(roots, computed, strict=True):
        like = root.args[1]
        assert isinstance(like, Node)
        stem = bound.get(like.name, like.name).replace(".", "_")
        taken = set(names.values())
        fitting = next(name for i in range(len(roots) + 1) if (name := f"{stem}_{i}" if i else stem) not in taken)
        names.setdefault(node, fitting)
    return tuple(names.values())


def _rest(program: Program, roots: list[Node], places: list[int], names: tuple[str, ...]) -> fx.GraphModule:
    rest = program.copy()
    by_name = {node.name: node for node in rest.graph.nodes}
    last = rest.graph.find_nodes(op="placeholder")[-1]
    inputs = []
    for name in names:
        with rest.graph.inserting_after(last):
            last = rest.graph.placeholder(f"folded_{name}")
        inputs.append(last)
    for root, place in zip(roots, places, strict=True):
        node, new = by_name[root.name], inputs[place]
        new.meta.update(val=node.meta["val"])
        node.replace_all_uses_with(new)
        erase_unused(rest, node)
    rest.graph.lint()
    rest.module.recompile()
    return rest.generated()


def undivided(program: Program, division: Division, folder: str) -> Program:
    """The rest of ``program`` as a program of its own, whose folded weights are the buffers of the module ``folder``.

    Weights that only folded ones are made of are no inputs of it any more.
    """
    assert program.signature is not None
    rest = replace(program, module=division.rest).copy()
    inputs = rest.graph.find_nodes(op="placeholder")
    taken = len(inputs) - len(division.names)
    bound = {**program.signature.bound}
    for node in inputs[:taken]:
        if node.name in bound and not node.users:
            del bound[node.name]
            rest.graph.erase_node(node)
    for node, name in zip(inputs[taken:], division.names, strict=True):
        bound[node.name] = f"{folder}.{name}"
    rest.module.recompile()
    return replace(rest, signature=replace(program.signature, bound=bound))


def is_transformed(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a weight of one call of a functional transform, or has a tangent: nothing to keep."""
    if torch.compiler.is_compiling():
        return False
    return bool(is_functorch_wrapped_tensor(tensor)) or forward_ad.unpack_dual(tensor).tangent is not None


def renew(folded: list[Tensor | None], values: tuple[Tensor, ...]) -> list[Tensor]:
    """``values`` in the memory of what was kept before, where it fits, so that compiled code sees them."""
    return [_renewed(old, new) for old, new in zip(folded, values, strict=True)]


def _renewed(old: Tensor | None, new: Tensor) -> Tensor:
    alike = old is not None and (old.shape, old.dtype, old.device) == (new.shape, new.dtype, new.device)
    return operator.methodcaller("copy_", new)(old) if alike else new
