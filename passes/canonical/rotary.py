"""Rotary position embedding becomes one operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from fxopt.ir.nodes import same_shape, shape
from fxopt.ir.operators import overload
from fxopt.ir.program import Program
from fxopt.ir.site import Tier
from fxopt.rewriter.builder import Builder
from fxopt.rewriter.operands import Items
from fxopt.rewriter.passes import PassResult, apply_rules
from fxopt.rewriter.pattern import Const, Match, Op, Pattern, Var
from fxopt.rewriter.registry import register_pass
from fxopt.rewriter.rule import Rejection, Rule
from fxopt.rewriter.sections import Part

aten = torch.ops.aten

_X = Var("x")
_HALVES = Op(aten.cat.default, Items(Op(aten.neg.default, Part(_X, 1)), Part(_X, 0)), Const("axis"))
_STACKED = Op(
    aten.stack.default,
    Items(Op(aten.neg.default, Part(_X, 1, strided=True)), Part(_X, 0, strided=True)),
    Const("axis"),
    name="stacked",
)
_PAIRS = Op(aten.flatten.using_ints, _STACKED, Const("start"), Const("end")) | Op(
    (aten.reshape.default, aten.view.default), _STACKED, Const("sizes")
)


def _embedding(rotated: Pattern) -> Pattern:
    """``rotated * sin + x * cos`` with the factors and terms in any order."""
    turned = Op(aten.mul.Tensor, rotated, Var("sin"), commutative=True)
    return Op(aten.add.Tensor, turned, Op(aten.mul.Tensor, _X, Var("cos"), commutative=True), commutative=True)


@dataclass(frozen=True)
class _Rotation:
    x: Node
    cos: Node
    sin: Node
    interleaved: bool


def check_halves(match: Match) -> _Rotation | Rejection:
    """The halves are joined along the last axis again, and the angles broadcast to ``x``."""
    if match["axis"] not in (-1, len(shape(match["x"])) - 1):
        return Rejection(f"the halves of the last axis are joined along axis {match['axis']}")
    return _rotation(match, interleaved=False)


def check_pairs(match: Match) -> _Rotation | Rejection:
    """The pairs are put side by side on a new last axis, which is then joined with the one before it."""
    rank = len(shape(match["x"]))
    if match["axis"] not in (-1, rank):
        return Rejection(f"the pairs are stacked on axis {match['axis']}, not on a new last one", (match["stacked"],))
    return _rotation(match, interleaved=True)


def _rotation(match: Match, *, interleaved: bool) -> _Rotation | Rejection:
    x = match["x"]
    if not same_shape(shape(match.root), shape(x)):
        return Rejection("cos and sin do not broadcast to x")
    return _Rotation(x, match["cos"], match["sin"], interleaved)


def build_rotary(builder: Builder, found: _Rotation) -> Node:
    """``fxopt.rotary(x, cos, sin, interleaved)``."""
    return builder.call(overload("rotary"), found.x, found.cos, found.sin, found.interleaved)


RULES = (
    Rule(
        name="halves",
        patterns={"x * cos + cat(-x2, x1) * sin": _embedding(_HALVES)},
        check=check_halves,
        rewrite=build_rotary,
    ),
    Rule(
        name="pairs",
        patterns={"x * cos + flatten(stack(-x[1::2], x[::2])) * sin": _embedding(_PAIRS)},
        check=check_pairs,
        rewrite=build_rotary,
    ),
)


@register_pass
@dataclass(frozen=True)
class Rotary:
    """``x * cos + rotated(x) * sin -> fxopt.rotary(x, cos, sin, interleaved)``.

    ``rotated(x)`` is ``cat(-x2, x1)`` of the two halves of the last axis (``interleaved=False``: GPT-NeoX, Llama), cut
    by slices, chunk, split or narrow; or ``-x[1::2]`` and ``x[::2]`` stacked and flattened (``interleaved=True``:
    GPT-J). ``cos`` and ``sin`` are any tensors that broadcast to ``x``. Where only the first channels are rotated,
    ``x`` is the slice that is. Exact: the same operations.
    """

    name: ClassVar[str] = "rotary"
    tier: ClassVar[Tier] = "exact"
    requires: ClassVar[tuple[str, ...]] = ()

    def run(self, program: Program) -> PassResult:
        """Rewrite them."""
        return apply_rules(program, RULES)
