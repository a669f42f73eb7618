"""Products and sums as patterns: factors and terms in any order and association, constants gathered into one.

``0.5 * x * (1 + erf(x / sqrt(2)))`` has dozens of spellings that differ in nothing else; one pattern stands for all:

    >>> erf = Op(aten.erf.default, Product(Var("x"), constant="inner"))
    >>> gelu = Product(Var("x"), Sum(erf, constant="one"), constant="half")

Both are identities in real arithmetic: only the order of roundings differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import permutations, product
from typing import Any, ClassVar

import torch
from torch.fx import Node

from fxopt.ir.nodes import arguments, scalar
from fxopt.rewriter.pattern import Match, Miss, Pattern, behind_identities

aten = torch.ops.aten
_POWERS = (2, 3, 4)


@dataclass(frozen=True)
class _Split:
    """One way to read a value: its non-constant parts, the constant, and the operations that joined them."""

    parts: tuple[Node, ...]
    constant: float
    nodes: tuple[Node, ...] = ()


class _Gathered(Pattern):
    """Common to products and sums: try every reading of the value with as many parts as there are patterns."""

    #: The operators that `splits` looks into.
    operators: ClassVar[frozenset[object]]

    def __init__(self, *parts: Pattern, constant: str) -> None:
        self.parts = parts
        self.constant = constant

    def splits(self, node: Node, limit: int) -> Iterator[_Split]:
        """The readings of ``node`` with at most ``limit`` parts, the coarsest first."""
        raise NotImplementedError

    def roots(self) -> frozenset[object] | None:
        """The operators that join parts; with one part alone, what that may be too."""
        alone = self.parts[0].roots() if len(self.parts) == 1 else frozenset()
        return None if alone is None else self.operators | alone

    def match(self, value: Any, so_far: Match) -> Match | Miss:
        """See `Pattern.match`."""
        best = Miss(len(so_far.nodes), f"expected {self}, found {value}", so_far.root)
        if not isinstance(value, Node):
            return best
        for split in self.splits(value, len(self.parts)):
            if len(split.parts) != len(self.parts):
                continue
            result = self._match_split(split, so_far)
            if isinstance(result, Match):
                return result
            best = result if result.depth > best.depth else best
        return best

    def _match_split(self, split: _Split, so_far: Match) -> Match | Miss:
        for node in split.nodes:
            so_far = so_far.cover(node)
        start = so_far.bind(self.constant, split.constant)
        if isinstance(start, Miss):
            return start
        best = Miss(len(start.nodes), f"the parts of {self} do not fit", start.root)
        for order in permutations(split.parts):
            result = _match_all(self.parts, order, start)
            if isinstance(result, Match):
                return result
            best = result if result.depth >= best.depth else best
        return best


class Product(_Gathered):
    """A product of ``parts`` and a constant factor, which is bound to the name ``constant`` (1 when there is none)."""

    operators = frozenset({
        aten.mul.Tensor, aten.mul.Scalar, aten.neg.default, aten.square.default, aten.div.Tensor, aten.div.Scalar,
        aten.pow.Tensor_Scalar,
    })  # fmt: skip

    def splits(self, node: Node, limit: int) -> Iterator[_Split]:
        """See the base class."""
        yield _Split((node,), 1.0)
        yield from _joined(node, _product_operands(node), limit, self.splits, lambda a, b: a * b, 1.0)

    def __str__(self) -> str:
        return f"a product of {len(self.parts)} factors"


class Sum(_Gathered):
    """A sum of ``parts`` and a constant term, which is bound to the name ``constant`` (0 when there is none)."""

    operators = frozenset({aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar})

    def splits(self, node: Node, limit: int) -> Iterator[_Split]:
        """See the base class."""
        yield _Split((node,), 0.0)
        yield from _joined(node, _sum_operands(node), limit, self.splits, lambda a, b: a + b, 0.0)

    def __str__(self) -> str:
        return f"a sum of {len(self.parts)} terms"


def _match_all(patterns: tuple[Pattern, ...], parts: tuple[Node, ...], so_far: Match) -> Match | Miss:
    for pattern, part in zip(patterns, parts, strict=True):
        step = pattern.match(part, so_far)
        if isinstance(step, Miss):
            return step
        so_far = step
    return so_far


def _joined(
    node: Node,
    operands: tuple[Node | float, ...],
    limit: int,
    splits: Callable[[Node, int], Iterator[_Split]],
    join: Callable[[float, float], float],
    neutral: float,
) -> Iterator[_Split]:
    if not operands:
        return
    readings = [list(splits(o, limit)) if isinstance(o, Node) else [_Split((), o)] for o in operands]
    for chosen in product(*readings):
        parts = tuple(part for split in chosen for part in split.parts)
        if len(parts) > limit:
            continue
        constant = neutral
        for split in chosen:
            constant = join(constant, split.constant)
        yield _Split(parts, constant, (node, *(n for split in chosen for n in split.nodes)))


def _product_operands(node: Node) -> tuple[Node | float, ...]:
    """What ``node`` is the product of; empty when it is none."""
    if node.target in (aten.mul.Tensor, aten.mul.Scalar):
        return _operands(*node.args[:2])
    if node.target is aten.neg.default:
        return _operands(node.args[0], -1.0)
    if node.target is aten.square.default:
        return _operands(node.args[0], node.args[0])
    if node.target in (aten.div.Tensor, aten.div.Scalar):
        divisor = scalar(node.args[1])
        return _operands(node.args[0], 1.0 / divisor) if divisor else ()
    if node.target is aten.pow.Tensor_Scalar:
        power = scalar(node.args[1])
        return _operands(*[node.args[0]] * int(power)) if power is not None and power in _POWERS else ()
    return ()


def _sum_operands(node: Node) -> tuple[Node | float, ...]:
    """What ``node`` is the sum of; empty when it is none."""
    if node.target in (aten.add.Tensor, aten.add.Scalar) and arguments(node)["alpha"] == 1:
        return _operands(*node.args[:2])
    if node.target in (aten.sub.Tensor, aten.sub.Scalar) and arguments(node)["alpha"] == 1:
        subtracted = scalar(node.args[1])
        return _operands(node.args[0], -subtracted) if subtracted is not None else ()
    return ()


def _operands(*values: Any) -> tuple[Node | float, ...]:
    result: list[Node | float] = []
    for value in values:
        plain = behind_identities(value)
        number = scalar(plain)
        if number is None and not isinstance(plain, Node):
            return ()
        result.append(plain if number is None else float(number))
    return tuple(result)
