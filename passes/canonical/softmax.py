"""Softmax by hand, and softmax under its other names, become one operator."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from fxopt.ir.nodes import is_call, same_shape, same_size, shape, tensor
from fxopt.ir.program import Program
from fxopt.ir.site import Tier
from fxopt.rewriter.builder import Builder
from fxopt.rewriter.operands import Widened
from fxopt.rewriter.passes import PassResult, apply_rules
from fxopt.rewriter.pattern import Const, Literal, Match, Op, Optional, Pattern, Var
from fxopt.rewriter.registry import register_pass
from fxopt.rewriter.rule import Rejection, Rule

aten = torch.ops.aten
_MATMULS = (aten.matmul.default, aten.bmm.default, aten.mm.default)
_EXPANSIONS = (aten.expand.default, aten.expand_as.default, aten.detach.default)


def _kept(reduction: Pattern) -> Pattern:
    """``reduction`` over an axis, put back with size 1 afterwards if it was dropped."""
    return Op(aten.unsqueeze.default, reduction, Const("restored")) | reduction


def _total(e: Pattern) -> Pattern:
    return _kept(Op(aten.sum.dim_IntList, Widened(e), Const("axes"), Const("keepdim")))


def _over(numerator: Pattern, denominator: Pattern) -> Pattern:
    inverse = Op(aten.reciprocal.default, denominator)
    once = Optional(lambda p: Op(aten.mul.Tensor, p, Literal(1)), inverse)
    return Op(aten.div.Tensor, numerator, denominator) | Op(aten.mul.Tensor, numerator, once, commutative=True)


_LOGSUMEXP = _kept(
    Op((aten.logsumexp.default, aten.special_logsumexp.default), Var("x"), Const("axes"), Const("keepdim"))
)
_SHIFTED = Op(aten.exp.default, Op(aten.sub.Tensor, Var("x"), Var("shift"), name="difference"), name="e")
_UNSHIFTED = Op(aten.exp.default, Var("x"), name="e")
_DTYPE = Const("dtype")
_LATE = Op(_MATMULS, Var("e"), Var("v"), name="product")


@dataclass(frozen=True)
class _Softmax:
    """Softmax of ``x`` over ``axis`` in the dtype of ``like``; ``product`` if it multiplies a value matrix."""

    x: Node
    axis: int
    like: Node
    product: Node | None = None


def check_quotient(match: Match) -> _Softmax | Rejection:
    """The sum runs over one axis, stands on that axis, and the shift does not change along it."""
    axis = _reduced_axis(match, match["e"])
    if isinstance(axis, Rejection):
        return axis
    x, shift = match["x"], match.get("shift")
    if shift is None:
        return _Softmax(x, axis, match["e"])
    if not same_shape(shape(x), shape(match["difference"])):
        return Rejection("the shift has axes that the scores lack", (match["difference"],))
    if not _constant_along(shift, axis):
        return Rejection(f"the shift is not known to be the same along axis {axis}, so it does not cancel", (shift,))
    return _Softmax(x, axis, match["e"])


def check_unshifted(match: Match) -> _Softmax | Rejection:
    """As `check_quotient`; and a maximum that was subtracted is not passed off as part of the scores."""
    shifted = match["x"]
    if is_call(shifted, aten.sub.Tensor) and _is_maximum(shifted.args[1]):
        return Rejection("a maximum is subtracted, but not as a shift that cancels", (shifted,))
    return check_late_quotient(match) if match.get("product") else check_quotient(match)


def check_late_quotient(match: Match) -> _Softmax | Rejection:
    """As `check_quotient`; and the matrix product contracts the axis of the sum."""
    found = check_quotient(match)
    if isinstance(found, Rejection):
        return found
    product = match["product"]
    if found.axis != -1 or len(shape(match["e"])) < 2 or len(shape(match["v"])) < 2:
        return Rejection("the product with the values does not contract the axis of the sum", (product,))
    return _Softmax(found.x, found.axis, found.like, product)


def check_difference(match: Match) -> _Softmax | Rejection:
    """The logsumexp runs over one axis and stands on it."""
    axis = _reduced_axis(match, match["x"])
    return axis if isinstance(axis, Rejection) else _Softmax(match["x"], axis, match.root)


def check_named(match: Match) -> _Softmax:
    """A softmax under another name computes in the dtype of its result."""
    return _Softmax(match["x"], _from_end(match["dim"], match["x"]), match.root)


def _reduced_axis(match: Match, reduced: Node) -> int | Rejection:
    """The axis, counted from the end, of a reduction of ``reduced`` whose result stands on that axis again."""
    axes, rank = match["axes"] or [], len(shape(reduced))
    if len(axes) != 1:
        return Rejection(f"the sum runs over axes {axes}, not over one")
    axis = _from_end(axes[0], reduced)
    restored = match.get("restored")
    if match["keepdim"] == (restored is not None) and rank > 1:
        return Rejection("the sum is not put back on the axis that it ran over")
    if restored is not None and (restored - rank if restored >= 0 else restored) != axis:
        return Rejection(f"the sum over axis {axis} is put on axis {restored}")
    return axis


def _from_end(axis: int, node: Node) -> int:
    return axis - len(shape(node)) if axis >= 0 else axis


def _constant_along(shift: Node, axis: int) -> bool:
    while is_call(shift, *_EXPANSIONS) and not _is_single(shift, axis):
        shift = shift.args[0]  # type: ignore[assignment]
    return _is_single(shift, axis)


def _is_maximum(node: object) -> bool:
    while is_call(node, *_EXPANSIONS, aten.unsqueeze.default, operator.getitem):
        node = node.args[0]  # type: ignore[attr-defined]
    return is_call(node, aten.amax.default, aten.max.dim, aten.max.default)


def _is_single(node: Node, axis: int) -> bool:
    sizes = shape(node)
    return len(sizes) < -axis or same_size(sizes[axis], 1)


def build_softmax(builder: Builder, found: _Softmax) -> Node:
    """``softmax(x, axis)``, times the values where normalisation came late."""
    x = builder.cast(found.x, tensor(found.like).dtype)
    weights = builder.call(aten.softmax.int, x, found.axis)
    if found.product is None:
        return weights
    assert isinstance(found.product.target, torch._ops.OpOverload)
    return builder.call(found.product.target, weights, found.product.args[1])


def _is_positive(axis: Any) -> bool:
    return isinstance(axis, int) and axis >= 0


def _is_dtype(value: Any) -> bool:
    return isinstance(value, torch.dtype)


def _named(target: torch._ops.OpOverload, dtype: Pattern) -> Pattern:
    return Op(target, Var("x"), Const("dim"), dtype)


RULES = (
    Rule(
        name="quotient",
        patterns={"exp(x - m) / sum": _over(_SHIFTED, _total(Var("e")))},
        check=check_quotient,
        rewrite=build_softmax,
    ),
    Rule(
        name="late-quotient",
        patterns={"(exp(x - m) @ v) / sum": _over(_LATE, _total(_SHIFTED))},
        check=check_late_quotient,
        rewrite=build_softmax,
    ),
    Rule(
        name="unshifted",
        patterns={
            "exp(x) / sum, which overflows where softmax does not": _over(_UNSHIFTED, _total(Var("e"))),
            "(exp(x) @ v) / sum, which overflows where softmax does not": _over(_LATE, _total(_UNSHIFTED)),
        },
        check=check_unshifted,
        rewrite=build_softmax,
    ),
    Rule(
        name="difference",
        patterns={"exp(x - logsumexp(x))": Op(aten.exp.default, Op(aten.sub.Tensor, Var("x"), _LOGSUMEXP))},
        check=check_difference,
        rewrite=build_softmax,
    ),
    Rule(
        name="other-name",
        patterns={
            "exp(log_softmax(x))": Op(aten.exp.default, _named(aten.log_softmax.int, _DTYPE)),
            "exp(special_log_softmax(x))": Op(aten.exp.default, _named(aten.special_log_softmax.default, _DTYPE)),
            "softmax on a positive axis": Op(aten.softmax.int, Var("x"), Const("dim", _is_positive), _DTYPE),
            "softmax with a dtype": _named(aten.softmax.int, Const("dtype", _is_dtype)),
            "special_softmax": _named(aten.special_softmax.default, _DTYPE),
            "_softmax": _named(aten._softmax.default, Const("half_to_float")),
        },
        check=check_named,
        rewrite=build_softmax,
    ),
)


@register_pass
@dataclass(frozen=True)
class Softmax:
    """Every softmax becomes ``aten.softmax.int(x, axis)``, with a negative axis and the dtype as a cast of ``x``.

    ``exp(x - m) / sum(exp(x - m)) -> softmax(x)`` for any ``m`` that does not change along the axis: the factor
    ``exp(-m)`` cancels. ``exp(x - logsumexp(x)) -> softmax(x)``; ``(exp(x - m) @ v) / sum -> softmax(x) @ v``, a row's
    sum being a common factor of its products. ``softmax(x, dtype=t) -> softmax(x.to(t))``, which is its definition.

    Without a shift, ``exp(x) / sum(exp(x))`` overflows to NaN for large ``x`` where ``softmax`` does not; the two are
    equal wherever the first is finite, and the spelling says so. ``_safe_softmax`` (0 for a fully masked row) stays.
    """

    name: ClassVar[str] = "softmax"
    tier: ClassVar[Tier] = "exact"
    requires: ClassVar[tuple[str, ...]] = ()

    def run(self, program: Program) -> PassResult:
        """Rewrite them."""
        return apply_rules(program, RULES)
