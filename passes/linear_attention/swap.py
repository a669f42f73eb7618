"""Exchanging modules that compute softmax attention: which are meant, which can be, and what a report says of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxopt.errors import OptionError
from fxopt.ir.nodes import source, tensor
from fxopt.ir.site import Site
from fxopt.passes.linear_attention.calling import CapturedCalls
from fxopt.passes.linear_attention.capture import Isolated, attentions, canonical, isolated
from fxopt.passes.linear_attention.graphs import Making
from fxopt.passes.linear_attention.meaning import Kept, Proof, prove, read_attention
from fxopt.passes.linear_attention.module import RESERVED, LinearisedModule, Transition, keep_padded
from fxopt.passes.linear_attention.replace import Form
from fxopt.rewriter.progressive import Call, Preparation, Progressive, Student, exchange, inlining


@dataclass(frozen=True)
class Plan:
    """What one attention is to become.

    Attributes:
        title: in words.
        side: the side of the grid, 0 without a convolution.
        first: tokens before the grid.
        parameters: new ones by role, of the dtype and device of ``like``.
    """

    title: str
    side: int = 0
    first: int = 0
    parameters: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Swap:
    """How a pass exchanges attentions: its name and options, and what it makes of one, or why it can't.

    ``lengths`` says that sequences may have any length; ``plan`` gets the site, what is kept of it, and a tensor of the
    dtype and device that new parameters get.
    """

    rule: str
    select: tuple[str, ...]
    drop: tuple[str, ...]
    eps: float
    transition: Transition
    lengths: bool
    plan: Callable[[Node, Kept, Tensor], Plan | str]


@dataclass(frozen=True)
class _Owner:
    """The smallest module that computes an attention, and its program alone; ``proofs`` are what the
    model's program says of each of its attentions.
    """

    name: str
    captured: Isolated
    proofs: tuple[Proof, ...] = ()

    def proof(self, place: int) -> Proof:
        """What is proved of one of its attentions; a module that is called several times has them all again."""
        count = len(attentions(self.captured.program))
        same = set(self.proofs[place::count])
        return same.pop() if len(same) == 1 else Proof()


def swap_attentions(student: Student, swap: Swap) -> Preparation:
    """Exchange every selected module of the student whose attentions can be linear.

    Raises:
        OptionError: a pattern of ``select`` fits no module that computes attention.
    """
    program = canonical(student.program)
    known: dict[str, _Owner | str | None] = {}
    found = [(site, _owner(student, site, swap, known)) for site in attentions(program)]
    names = list(dict.fromkeys(owner.name for _, owner in found if isinstance(owner, _Owner)))
    proofs = _proofs(found, swap.drop)
    for pattern in swap.select:
        if pattern != "*" and not any(fnmatchcase(name, pattern) for name in names):
            raise OptionError(f"select={pattern!r} fits no attention; they are in: {', '.join(names) or 'none'}")
    done: dict[str, tuple[bool, str]] = {}
    sites = []
    for site, owner in found:
        if isinstance(owner, _Owner) and owner.name not in done:
            done[owner.name] = _treat(student, replace(owner, proofs=proofs[owner.name]), swap)
        exchanged, reason = done[owner.name] if isinstance(owner, _Owner) else (False, owner)
        status = "rewritten" if exchanged else "kept"
        place = source(site)
        place = replace(place, module=place.module.partition("@")[0])
        sites.append(Site("attention", status, swap.rule, reason, place, (site.name,)))  # type: ignore[arg-type]
    return Preparation(tuple(sites))


def _proofs(found: list[tuple[Node, _Owner | str]], drop: tuple[str, ...]) -> dict[str, tuple[Proof, ...]]:
    """What the model's program says of each module's attentions, which one module alone can't tell."""
    proofs: dict[str, tuple[Proof, ...]] = {}
    for site, owner in found:
        if isinstance(owner, _Owner):
            proofs[owner.name] = (*proofs.get(owner.name, ()), prove(site, drop))
    return proofs


def _owner(student: Student, site: Node, swap: Swap, known: dict[str, _Owner | str | None]) -> _Owner | str:
    """The smallest module that holds the whole attention, or why there is none."""
    for name in _around(source(site).module.partition("@")[0]):
        if not name:
            break
        if name in student.calls and name not in known:
            known[name] = _read_owner(student, name, swap)
        owner = known.get(name)
        if owner is not None:
            return owner
    return "the model itself computes the attention; prepare a model that holds it in a module of its own"


def _around(name: str) -> Iterator[str]:
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        yield ".".join(parts[:count])


