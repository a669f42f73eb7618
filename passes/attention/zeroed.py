"""Weights set to 0 after the softmax, where the mask hides the key anyway: then rows without any key give 0.

    softmax(where(m, x, −inf)).masked_fill(~m, 0)        a row without keys: 0 in place of NaN
    softmax(where(m, x, lowest)).masked_fill(~m, 0)      a row without keys: 0 in place of 1/T

Weights of hidden keys are 0 before, so nothing else changes. ``where(m.any(-1, keepdim=True), weights, 0)`` is the
same. ``nan_to_num`` is not: it also takes away what is NaN because queries or keys are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import torch
from torch.fx import Node

from fxopt.analysis.constants import Constants
from fxopt.analysis.logic import TRUE
from fxopt.analysis.views import Index
from fxopt.ir.expression import Expr, call, capture, conjunction
from fxopt.ir.nodes import arguments, is_call, is_impure, same_shape, scalar, shape, tensor
from fxopt.passes.attention.masking import ABSORBING, Logits, Masked, MaskProver, holds_rival
from fxopt.passes.attention.positions import Captured, read_at
from fxopt.passes.attention.proofs import described, joined
from fxopt.passes.attention.region import Region, lift_mask
from fxopt.passes.attention.space import Operand, Space
from fxopt.rewriter.rule import Rejection

aten = torch.ops.aten

_NOT: Final = (aten.bitwise_not.default, aten.logical_not.default)
_HIDES_NAN: Final = (
    "{name} between the softmax and the values also hides NaN that queries and keys bring, which a fused attention "
    "keeps; set the weights to 0 by the mask: weights.masked_fill(hidden, 0), or call scaled_dot_product_attention, "
    "which gives 0 for rows without keys"
)


def zeroed(node: Node) -> tuple[Node, Node, bool] | None:
    """The weights that ``node`` sets to 0 somewhere, the condition, and whether they are kept where it is true."""
    if not is_call(node, aten.masked_fill.Scalar, aten.where.ScalarOther, aten.where.ScalarSelf):
        return None
    given = arguments(node)
    if is_call(node, aten.masked_fill.Scalar):
        weights, condition, number, keeps = given["self"], given["mask"], given["value"], False
    elif is_call(node, aten.where.ScalarOther):
        weights, condition, number, keeps = given["self"], given["condition"], given["other"], True
    else:
        weights, condition, number, keeps = given["other"], given["condition"], given["self"], False
    if scalar(number) != 0 or not same_shape(shape(weights), shape(node)):
        return None
    return weights, condition, keeps


def hides_nan(node: Node) -> str:
    """Why an operator after the softmax keeps a site that sets NaN to 0; empty for any other."""
    found = zeroed(node)
    condition: Any = found[1] if found else None
    while is_call(condition, *_NOT):
        condition = condition.args[0]
    if not is_call(node, aten.nan_to_num.default) and not is_call(condition, aten.isnan.default):
        return ""
    return _HIDES_NAN.format(name="nan_to_num" if is_call(node, aten.nan_to_num.default) else "isnan")


def lift_kept(fills: tuple[Node, ...], region: Region, constants: Constants) -> Region | Rejection:
    """``region`` with the condition under which all ``fills`` keep the weights, and its operands."""
    terms: list[Expr] = []
    operands = list(region.operands)
    for node in fills:
        found = zeroed(node)
        assert found is not None
        condition, keeps = _of_every_key(*found[1:])
        lifted = lift_mask(condition, shape(node), constants)
        if isinstance(lifted, Rejection):
            return lifted
        term = _shared(lifted.expression, lifted.operands, operands)
        terms.append(term if keeps else call("not", term))
    return replace(region, operands=tuple(operands), kept=conjunction(tuple(terms)))


def _of_every_key(condition: Node, keeps: bool) -> tuple[Node, bool]:
    """What says of each key what ``condition``, whether a row has any, says of the row."""
    inner, positive = condition, keeps
    while is_call(inner, *_NOT):
        inner, positive = inner.args[0], not positive  # type: ignore[assignment]
    wanted = aten.any.dim if positive else aten.all.dim
    if not is_call(inner, wanted) or not isinstance(inner.args[0], Node):
        return condition, keeps
    keys, given = inner.args[0], arguments(inner)
    last = given["dim"] in (-1, len(shape(keys)) - 1) and given["keepdim"]
    return (keys, positive) if last and tensor(keys).dtype is torch.bool else (condition, keeps)


def _shared(expression: Expr, own: tuple[Operand, ...], operands: list[Operand]) -> Expr:
    """``expression`` with its captures numbered as in ``operands``, to which those that it lacks are added."""
    operands.extend(operand for operand in own if operand not in operands)

    def change(expr: Expr) -> Expr:
        return capture(operands.index(own[int(expr.value or 0)])) if expr.op == "capture" else expr

    return expression.replace(change)


def unlike_mask(
    masked: Masked, kept: Expr, operands: tuple[Captured, ...], space: Space, prover: MaskProver, logits: Logits
) -> str:
    """Why weights that are ``kept`` after the softmax, and 0 elsewhere, are not those of ``masked`` with rows of zeros
    in place of rows without keys; empty where they are.
    """
    logic = prover.logic(operands, space)
    given, wanted = (_unified(mask, operands, space) for mask in (kept, masked.mask or TRUE))
    if joined([given], logic) != joined([wanted], logic):
        told = described(masked.mask) or "which hides nothing for certain"
        return f"the weights are set to 0 after the softmax by another mask than that of the scores ({told})"
    if masked.added and not masked.uniform and logits.differentiable:
        return "the mask is added to the scores, and gives rows without keys gradients that are NaN"
    if holds_rival(masked.score, -ABSORBING, operands, prover.constants):
        return "the scores may be -inf for every key that the mask keeps, which gives NaN and not 0"
    return ""


def _unified(mask: Expr, operands: tuple[Captured, ...], space: Space) -> Expr:
    """``mask`` with one capture for all that read the same, or its negation, at the same place."""
    read = [_positive(read_at(operand, space)) for operand in operands]

    def change(expr: Expr) -> Expr:
        own = read[int(expr.value or 0)] if expr.op == "capture" else None
        if own is None:
            return expr
        first = next(n for n, other in enumerate(read) if other and other[1] == own[1] and _alike(other[0], own[0]))
        chosen = read[first]
        assert chosen is not None
        return capture(first) if chosen[2] == own[2] else call("not", capture(first))

    return mask.replace(change)


def _positive(read: tuple[Node, Index] | None) -> tuple[Node, Index, bool] | None:
    """What is read, without the negations that it is made by, and whether those leave it as it is."""
    if read is None:
        return None
    node, index = read
    positive = True
    while is_call(node, *_NOT) and tensor(node.args[0]).dtype is torch.bool:
        node, positive = node.args[0], not positive  # type: ignore[assignment]
    return node, index, positive


def _alike(one: Any, other: Any) -> bool:
    """Whether two arguments are the same, or computed in the same way from what is the same."""
    if not isinstance(one, Node) or not isinstance(other, Node):
        if isinstance(one, list | tuple) and isinstance(other, list | tuple):
            return len(one) == len(other) and all(map(_alike, one, other))
        return type(one) is type(other) and not isinstance(one, Node) and bool(one == other)
    if one is other:
        return True
    if one.op != "call_function" or one.target is not other.target or is_impure(one) or one.kwargs != other.kwargs:
        return False
    return _alike(one.args, other.args)
