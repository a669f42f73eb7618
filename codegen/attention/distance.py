"""Products with the distance of key and query, such as ALiBi's, split into a part per column and a part per row.

    c·float(j − i) = c·float(n) + c·float(start − i)        for the key j = start + n of the block that starts at start

The left side subtracts, converts and multiplies for every logit, the right side adds. Neither part is longer than the
distance and a block, so neither rounds worse than the left side does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

from fxopt.codegen.attention.interval import is_uniform, linear
from fxopt.codegen.expression import simplify
from fxopt.ir.attention import Capture
from fxopt.ir.expression import Expr, I, call

_FIXED = ("b", "h", "Sq", "Sk")


def split_distances(score: Expr, captures: Sequence[Capture], column: Expr, start: Expr) -> Expr:
    """``score`` with such products split; ``column`` stands for ``float(n)`` and ``start`` for the block's first key.

    The factor ``c`` must be the same for all keys and rows of a head.
    """

    def change(node: Expr) -> Expr:
        if node.op != "mul":
            return node
        for factor, distance in (node.args, node.args[::-1]):
            parts = _parts(distance, captures, column, start)
            if parts is not None and is_alike(factor, captures):
                return call("add", call("mul", factor, parts[0]), call("mul", factor, parts[1]))
        return node

    return score.replace(change)


def sloped(score: Expr, captures: Sequence[Capture]) -> tuple[Expr, Expr, Expr] | None:
    """``score`` as the sum of a rest and of a factor times a distance of key and row, or ``None`` where it is none.

    The factor is the same for all keys and rows of a head.
    """
    if score.op != "add":
        return None
    for rest, term in (score.args, score.args[::-1]):
        for factor, distance in (term.args, term.args[::-1]) if term.op == "mul" else ():
            if is_alike(factor, captures) and _is_distance(distance, captures):
                return rest, factor, distance
    return None


def _is_distance(distance: Expr, captures: Sequence[Capture]) -> bool:
    found = linear(distance.args[0], captures) if distance.op == "float" else None
    return found is not None and found.key in (1, -1) and found.row in (1, -1)


def apart(score: Expr, moving: Callable[[Expr], bool]) -> tuple[Expr, Expr | None]:
    """``score`` as the sum of what has a ``moving`` leaf, and of whole terms that have none (``None`` without any)."""
    if score.op not in ("add", "sub"):
        return score, None
    first, second = score.args
    if not any(map(moving, second.walk())):
        kept, aside = apart(first, moving)
        if aside is None:
            return kept, second if score.op == "add" else call("neg", second)
        return kept, call(score.op, aside, second)
    if score.op == "add" and not any(map(moving, first.walk())):
        kept, aside = apart(second, moving)
        return kept, first if aside is None else call("add", first, aside)
    (kept, aside), (other, more) = (apart(part, moving) for part in (first, second))
    if more is not None and score.op == "sub":
        more = call("neg", more)
    both = [part for part in (aside, more) if part is not None]
    return call(score.op, kept, other), reduce(lambda a, b: call("add", a, b), both) if both else None


def _parts(distance: Expr, captures: Sequence[Capture], column: Expr, start: Expr) -> tuple[Expr, Expr] | None:
    found = linear(distance.args[0], captures) if distance.op == "float" else None
    if found is None or found.key not in (1, -1) or found.row not in (0, 1, -1):
        return None
    rest = call("add", found.rest, start) if found.key == 1 else call("sub", found.rest, start)
    if found.row:
        rest = call("add" if found.row == 1 else "sub", rest, I)
    return column if found.key == 1 else call("neg", column), call("float", simplify(rest))


def is_alike(factor: Expr, captures: Sequence[Capture]) -> bool:
    """Whether ``factor`` is the same for all keys and rows of a head."""
    leaves = [node for node in factor.walk() if not node.args]
    return all(
        leaf.op == "const"
        or (leaf.op == "symbol" and leaf.value in _FIXED)
        or (leaf.op == "capture" and is_uniform(captures[int(leaf.value or 0)]))
        for leaf in leaves
    )