def _read_owner(student: Student, name: str, swap: Swap) -> _Owner | str | None:
    module = student.model.get_submodule(name)
    around = inlining(student.model, name)
    if isinstance(module, Progressive) or around is not None:
        return f"{around or name} was exchanged by another pass"
    captured = isolated(module, student.calls[name][0], training=False, lengths=swap.lengths)
    if isinstance(captured, str):
        return captured
    found = replace(captured, program=canonical(captured.program))
    return _Owner(name, found) if attentions(found.program) else None


def _treat(student: Student, owner: _Owner, swap: Swap) -> tuple[bool, str]:
    """Exchange one module if that is possible; whether it was, and what it became or why it stays."""
    module, calls = student.model.get_submodule(owner.name), student.calls[owner.name]
    objection = _objection(module, owner.name, calls, swap)
    if objection:
        return False, objection
    blends = swap.transition.blends
    own = next((p.detach() for p in module.parameters() if p.is_floating_point()), None)
    sites = attentions(owner.captured.program)
    like = torch.empty(0, dtype=tensor(sites[0]).dtype, device=tensor(sites[0]).device) if own is None else own
    forms: list[Form] = []
    titles: list[str] = []
    parameters: dict[str, nn.Parameter] = {}
    proofs = tuple(owner.proof(place) for place in range(len(sites)))
    for place, (site, proof) in enumerate(zip(sites, proofs, strict=True)):
        kept = read_attention(site, swap.drop, proof)
        plan = kept if isinstance(kept, str) else swap.plan(site, kept, like)
        if isinstance(plan, str) or isinstance(kept, str):
            return False, str(plan)
        names = {role: _new_name(module, role, place, len(sites)) for role in plan.parameters}
        parameters |= {names[role]: nn.Parameter(value) for role, value in plan.parameters.items()}
        forms.append(Form(kept, plan.side, plan.first, swap.eps, names))
        titles.append(plan.title + _remarks(kept, plan))
    if own is None and not parameters and blends:
        return False, "it holds no parameter whose optimiser could drive a schedule; give steps=0 and warmup=0"
    making = Making(module, calls[0], tuple(forms), parameters, swap.drop, swap.lengths, blends)
    graphs = making.graphs(owner.captured, proofs)
    if isinstance(graphs, str):
        return False, graphs
    title = "; ".join(dict.fromkeys(titles))
    named = f"{owner.name} ({type(module).__name__})"
    training, evaluation = (CapturedCalls(named, graph) for graph in graphs)
    new = LinearisedModule(module, parameters, training, evaluation, swap.transition, title).train(module.training)
    exchange(student.model, module, new)
    keep_padded(student.model, new)
    return True, f"softmax attention -> {title}"


def _remarks(kept: Kept, plan: Plan) -> str:
    assumed = "empty" if kept.assumed and plan.side else kept.assumed
    without = f", without {' and '.join(kept.dropped)}" if kept.dropped else ""
    return without + (f"; its mask is {assumed}, as in the example call" if assumed else "")


def _new_name(module: nn.Module, role: str, place: int, count: int) -> str:
    """The name of a new parameter: where the module has several attentions, numbered."""
    name = {"positions": "key_positions", "weight": "depthwise_weight", "bias": "depthwise_bias"}[role]
    name = f"{name}_{place}" if count > 1 else name
    while hasattr(module, name):
        name = f"linear_{name}"
    return name


def _objection(module: nn.Module, name: str, calls: tuple[Call, ...], swap: Swap) -> str:
    if not any(fnmatchcase(name, pattern) for pattern in swap.select):
        return f"select={list(swap.select)} leaves it out"
    hooked = [n for n, inner in module.named_modules() if inner._forward_hooks or inner._forward_pre_hooks]
    if hooked:
        return f"{hooked[0] or 'it'} has forward hooks, which would be lost"
    progressive = [n for n, inner in module.named_modules() if isinstance(inner, Progressive)]
    if progressive:
        return f"{progressive[0]} in it is exchanged already; a captured graph could not follow its steps"
    held = (*module._parameters, *module._buffers, *module._modules)
    taken = [held_name for held_name in held if held_name in RESERVED]
    if taken:
        return f"it holds {taken[0]!r}, a name that the module in its place needs itself"
    if len({str(_described(call)) for call in calls}) > 1:
        return "it is called with arguments of several kinds in one forward"
    return ""


def _described(call: Call) -> list[object]:
    leaves = torch.utils._pytree.tree_leaves((call.args, dict(call.kwargs)))
    return [(tuple(x.shape), x.dtype) if isinstance(x, Tensor) else x for x in leaves]
