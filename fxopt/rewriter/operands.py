"""Patterns for operands that are not plain tensors or numbers: sizes, lists, parts of a tuple, casts."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fxopt.ir.nodes import is_tensor, tensor
from fxopt.rewriter.pattern import CASTS, Match, Miss, Pattern, behind_identities, cast_operand


@dataclass(frozen=True)
class Size(Pattern):
    """A size: an integer, or the graph node of a symbolic one, bound to ``name``."""

    name: str

    def match(self, value: Any, so_far: Match) -> Match | Miss:
        """See `Pattern.match`."""
        symbolic = isinstance(value, Node) and isinstance(value.meta.get("val"), int | torch.SymInt)
        if symbolic or (isinstance(value, int) and not isinstance(value, bool)):
            return so_far.bind(self.name, value)
        return Miss(len(so_far.nodes), f"{self.name} = {value} is not a size", so_far.root)


class Items(Pattern):
    """A list argument whose members fit ``members``, one by one."""

    def __init__(self, *members: Pattern) -> None:
        self.members = members

    def match(self, value: Any, so_far: Match) -> Match | Miss:
        """See `Pattern.match`."""
        if not isinstance(value, Sequence) or len(value) != len(self.members):
            return Miss(len(so_far.nodes), f"expected a list of {len(self.members)}, found {value}", so_far.root)
        for pattern, member in zip(self.members, value, strict=True):
            step = pattern.match(behind_identities(member), so_far)
            if isinstance(step, Miss):
                return step
            so_far = step
        return so_far


@dataclass(frozen=True)
class Result(Pattern):
    """Result number ``index`` of an operator with several results that fits ``pattern``."""

    pattern: Pattern
    index: int

    def match(self, value: Any, so_far: Match) -> Match | Miss:
        """See `Pattern.match`."""
        if not isinstance(value, Node) or value.target is not operator.getitem or value.args[1] != self.index:
            return Miss(
                len(so_far.nodes), f"expected result {self.index} of {self.pattern}, found {value}", so_far.root
            )
        return self.pattern.match(value.args[0], so_far.cover(value))

    def roots(self) -> frozenset[object] | None:
        """See `Pattern.roots`."""
        return frozenset({operator.getitem})


@dataclass(frozen=True)
class Cast(Pattern):
    """A cast of ``pattern`` to another dtype, which is bound to ``name``."""

    pattern: Pattern
    name: str

    def match(self, value: Any, so_far: Match) -> Match | Miss:
        """See `Pattern.match`."""
        operand = cast_operand(value)
        if operand is None:
            return Miss(len(so_far.nodes), f"expected a cast, found {value}", so_far.root)
        step = so_far.cover(value).bind(self.name, tensor(value).dtype)
        return step if isinstance(step, Miss) else self.pattern.match(behind_identities(operand), step)

    def roots(self) -> frozenset[object] | None:
        """See `Pattern.roots`."""
        return frozenset(CASTS)


@dataclass(frozen=True)
class Widened(Pattern):
    """``pattern`` itself, or cast to a dtype that holds all of its values."""

    pattern: Pattern

    def match(self, value: Any, so_far: Match) -> Match | Miss:
        """See `Pattern.match`."""
        operand = cast_operand(value)
        while operand is not None and is_widening(operand, value):
            so_far = so_far.cover(value)
            value, operand = operand, cast_operand(operand)
        return self.pattern.match(value, so_far)


def is_widening(narrow: Node, wide: Node) -> bool:
    """Whether every value of the dtype of ``narrow`` is one of the dtype of ``wide`` (both floating)."""
    if not is_tensor(narrow) or not is_tensor(wide):
        return False
    a, b = tensor(narrow).dtype, tensor(wide).dtype
    return a.is_floating_point and b.is_floating_point and torch.promote_types(a, b) == b
