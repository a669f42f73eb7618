"""Reading the mask out of a lifted expression, with proofs for captures that do not depend on the inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch.fx import Node

from fxopt.analysis.bands import BandPlanner
from fxopt.analysis.constants import Constants
from fxopt.analysis.fills import FILLS, may_hold_fill
from fxopt.analysis.index import IndexLifter
from fxopt.analysis.logic import Logic
from fxopt.analysis.masks import as_additive, every_row_keeps_a_key, one_plane, prove_structure
from fxopt.analysis.simplify import simplify
from fxopt.ir.expression import Expr, call, const
from fxopt.ir.nodes import same_size, shape
from fxopt.passes.attention.positions import Captured, ReadTensor
from fxopt.passes.attention.proofs import captures_of, fills_left, joined, logic_of, rows_kept, settled
from fxopt.passes.attention.space import Operand, Space

_EVERYTHING: Final = const(True)
#: Numbers below this absorb any score that is added to them: all lowest ones but float16's.
ABSORBING: Final = -1e30


@dataclass(frozen=True)
class Logits:
    """What is known of logits beside their expression.

    Attributes:
        dtypes: the dtypes that they, and the masks and biases lifted with them, pass through.
        differentiable: whether a gradient may flow into them.
    """

    dtypes: frozenset[torch.dtype]
    differentiable: bool


@dataclass(frozen=True)
class Masked:
    """A score expression, and the mask taken out of it in its simplest form.

    ``uniform`` tells that a row without keys gives the mean of all values; otherwise it gives what the softmax says.
    ``added``: some of the mask is added to the scores, so that a gradient flows through it.
    """

    score: Expr
    mask: Expr | None
    uniform: bool = False
    added: bool = False


class MaskProver:
    """Proves captures of one program to be masks of known structure; each is evaluated once."""

    def __init__(self, constants: Constants) -> None:
        self.constants = constants
        self.lifter = IndexLifter(constants)
        self.bands = BandPlanner(constants, self.lifter)
        self._known: dict[tuple[Node, int, int], _Proof | None] = {}
        self._logics: dict[Any, Logic] = {}

    def logic(self, operands: Sequence[Captured], space: Space) -> Logic:
        """The logic over the positions of a site; sites alike share it, with all that was proved in it."""
        logic = logic_of(operands, space)
        return self._logics.setdefault((logic.domain.key, logic.captures), logic)

    def prove(self, operands: tuple[Captured, ...], space: Space, read: frozenset[int]) -> dict[int, _Proof]:
        """The proofs found of the operands that are ``read``, by their index."""
        found: dict[int, _Proof] = {}
        rows, columns = space.rows, space.columns
        if not isinstance(rows, int) or not isinstance(columns, int):
            return found
        for index, operand in enumerate(operands):
            if index not in read or not _spans_rows_and_keys(operand):
                continue
            key = (operand.node, rows, columns)
            if key not in self._known:
                self._known[key] = _prove(operand, rows, columns, self.constants.with_buffers)
            proof = self._known[key]
            if proof is not None:
                found[index] = proof
        return found


def separate_mask(
    expression: Expr, operands: tuple[Captured, ...], space: Space, prover: MaskProver, logits: Logits
) -> Masked:
    """Split a lifted expression into score and mask.

    ``where(m, x, −inf)`` gives mask ``m``. A capture that is proved to be an additive or boolean mask of known
    structure becomes that structure. ``where(m, x, lowest)`` and ``x + where(m, 0, lowest)`` give mask ``m`` too: where
    it is proved that all masks together leave every row a key, as they are; otherwise with the mean of all values for a
    row without keys, where `_is_uniform` allows.
    """
    proofs = prover.prove(operands, space, captures_of(expression))
    logic = prover.logic(operands, space)
    score = settled(expression.replace(_substitute(proofs)), logic)
    safe = frozenset(proof.keep for proof in proofs.values() if proof.safe) | rows_kept(score, logic)
    taken = [_Taken(score)]
    while (step := _take_mask(taken[-1].score, proofs, safe)) is not None:
        taken.append(step)
    # The longest run of masks, from the outermost one, that is exact.
    for last in range(len(taken) - 1, -1, -1):
        terms, score = taken[1 : last + 1], taken[last].score
        kept = not any(math.isfinite(term.fill) for term in terms) or _leave_a_key(terms, score, logic)
        if kept or _is_uniform(terms, score, operands, prover.constants, logits):
            break
    added = any(term.added for term in terms)
    return Masked(score, joined([term.keep for term in terms], logic), uniform=not kept, added=added)


@dataclass(frozen=True)
class _Taken:
    """A mask taken off, and the score that is left.

    ``fill`` is what stands, or is added, outside ``keep``. ``safe``: proved to leave every row a key.
    """

    score: Expr
    keep: Expr = _EVERYTHING
    fill: float = -math.inf
    added: bool = False
    safe: bool = False


def _leave_a_key(terms: list[_Taken], score: Expr, logic: Logic) -> bool:
    """Whether ``terms``, and the fills still in ``score``, together leave every row a key: then fills don't count."""
    others = fills_left(score)
    if len(terms) == 1 and not others:
        return terms[0].safe
    mask = joined([*(term.keep for term in terms), *others], logic)
    return mask is None or logic.every_row_keeps_a_key(mask)


