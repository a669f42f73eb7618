"""Reading the mask out of a lifted expression, with proofs for captures that do not depend on the inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.fx import Node

from fxopt.analysis.bands import BandPlanner
from fxopt.analysis.constants import Constants
from fxopt.analysis.index import IndexLifter
from fxopt.analysis.masks import as_additive, every_row_keeps_a_key, prove_structure
from fxopt.analysis.simplify import simplify
from fxopt.ir.expression import Expr, call, const
from fxopt.passes.attention.positions import Captured
from fxopt.passes.attention.proofs import captures_of, joined, logic_of, may_join, rows_kept, settled
from fxopt.passes.attention.space import Operand, Space

_LOWEST = frozenset(torch.finfo(t).min for t in (torch.float16, torch.bfloat16, torch.float32, torch.float64))


@dataclass(frozen=True)
class Masked:
    """A score expression, and the mask taken out of it in its simplest form."""

    score: Expr
    mask: Expr | None


class MaskProver:
    """Proves captures of one program to be masks of known structure; each is evaluated once."""

    def __init__(self, constants: Constants) -> None:
        self.constants = constants
        self.lifter = IndexLifter(constants)
        self.bands = BandPlanner(constants, self.lifter)
        self._known: dict[tuple[Node, int, int], _Proof | None] = {}

    def prove(self, operands: tuple[Captured, ...], space: Space, read: frozenset[int]) -> dict[int, _Proof]:
        """The proofs found of the operands that are ``read``, by their index."""
        found: dict[int, _Proof] = {}
        rows, columns = space.rows, space.columns
        if not isinstance(rows, int) or not isinstance(columns, int):
            return found
        for index, operand in enumerate(operands):
            if index not in read or not isinstance(operand, Operand):
                continue
            key = (operand.node, rows, columns)
            if key not in self._known:
                self._known[key] = _prove(operand, rows, columns, self.constants)
            proof = self._known[key]
            if proof is not None:
                found[index] = proof
        return found


def separate_mask(expression: Expr, operands: tuple[Captured, ...], space: Space, prover: MaskProver) -> Masked:
    """Split a lifted expression into score and mask.

    ``where(m, x, −inf)`` gives mask ``m``. A capture that is proved to be an additive or boolean mask of known
    structure
    becomes that structure; ``where(m, x, lowest)`` and an additive mask of lowest finite numbers become a mask only
    if it
    is proved that every row keeps a key (a fully masked row is then impossible, the only place where they differ).
    """
    proofs = prover.prove(operands, space, captures_of(expression))
    logic = logic_of(operands, space)
    expression = settled(expression.replace(_substitute(proofs)), logic)
    safe = frozenset(proof.keep for proof in proofs.values() if proof.safe) | rows_kept(expression, logic)
    terms: list[Expr] = []
    while True:
        step = _take_mask(expression, proofs, safe)
        if step is None:
            break
        if not may_join(terms, step[1], expression, step[0], logic):
            break
        expression, term = step
        terms.append(term)
    return Masked(expression, joined(terms, logic))


@dataclass(frozen=True)
class _Proof:
    """A capture proved to be a mask: where it keeps, in closed form.

    ``additive``: 0 where kept, −inf or lowest elsewhere; otherwise boolean, true where kept (or, ``inverted``, where
    not). ``safe``: every row keeps a key.
    """

    keep: Expr
    additive: bool
    inverted: bool
    safe: bool

    def __str__(self) -> str:
        return "keeps everything" if self.keep == const(True) else f"keeps {self.keep}"


def _prove(operand: Operand, rows: int, columns: int, constants: Constants) -> _Proof | None:
    values = constants.value(operand.node)
    plane = _one_plane(values) if isinstance(values, torch.Tensor) else None
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
    return _Proof(structure, additive, inverted, safe)


def _one_plane(values: torch.Tensor) -> torch.Tensor | None:
    """The ``[S, T]`` plane that all leading indices share, or ``None`` when they differ."""
    while values.dim() < 2:
        values = values[None]
    flat = values.reshape(-1, *values.shape[-2:])
    return flat[0] if bool((flat == flat[:1]).all()) else None


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


def _take_mask(expr: Expr, proofs: dict[int, _Proof], safe: frozenset[Expr]) -> tuple[Expr, Expr] | None:
    """Split off the outermost mask: the expression without it, and the term."""
    if expr.op == "where":
        return _take_where(expr, safe)
    if expr.op != "add":
        return None
    for term, rest in (expr.args[::-1], expr.args):
        proof = proofs.get(int(term.value or 0)) if term.op == "capture" else None
        if proof is not None and proof.additive:
            return rest, proof.keep
        if term.op == "where" and (fill := _as_fill(term, rest)) is not None:
            return _take_where(fill, safe)
    for term, rest in (expr.args[::-1], expr.args):
        inner = _take_mask(term, proofs, safe)
        if inner is not None:
            return simplify(call("add", rest, inner[0])), inner[1]
    return None


def _as_fill(term: Expr, rest: Expr) -> Expr | None:
    """``rest + where(m, 0, lowest)`` as ``where(m, rest, lowest)``: a finite number added to the lowest is absorbed."""
    condition, kept, masked = term.args
    lowest = (const(-math.inf), *map(const, _LOWEST))
    if kept in (const(0.0), const(0)) and masked in lowest:
        return call("where", condition, rest, masked)
    if masked in (const(0.0), const(0)) and kept in lowest:
        return call("where", condition, kept, rest)
    return None


def _take_where(expr: Expr, safe: frozenset[Expr]) -> tuple[Expr, Expr] | None:
    condition, kept, masked = expr.args
    if kept == const(-math.inf):
        condition, kept, masked = simplify(call("not", condition)), masked, kept
    if masked == const(-math.inf):
        return kept, condition
    if kept.op == "const" and kept.value in _LOWEST:
        condition, kept, masked = simplify(call("not", condition)), masked, kept
    if masked.op == "const" and masked.value in _LOWEST and condition in safe:
        return kept, condition
    return None
