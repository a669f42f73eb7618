"""What is proved of the masks of a site: conditions in their simplest form, rows that keep a key, readable text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch

from fxopt.analysis.fills import FILLS, literals
from fxopt.analysis.logic import TRUE, Logic, readable
from fxopt.analysis.simplify import simplify
from fxopt.ir.expression import Expr, J, Kind, S, call, conjunction, conjuncts, const
from fxopt.ir.nodes import tensor
from fxopt.passes.attention.positions import Captured, domain_of
from fxopt.passes.attention.space import Space

#: Numbers this large are no biases: scores are made to differ by a few dozens.
_FAR: Final = 1000.0
_LOWEST: Final = frozenset(FILLS) - {const(-math.inf)}


def logic_of(operands: Sequence[Captured], space: Space) -> Logic:
    """The logic over the positions of a site."""
    return Logic(domain_of(space), tuple(_kind(operand) for operand in operands))


def _kind(operand: Captured) -> Kind:
    dtype = tensor(operand.node).dtype
    return "bool" if dtype is torch.bool else "float" if dtype.is_floating_point else "int"


def captures_of(*expressions: Expr | None) -> frozenset[int]:
    """The numbers of the captures that expressions read."""
    return frozenset(int(e.value or 0) for x in expressions if x for e in x.leaves if e.op == "capture")


def settled(expression: Expr, logic: Logic) -> Expr:
    """A score with every condition in its simplest form."""

    def change(expr: Expr) -> Expr:
        if expr.op != "where":
            return expr
        return simplify(call("where", logic.simplify(expr.args[0]), *expr.args[1:]))

    return simplify(expression.replace(change))


def rows_kept(expression: Expr, logic: Logic) -> frozenset[Expr]:
    """The conditions of ``expression``, and their negations, that some key is certain to fulfil for every row."""
    conditions = {e.args[0] for e in expression.walk() if e.op == "where"}
    both = conditions | {simplify(call("not", c)) for c in conditions}
    return frozenset(c for c in both if logic.every_row_keeps_a_key(logic.simplify(c)))


def joined(terms: Sequence[Expr], logic: Logic) -> Expr | None:
    """The conjunction of masks in its simplest form; ``None`` when it keeps everything."""
    mask = TRUE
    for term in terms:
        mask = logic.both(mask, logic.simplify(term))
    return None if mask == TRUE else conjunction(tuple(sorted(conjuncts(mask), key=_order)))


def _order(term: Expr) -> int:
    """Bounds from above come first, then those from below, then the rest."""
    bounds = {"le": 0, "ge": 1} if term.args and term.args[0] == J else {}
    return bounds.get(term.op, 2)


def fills_left(score: Expr) -> tuple[Expr, ...]:
    """The conditions under which ``score`` is not filled with a lowest number."""
    chosen = [e.args for e in score.walk() if e.op == "where"]
    kept = [condition for condition, _, otherwise in chosen if otherwise in _LOWEST]
    return (*kept, *(call("not", condition) for condition, filled, _ in chosen if filled in _LOWEST))


def not_hidden(score: Expr, operands: Sequence[Captured]) -> tuple[str, ...]:
    """A sentence where keys are to be hidden by a number that hides none for certain; none otherwise.

    ``exp(fill - largest)`` is 0 in floating point only if the scores are far above ``fill``, which nothing proves.
    """
    found = [number for expr in score.walk() for number in _numbers(expr)]
    for leaf in score.leaves:
        if leaf.op == "capture":
            found += [number for number in literals(operands[int(leaf.value or 0)].node) if number < 0]
    fills = sorted({-abs(number) for number in found if abs(number) >= _FAR and const(-abs(number)) not in FILLS})
    if not fills:
        return ()
    told = " and ".join(f"{fill:g}" for fill in fills)
    return (
        f"{told} is added or filled in to hide keys, a finite number that scores may come near: every key is loaded "
        "and computed; write scores.masked_fill(hidden, -inf), or torch.finfo(dtype).min, to have hidden blocks "
        "skipped",
    )


def _numbers(expr: Expr) -> list[float]:
    """The numbers that ``expr`` chooses, or multiplies what is no score with."""
    if expr.op not in ("where", "mul") or (expr.op == "mul" and expr.reads(S)):
        return []
    parts = expr.args[1:] if expr.op == "where" else expr.args
    return [float(part.value or 0) for part in parts if part.op == "const" and math.isfinite(float(part.value or 0))]


def described(mask: Expr | None, loaded: Sequence[str] = ()) -> str:
    """What is loaded and the mask, as the report prints them; empty where there is neither."""
    return "; ".join([*loaded, *([] if mask is None else [f"mask: {readable(mask)}"])])
