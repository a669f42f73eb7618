"""Tensors that are made of positions, read as expressions over ``b, h, i, j`` and the lengths.

    arange(S)[:, None] >= arange(S)[None]      at (i, j)    ->    j <= i

The walk starts at the element that is wanted and goes up to where it comes from; what can't be followed is captured as
the tensor it is, read at the position at which it was met, as far up as that tensor is smaller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch.fx import Node

from fxopt.analysis.constants import Constants
from fxopt.analysis.domain import Domain
from fxopt.analysis.elements import element_of
from fxopt.analysis.linear import LONGEST, Bounds
from fxopt.analysis.logic import Logic
from fxopt.analysis.masks import one_plane, prove_structure
from fxopt.analysis.values import choose, holds, is_two_valued, rounded
from fxopt.analysis.views import Index, Unreadable, Views
from fxopt.analysis.width import may_overflow
from fxopt.ir.attention import NAME_OF
from fxopt.ir.expression import Expr, I, J, Kind, call, capture, const, symbol
from fxopt.ir.nodes import same_size, shape, tensor

_INDICES: Final = tuple(symbol(name) for name in "bhij")
_HEAVY: Final = frozenset({"exp", "log", "tanh", "sigmoid", "sqrt", "rsqrt", "pow", "div", "floordiv", "mod"})
#: How many operators deep a walk goes before it stops at what is there.
_DEEPEST: Final = 150


@dataclass(frozen=True)
class Reading:
    """A tensor read at ``index``: for each axis one of ``b h i j``, each at most once, or a fixed number."""

    node: Node
    index: Index

    @property
    def letters(self) -> frozenset[str]:
        """The indices that it varies with."""
        return frozenset(str(part) for part in self.index if part.op == "symbol")

    @property
    def kind(self) -> Kind:
        """The kind of value it holds."""
        dtype = tensor(self.node).dtype
        return (
            "float"
            if dtype.is_floating_point
            else "int"
            if dtype.itemsize > 1 or str(dtype) != "torch.bool"
            else "bool"
        )


@dataclass(frozen=True)
class Lifted:
    """An element as an expression; ``c0, c1, …`` are ``readings``."""

    expr: Expr
    readings: tuple[Reading, ...]


class IndexLifter:
    """Lifts tensors of one program; walks over the same domain share what they found."""

    def __init__(self, constants: Constants) -> None:
        self._constants = constants
        self._walks: dict[tuple[str, ...], _Walk] = {}

    def lift(self, node: Node, index: Index, domain: Domain) -> Lifted | Unreadable:
        """``node`` at ``index`` (an expression per axis), or why it can't be said."""
        walk = self._walk(domain)
        try:
            expr = walk.element(node, tuple(walk.views.tidy(part) for part in index))
        except Unreadable as reason:
            return reason
        if may_overflow(expr, domain, [tensor(r.node).dtype for r in walk.readings]):
            return Unreadable("positions beyond 32 bits", node)
        return Lifted(expr, tuple(walk.readings))

    def origin(self, node: Node) -> str:
        """Why a tensor that can't be followed is read, as a sentence."""
        constants = self._constants.with_buffers
        if constants.is_constant(node):
            return "it depends on no input, but has no structure that is known"
        return f"it is run-time data ({doubt})" if (doubt := constants.doubt(node)) else "it is run-time data"

    def _walk(self, domain: Domain) -> _Walk:
        if domain.key not in self._walks:
            self._walks[domain.key] = _Walk(domain, self._constants)
        return self._walks[domain.key]


