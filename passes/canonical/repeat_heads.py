"""Key/value heads that are repeated to the number of query heads become one operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from fxopt.ir.nodes import same_shape, same_size, scalar, shape
from fxopt.ir.operators import overload
from fxopt.ir.program import Program
from fxopt.ir.site import Tier
from fxopt.rewriter.builder import Builder
from fxopt.rewriter.operands import Size
from fxopt.rewriter.passes import PassResult, apply_rules
from fxopt.rewriter.pattern import Const, Match, Op, Optional, Pattern, Var
from fxopt.rewriter.registry import register_pass
from fxopt.rewriter.rule import Rejection, Rule

aten = torch.ops.aten
_RESHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)
#: Where the new axis stands in ``[B, G, S, D]`` -> the order of the repeated heads.
_ORDERS = {2: "group", 1: "tile"}


def _copied(pattern: Pattern) -> Pattern:
    """``pattern``, or a copy of it in another memory layout."""
    contiguous = Optional(lambda p: Op(aten.contiguous.default, p, memory_format=Const("layout")), pattern)
    return Optional(lambda p: Op(aten.clone.default, p, memory_format=Const("layout")), contiguous)


def _merged(five: Pattern) -> Pattern:
    """Two neighbouring axes of ``five`` joined into one."""
    copied = _copied(five)
    return Op(_RESHAPES, copied, Const("sizes")) | Op(aten.flatten.using_ints, copied, Const("start"), Const("end"))


_INSERTED = Op(aten.unsqueeze.default, Var("x"), Const("axis"), name="inserted") | Op(
    _RESHAPES, Var("x"), Const("split"), name="inserted"
)


@dataclass(frozen=True)
class _Repetition:
    """``x [B, G, S, D]`` with every head ``count`` times, in ``order``."""

    x: Node
    count: Any
    order: str


def check_interleaved(match: Match) -> _Repetition | Rejection:
    """The repeated axis is the head axis of ``[B, G, S, D]``."""
    x, axis = match["x"], match["axis"]
    if len(shape(x)) != 4 or axis not in (1, -3):
        return Rejection(f"axis {axis} of a tensor with {len(shape(x))} axes is not the head axis of [B, G, S, D]")
    return _Repetition(x, match["count"], "group")


def check_tiled(match: Match) -> _Repetition | Rejection:
    """Only the head axis of ``[B, G, S, D]`` is tiled."""
    x, counts = match["x"], match["counts"]
    if len(shape(x)) != 4 or not _repeats_only(counts, 1, 4):
        return Rejection(f"tiling {len(shape(x))} axes by {counts} is not tiling the head axis of [B, G, S, D]")
    return _Repetition(x, counts[1], "tile")


def check_broadcast(match: Match) -> _Repetition | Rejection:
    """A new axis beside the head axis is expanded or tiled, alone, and then joined with the head axis."""
    x, inserted, repeated = match["x"], match["inserted"], match["repeated"]
    axis = _new_axis(shape(x), shape(inserted))
    if axis is None:
        return Rejection("no axis of size 1 is put beside the head axis of [B, G, S, D]", (inserted,))
    counts = match.get("counts")
    if counts is None and not _same_except(shape(inserted), shape(repeated), axis):
        return Rejection("more than the new axis is expanded", (repeated,))
    if counts is not None and not _repeats_only(counts, axis, 5):
        return Rejection("more than the new axis is tiled", (repeated,))
    count = _count(repeated, axis, counts or match["expanded"])
    if count is None:
        return Rejection("the number of repetitions is not an argument of the expansion", (repeated,))
    if not _same_except(shape(x), shape(match.root), 1):
        return Rejection("the new axis is not joined with the head axis", (match.root,))
    return _Repetition(x, count, _ORDERS[axis])


def _new_axis(before: tuple[Any, ...], after: tuple[Any, ...]) -> int | None:
    if len(before) != 4 or len(after) != 5:
        return None
    for axis in (2, 1):
        if same_size(after[axis], 1) and same_shape(before, after[:axis] + after[axis + 1 :]):
            return axis
    return None


def _same_except(a: tuple[Any, ...], b: tuple[Any, ...], axis: int) -> bool:
    return len(a) == len(b) and same_shape(a[:axis] + a[axis + 1 :], b[:axis] + b[axis + 1 :])


def _repeats_only(counts: list[Any], axis: int, rank: int) -> bool:
    return len(counts) == rank and all(scalar(count) == 1 for i, count in enumerate(counts) if i != axis)


def _count(repeated: Node, axis: int, sizes: Any) -> Any:
    """The number of repetitions: static, or the node that the call was given."""
    static = scalar(shape(repeated)[axis])
    return static if static is not None else sizes[axis] if isinstance(sizes[axis], Node) else None


def build_repetition(builder: Builder, found: _Repetition) -> Node:
    """``fxopt.repeat_heads(x, count, order)``."""
    return builder.call(overload("repeat_heads"), found.x, found.count, found.order)


RULES = (
    Rule(
        name="interleaved",
        patterns={
            "repeat_interleave": Op(
                aten.repeat_interleave.self_int, Var("x"), Size("count"), Const("axis"), output_size=Size("total")
            )
            | Op(aten.repeat_interleave.self_int, Var("x"), Size("count"), Const("axis"))
        },
        check=check_interleaved,
        rewrite=build_repetition,
    ),
    Rule(
        name="tiled",
        patterns={"repeat": Op((aten.repeat.default, aten.tile.default), Var("x"), Const("counts"))},
        check=check_tiled,
        rewrite=build_repetition,
    ),
    Rule(
        name="broadcast",
        patterns={
            "expand and reshape": _merged(Op(aten.expand.default, _INSERTED, Const("expanded"), name="repeated")),
            "repeat and reshape": _merged(
                Op((aten.repeat.default, aten.tile.default), _INSERTED, Const("counts"), name="repeated")
            ),
        },
        check=check_broadcast,
        rewrite=build_repetition,
    ),
)


@register_pass
@dataclass(frozen=True)
class RepeatHeads:
    """Repeated heads become ``fxopt.repeat_heads(x, count, order)``: ``[B, G, S, D] -> [B, G * count, S, D]``.

    ``repeat_interleave(x, n, 1)`` and ``x[:, :, None].expand(B, G, n, S, D).reshape(B, G * n, S, D)`` give each head
    ``n`` times in a row: ``order="group"``, head ``h`` reads head ``h // n``. ``x.repeat(1, n, 1, 1)`` and the same
    broadcast on the other side of the head axis give all heads ``n`` times: ``order="tile"``, ``h % G``. Copies, views
    and sizes that are symbolic are part of the spelling. Exact: nothing is computed.
    """

    name: ClassVar[str] = "repeat-heads"
    tier: ClassVar[Tier] = "exact"
    requires: ClassVar[tuple[str, ...]] = ()

    def run(self, program: Program) -> PassResult:
        """Rewrite them."""
        return apply_rules(program, RULES)