def _is_uniform(
    terms: list[_Taken], score: Expr, operands: tuple[Captured, ...], constants: Constants, logits: Logits
) -> bool:
    """Whether a row that ``terms`` mask throughout is a row of one finite number, and any other row masked exactly.

    All fill with the same number, finite in every dtype on the way. What is added to it must be absorbed by rounding,
    which float16's lowest number doesn't do; two additions overflow to −inf, so only the innermost may be one. A
    gradient flows through an absorbed addition, but not into a masked row, so there may be none. Nothing else that the
    logits are computed from may hold stand-ins for −inf.
    """
    fill, innermost = terms[0].fill, terms[-1]
    if any(term.fill != fill for term in terms) or any(term.added for term in terms[:-1]):
        return False
    if any(torch.finfo(dtype).min > fill for dtype in logits.dtypes if dtype.is_floating_point):
        return False
    small = fill > ABSORBING
    if innermost.added and (small or logits.differentiable):
        return False
    return not holds_rival(score, -fill / 8 if small else -ABSORBING, operands, constants)


def holds_rival(score: Expr, limit: float, operands: tuple[Captured, ...], constants: Constants) -> bool:
    """Whether ``score`` can hold numbers as large as ``limit`` for some keys, by design and not by chance."""
    return any(_is_rival(leaf, limit, operands, constants) for leaf in score.walk())


def _is_rival(leaf: Expr, limit: float, operands: tuple[Captured, ...], constants: Constants) -> bool:
    if leaf.op == "capture":
        node = operands[int(leaf.value or 0)].node
        varies = any(not same_size(size, 1) for size in shape(node)[-1:])
        return varies and may_hold_fill(node, limit, constants)
    return leaf.op == "const" and abs(float(leaf.value or 0)) >= limit


@dataclass(frozen=True)
class _Proof:
    """A capture proved to be a mask: where it keeps, in closed form.

    ``additive``: 0 where kept, −inf or lowest (``fill``) elsewhere; otherwise boolean, true where kept (or,
    ``inverted``, where not). ``safe``: every row keeps a key.
    """

    keep: Expr
    additive: bool
    inverted: bool
    safe: bool
    fill: float = -math.inf

    def __str__(self) -> str:
        return "keeps everything" if self.keep == const(True) else f"keeps {self.keep}"


def _spans_rows_and_keys(operand: Captured) -> bool:
    """Whether the last two axes of an operand's tensor are those of the scores."""
    if isinstance(operand, ReadTensor):
        return [str(part) for part in operand.reading.index[-2:]] == ["i", "j"]
    return isinstance(operand, Operand)


def _prove(operand: Captured, rows: int, columns: int, constants: Constants) -> _Proof | None:
    values = constants.value(operand.node)
    plane = one_plane(values) if isinstance(values, torch.Tensor) else None
    if plane is None or plane.numel() == 0:
        return None
    additive, finite, inverted = plane.dtype.is_floating_point, False, False
    if additive:
        read = as_additive(plane)
        if read is None:
            return None
        keep, finite = read
    elif plane.dtype is torch.bool:
        inverted = not bool(plane[0, 0])
        keep = ~plane if inverted else plane
    else:
        return None
    structure = prove_structure(keep.expand(rows, columns))
    safe = every_row_keeps_a_key(keep)
    if structure is None or (additive and finite and not safe):
        return None
    constants.assume(operand.node)
    return _Proof(structure, additive, inverted, safe, _fill_of(plane, keep) if additive else -math.inf)


def _fill_of(plane: torch.Tensor, keep: torch.Tensor) -> float:
    """What an additive mask holds where it does not keep; NaN for several numbers."""
    values = plane[~keep].unique()
    return float(values[0]) if values.numel() == 1 else math.nan


def _substitute(proofs: dict[int, _Proof]) -> Callable[[Expr], Expr]:
    """A boolean capture becomes its closed form; an additive one that keeps everything becomes 0."""

    def change(expr: Expr) -> Expr:
        proof = proofs.get(int(expr.value or 0)) if expr.op == "capture" else None
        if proof is None:
            return expr
        if not proof.additive:
            return call("not", proof.keep) if proof.inverted else proof.keep
        return const(0.0) if proof.keep == const(True) else expr

    return change


def _take_mask(expr: Expr, proofs: dict[int, _Proof], safe: frozenset[Expr]) -> _Taken | None:
    """Split off the outermost mask."""
    if expr.op == "where":
        return _take_where(expr, safe)
    if expr.op != "add":
        return None
    for term, rest in (expr.args[::-1], expr.args):
        proof = proofs.get(int(term.value or 0)) if term.op == "capture" else None
        if proof is not None and proof.additive:
            return _Taken(rest, proof.keep, proof.fill, added=True, safe=proof.safe)
        if term.op == "where" and (fill := _as_fill(term, rest)) is not None:
            found = _take_where(fill, safe)
            return None if found is None else replace(found, added=True)
    for term, rest in (expr.args[::-1], expr.args):
        inner = _take_mask(term, proofs, safe)
        if inner is not None:
            return replace(inner, score=simplify(call("add", rest, inner.score)), added=True)
    return None


def _as_fill(term: Expr, rest: Expr) -> Expr | None:
    """``rest + where(m, 0, lowest)`` as ``where(m, rest, lowest)``: a finite number added to the lowest is absorbed."""
    condition, kept, masked = term.args
    if kept in (const(0.0), const(0)) and masked in FILLS:
        return call("where", condition, rest, masked)
    if masked in (const(0.0), const(0)) and kept in FILLS:
        return call("where", condition, kept, rest)
    return None


def _take_where(expr: Expr, safe: frozenset[Expr]) -> _Taken | None:
    condition, kept, masked = expr.args
    if kept in FILLS:
        condition, kept, masked = simplify(call("not", condition)), masked, kept
    if masked not in FILLS:
        return None
    return _Taken(kept, condition, float(masked.value or 0), safe=condition in safe)
