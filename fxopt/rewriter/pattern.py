"""Patterns: values that describe a piece of graph, matched from its last node upwards.

A pattern names everything that carries meaning. An argument that a pattern does not mention must have its schema
default: there is no wildcard over axes, permutations, scales or epsilons, only over operands that are given a name.
Casts to the dtype that an operand already has, and slices of everything, are looked through.

    >>> square = Op(aten.pow.Tensor_Scalar, Var("x"), Literal(2))
    >>> mean = Op(aten.mean.dim, square, Const("axes"), Const("keepdim"))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node

from fxopt.ir.nodes import arguments, parameters, scalar, tensor

aten = torch.ops.aten

#: Calls that give their first operand in another dtype (a change of device is not one; see `cast_operand`).
CASTS = (
    aten.to.dtype, aten.to.dtype_layout, aten.to.other, aten.to.device, aten.type_as.default, aten._to_copy.default,
)  # fmt: skip
_END = 2**63 - 1
_GRADIENT_SWITCH = torch._C._set_grad_enabled


@dataclass(frozen=True)
class Match:
    """A pattern found in a graph: the operands by name, and the operation nodes it covers (the root first)."""

    root: Node
    values: dict[str, Any] = field(default_factory=dict)
    nodes: tuple[Node, ...] = ()

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def get(self, name: str) -> Any:
        """The operand called ``name``, or ``None`` when the accepted alternative does not have it."""
        return self.values.get(name)

    def bind(self, name: str, value: Any) -> Match | Miss:
        """This match with one more operand; a name bound twice must be bound to the same thing."""
        if name in self.values and self.values[name] is not value and self.values[name] != value:
            return Miss(len(self.nodes), f"{name} is both {self.values[name]} and {value}", self.root)
        return Match(self.root, {**self.values, name: value}, self.nodes)

    def cover(self, node: Node) -> Match:
        """This match with one more operation node."""
        return self if node in self.nodes else Match(self.root, self.values, (*self.nodes, node))


@dataclass(frozen=True)
class Miss:
    """Where a pattern stopped matching: after how many nodes, why, and at which node."""

    depth: int
    reason: str
    node: Node


class Pattern:
    """Base of the pattern values."""

    def match(self, value: Any, so_far: Match) -> Match | Miss:
        """Extend ``so_far`` by ``value``, or say why it does not fit."""
        raise NotImplementedError

    def roots(self) -> frozenset[object] | None:
        """The operators that the last node of a match can be; ``None`` when the pattern does not restrict it."""
        return None

    def __or__(self, other: Pattern) -> Pattern:
        return OneOf((self, other))


@dataclass(frozen=True)
class Var(Pattern):
    """Any operand computed by a graph node, bound to ``name``."""

    name: str

    def match(self, value: Any, so_far: Match) -> Match | Miss:
        if not isinstance(value, Node):
            return Miss(len(so_far.nodes), f"{self.name} is {value!r}, not a tensor", so_far.root)
        return so_far.bind(self.name, value)


@dataclass(frozen=True)
class Const(Pattern):
    """A constant argument (number, dtype, list, ``None`` …), bound to ``name``; ``accept`` restricts it."""

    name: str
    accept: Callable[[Any], bool] = lambda value: True

    def match(self, value: Any, so_far: Match) -> Match | Miss:
        number = scalar(value)
        value = value if number is None else number
        if isinstance(value, Node) or not self.accept(value):
            return Miss(len(so_far.nodes), f"{self.name} = {value} is not accepted", so_far.root)
        return so_far.bind(self.name, value)


@dataclass(frozen=True)
class Anything(Pattern):
    """An argument that the rule's check reads itself from the node (the root's arguments are all at hand there)."""

    def match(self, value: Any, so_far: Match) -> Match | Miss:
        return so_far


@dataclass(frozen=True)
class Literal(Pattern):
    """Exactly this constant argument."""

    value: Any

    def match(self, value: Any, so_far: Match) -> Match | Miss:
        number = scalar(value)
        found = value if number is None else number
        if isinstance(found, Node) or found != self.value:
            return Miss(len(so_far.nodes), f"expected {self.value!r}, found {found!r}", so_far.root)
        return so_far


class Op(Pattern):
    """A call of one of ``targets`` whose leading arguments, in schema order, fit ``operands``.

    ``named`` gives patterns for arguments by schema name. ``commutative`` also tries the first two operands swapped.
    Operands are matched in the order in which they are written here, so a later one may refer to an earlier one.
    Arguments without a pattern must have their default. ``name`` binds the node itself.
    """

    def __init__(
        self,
        targets: OpOverload | tuple[OpOverload, ...],
        *operands: Pattern,
        commutative: bool = False,
        name: str | None = None,
        **named: Pattern,
    ) -> None:
        self.targets = targets if isinstance(targets, tuple) else (targets,)
        self.operands = operands
        self.commutative = commutative
        self.name = name
        self.named = named
        self.title = " or ".join(target._schema.name.partition("::")[2] for target in self.targets)

    def match(self, value: Any, so_far: Match) -> Match | Miss:
        if not isinstance(value, Node) or value.target not in self.targets:
            where = value if isinstance(value, Node) else so_far.root
            return Miss(len(so_far.nodes), f"expected {self.title}, found {value}", where)
        covered = so_far.cover(value)
        result = covered.bind(self.name, value) if self.name else covered
        if isinstance(result, Miss):
            return result
        names, _ = parameters(value.target)
        orders = [names]
        if self.commutative:
            orders.append((names[1], names[0], *names[2:]))
        return _furthest(lambda order: self._match_arguments(value, order, result), orders)

    def roots(self) -> frozenset[object] | None:
        return frozenset(self.targets)

    def _match_arguments(self, node: Node, order: tuple[str, ...], so_far: Match) -> Match | Miss:
        given = arguments(node)
        patterns = dict(zip(order, self.operands, strict=False)) | self.named
        for name, pattern in patterns.items():
            step = pattern.match(behind_identities(given.get(name)), so_far)
            if isinstance(step, Miss):
                return step
            so_far = step
        names, defaults = parameters(node.target)
        for name in names:
            value = given.get(name)
            default = name in defaults and value == defaults[name]
            if name not in patterns and not default:
                return Miss(len(so_far.nodes), f"{name} = {value} is not part of the pattern", node)
        return so_far

    def __str__(self) -> str:
        return self.title


@dataclass(frozen=True)
class OneOf(Pattern):
    """The first alternative that fits."""

    alternatives: tuple[Pattern, ...]

    def match(self, value: Any, so_far: Match) -> Match | Miss:
        return _furthest(lambda pattern: pattern.match(value, so_far), self.alternatives)

    def roots(self) -> frozenset[object] | None:
        found = [alternative.roots() for alternative in self.alternatives]
        return None if None in found else frozenset().union(*(f for f in found if f))

    def __or__(self, other: Pattern) -> Pattern:
        return OneOf((*self.alternatives, other))


@dataclass(frozen=True)
class Optional(Pattern):
    """``inner(pattern)`` or, where that does not fit, ``pattern`` alone: an operation that may be absent."""

    inner: Callable[[Pattern], Pattern]
    pattern: Pattern

    def match(self, value: Any, so_far: Match) -> Match | Miss:
        return OneOf((self.inner(self.pattern), self.pattern)).match(value, so_far)

    def roots(self) -> frozenset[object] | None:
        return OneOf((self.inner(self.pattern), self.pattern)).roots()


def find(pattern: Pattern, root: Node) -> Match | Miss:
    """Match ``pattern`` with its last operation at ``root``.

    All covered operations must run with gradients recorded, or all without: one operator in place of several can't
    cut the gradient of some of them.
    """
    found = pattern.match(root, Match(root))
    if isinstance(found, Miss) or not root.graph.find_nodes(op="call_function", target=_GRADIENT_SWITCH):
        return found
    mode = _records_gradients(root)
    for node in found.nodes:
        if _records_gradients(node) != mode:
            return Miss(len(found.nodes), f"only one of {node} and {root} is inside no_grad", node)
    return found


def cast_operand(value: object) -> Node | None:
    """What ``value`` is a cast of, if it is a cast that stays on its device and copies no more than it must."""
    if not isinstance(value, Node) or value.target not in CASTS:
        return None
    given = arguments(value)
    operand = value.args[0]
    if given.get("copy") or given.get("memory_format") is not None or not isinstance(operand, Node):
        return None
    return operand if tensor(operand).device == tensor(value).device else None


def behind_identities(value: Any) -> Any:
    """``value`` without casts to the dtype that it already has and slices of everything."""
    operand = _identity_operand(value)
    while operand is not None:
        value, operand = operand, _identity_operand(operand)
    return value


def _identity_operand(value: object) -> Node | None:
    operand = cast_operand(value)
    if operand is not None:
        return operand if tensor(operand).dtype == tensor(value).dtype else None
    if not isinstance(value, Node) or value.target is not aten.slice.Tensor:
        return None
    given = arguments(value)
    whole = given["start"] in (0, None) and given["end"] in (_END, None) and given["step"] == 1
    return value.args[0] if whole and isinstance(value.args[0], Node) else None


def _records_gradients(node: Node) -> bool:
    before = node.prev
    while before.op != "root" and before.target is not _GRADIENT_SWITCH:
        before = before.prev
    return before.op == "root" or bool(before.args[0])


def _furthest(attempt: Callable[[Any], Match | Miss], choices: Any) -> Match | Miss:
    best: Miss | None = None
    for choice in choices:
        result = attempt(choice)
        if isinstance(result, Match):
            return result
        if best is None or result.depth > best.depth:
            best = result
    assert best is not None, "a pattern needs at least one alternative"
    return best