class _Walk:
    """Reads elements over one domain; each element once."""

    def __init__(self, domain: Domain, constants: Constants) -> None:
        self.domain = domain
        self.constants = constants
        self.views = Views(domain)
        self.reach = Bounds(domain, LONGEST)
        self.logic = Logic(domain)
        self.readings: list[Reading] = []
        self._known: dict[tuple[Node, Index], Expr | Unreadable] = {}
        self._planes: dict[int, tuple[Expr, Expr, Expr] | None] = {}
        self._depth = 0

    def element(self, node: Node, index: Index) -> Expr:
        """The value of ``node`` at ``index``; raises `Unreadable`."""
        key = (node, index)
        if key not in self._known:
            try:
                self._known[key] = self._read(node, index)
            except Unreadable as reason:
                self._known[key] = reason
        found = self._known[key]
        if isinstance(found, Unreadable):
            raise found
        return found

    def depends(self, expr: Expr, index: Expr) -> bool:
        """Whether ``expr``, or a tensor that it captures, varies with ``index``."""
        return expr.reads(index) or any(str(index) in r.letters for r in self._captured(expr))

    def settled(self, expr: Expr) -> Expr:
        """A truth value in its simplest form."""
        self.logic.captures = tuple(r.kind for r in self.readings)
        return self.logic.simplify(expr)

    def _read(self, node: Node, index: Index) -> Expr:
        self._depth += 1
        try:
            expr = self._follow(node, index)
        except Unreadable as reason:
            return self._leaf(node, index, reason)
        finally:
            self._depth -= 1
        proved = self._proved(node, index) if self._reads_planes(expr) else None
        if proved is not None:
            return proved
        if self._explains(expr, index):
            return expr
        try:
            return self._leaf(node, index, Unreadable("", node))
        except Unreadable:
            return expr

    def _follow(self, node: Node, index: Index) -> Expr:
        if self._depth > _DEEPEST:
            raise Unreadable("it lies too deep", node)
        number = self.constants.number(node) if not shape(node) else None
        if number is not None:
            return const(number)
        moved = self.views.source(node, index)
        if moved is not None:
            return self.element(*moved)
        read = element_of(node)
        if read is None:
            raise Unreadable(f"{node.target if node.op == 'call_function' else node.op} is run-time data", node)
        expr = read(self, node, index)
        if not holds(tensor(node).dtype, expr, self.reach):
            raise Unreadable(f"{tensor(node).dtype} may not hold its numbers", node)
        return expr

    def _reads_planes(self, expr: Expr) -> bool:
        return any({"i", "j"} <= r.letters for r in self._captured(expr))

    def _proved(self, node: Node, index: Index) -> Expr | None:
        """The structure of a plane of truth values, such as ``buffer == 0``, that depends on no input."""
        sizes = shape(node)[-2:]
        whole = all(same_size(size, self.domain.extent(name)) for size, name in zip(sizes, "ij", strict=False))
        if tensor(node).dtype is not torch.bool or index[-2:] != (I, J) or not whole:
            return None
        plane = self._plane(node)
        return None if plane is None else self._structure(node, plane)

    def _plane(self, node: Node) -> torch.Tensor | None:
        """What a constant holds at each row and key, where that is the same everywhere else."""
        values = self.constants.with_buffers.value(node)
        return one_plane(values) if isinstance(values, torch.Tensor) and values.numel() else None

    def _structure(self, node: Node, plane: torch.Tensor) -> Expr | None:
        """``plane``, made of ``node``, as a condition on its row ``i`` and its column ``j``."""
        found = prove_structure(plane)
        if found is None and (hidden := prove_structure(~plane)) is not None:
            found = self.settled(call("not", hidden))
        if found is not None:
            self.constants.with_buffers.assume(node)
        return found

    def _part_of_plane(self, node: Node, index: Index) -> Expr | None:
        """A constant plane of two numbers, of which as much is read as there are rows and keys."""
        if len(index) < 2 or not any(part.reads(s) for part in index[-2:] for s in (I, J)):
            return None
        values = self.constants.with_buffers.value(node)
        if id(values) not in self._planes:
            self._planes[id(values)] = self._two_valued(node)
        found = self._planes[id(values)]
        if found is None:
            return None
        self.constants.with_buffers.assume(node)
        row, column = index[-2:]
        inside, *numbers = found
        return choose(self.settled(inside.replace(lambda e: row if e == I else column if e == J else e)), *numbers)

    def _two_valued(self, node: Node) -> tuple[Expr, Expr, Expr] | None:
        """Where a constant plane holds the larger of two numbers; the two."""
        plane = self._plane(node)
        if plane is None or plane.is_complex():
            return None
        low, high = plane.aminmax()
        if not bool(((plane == low) | (plane == high)).all()):
            return None
        inside = prove_structure(plane == high)
        if inside is None:
            outside = prove_structure(plane == low)
            inside = None if outside is None else call("not", outside)
        if inside is None:
            return None
        return inside, rounded(high.item(), plane.dtype), rounded(low.item(), plane.dtype)

    def _explains(self, expr: Expr, index: Index) -> bool:
        """Whether an expression is better than the tensor itself: it captures less, or has structure to prove."""
        captured = self._captured(expr)
        if not captured or expr.op == "capture":
            return True
        letters = frozenset(str(s) for s in _INDICES if any(part.reads(s) for part in index))
        if not {"i", "j"} <= letters:
            return is_two_valued(expr) or any(expr.reads(s) for s in _INDICES)
        if not any(r.letters == letters for r in captured):
            return True
        planes = [r for r in captured if {"i", "j"} <= r.letters]
        return len(planes) < 2 and not any(e.op in _HEAVY for e in expr.walk())

    def _captured(self, expr: Expr) -> list[Reading]:
        return [self.readings[n] for n in sorted({int(e.value or 0) for e in expr.leaves if e.op == "capture"})]

    def _leaf(self, node: Node, index: Index, reason: Unreadable) -> Expr:
        """``node`` captured as it is, if the kernels can read it at ``index``; of a constant plane what it holds."""
        known = self._part_of_plane(node, index)
        if known is not None:
            return known
        names = [part for part in index if part.op == "symbol"]
        plain = all(part in _INDICES or part.op == "const" for part in index) and len(set(names)) == len(names)
        if not plain or tensor(node).dtype not in NAME_OF:
            raise reason
        for size, part in zip(shape(node), index, strict=True):
            if part.op == "symbol" and not same_size(size, self.domain.extent(str(part))):
                raise reason
        reading = Reading(node, index)
        if reading not in self.readings:
            self.readings.append(reading)
        return capture(self.readings.index(reading))


def renumbered(lifted: Lifted) -> Lifted:
    """The same with only the readings that are used."""
    used = sorted({int(e.value or 0) for e in lifted.expr.leaves if e.op == "capture"})

    def change(expr: Expr) -> Expr:
        return capture(used.index(int(expr.value or 0))) if expr.op == "capture" else expr

    return Lifted(lifted.expr.replace(change), tuple(lifted.readings[n] for n in used))
