"""Operands of a site read as positions: masks and biases become expressions, and smaller tensors are captured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch.fx import Node

from fxopt.analysis.domain import Domain
from fxopt.analysis.index import IndexLifter, Lifted, Reading, renumbered
from fxopt.analysis.values import is_coarser, is_unrounded
from fxopt.analysis.views import ZERO, Index, Unreadable
from fxopt.analysis.width import is_counted
from fxopt.ir.attention import Capture
from fxopt.ir.expression import Expr, call, capture, const, symbol
from fxopt.ir.nodes import Size, same_size, shape, tensor
from fxopt.passes.attention.space import Operand, Space, split_lead, with_adjacent_keys
from fxopt.rewriter.builder import Builder

aten = torch.ops.aten

_LETTERS: Final = "bhij"
_UNITS: Final = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))


class Captured(Protocol):
    """A tensor that a site captures."""

    @property
    def node(self) -> Node:
        """Where it comes from."""
        ...

    def obstacle(self, space: Space) -> str:
        """Why it can't be read in ``space``; empty when it can."""
        ...

    def capture(self, builder: Builder, space: Space) -> tuple[Node, Capture]:
        """Build the rank-4 view and describe it."""
        ...


@dataclass(frozen=True)
class ReadTensor:
    """A tensor of any rank whose axes are read at some of ``b h i j`` or at fixed places; ``counted``: integers are
    made of it, which its own narrow dtype may not hold.
    """

    reading: Reading
    counted: bool = False

    @property
    def node(self) -> Node:
        """The tensor."""
        return self.reading.node

    def obstacle(self, space: Space) -> str:
        """None: the reading was made for the space."""
        return ""

    def capture(self, builder: Builder, space: Space) -> tuple[Node, Capture]:
        """Fixed axes selected, the others in the order ``b h i j``, the missing ones added with size 1."""
        node = self.node
        letters: list[str] = []
        for axis, part in reversed(list(enumerate(self.reading.index))):
            if part.op == "symbol":
                letters.insert(0, str(part))
            else:
                node = builder.call(aten.select.int, node, axis, int(part.value or 0))
        order = sorted(range(len(letters)), key=lambda axis: _LETTERS.index(letters[axis]))
        if order != sorted(order):
            node = builder.call(aten.permute.default, node, order)
        for axis, letter in enumerate(_LETTERS):
            if letter not in letters:
                node = builder.call(aten.unsqueeze.default, node, axis)
        dims = "".join(letter if letter in letters else "-" for letter in _LETTERS)
        if self.counted and tensor(node).dtype in (torch.uint8, torch.int8, torch.int16):
            node = builder.cast(node, torch.int32)
        node = with_adjacent_keys(builder, node)
        return node, Capture(dims, tensor(node).dtype)


def domain_of(space: Space) -> Domain:
    """The domain of the indices of a site."""
    return Domain(space.batch, space.heads, space.rows, space.columns)


@dataclass(frozen=True)
class Explained:
    """An expression whose operands were read as positions as far as that goes; ``notes`` say why no further."""

    expression: Expr
    operands: tuple[Captured, ...]
    notes: Mapping[int, str]

    def loaded(self, operands: Sequence[Captured], read: Iterable[int]) -> tuple[str, ...]:
        """A sentence for each of the ``operands`` that is ``read`` and has a value for each row and key: its number
        among those that are read, its size, and why it is loaded where that is known.
        """
        told = []
        for number, n in enumerate(sorted(read)):
            sizes = plane_of(operands[n])
            if sizes is not None:
                node = operands[n].node
                text = f"c{number} = {node} {list(sizes)}{_bytes(sizes, node)} is loaded for each row and key"
                told.append(f"{text}: {self.notes[n]}" if self.notes.get(n) else text)
        return tuple(told)


def plane_of(operand: Captured) -> tuple[Size, ...] | None:
    """The sizes of what is loaded of ``operand``, where that has a value for each row and key."""
    known = shape(operand.node)
    if isinstance(operand, ReadTensor):
        sizes = tuple(size for size, part in zip(known, operand.reading.index, strict=True) if part.op == "symbol")
        return sizes if {"i", "j"} <= operand.reading.letters else None
    if not isinstance(operand, Operand):
        return None
    strides = tensor(operand.node).stride()
    sizes = tuple(1 if same_size(stride, 0) else size for size, stride in zip(known, strides, strict=True))
    return sizes if len(sizes) > 1 and not any(same_size(size, 1) for size in sizes[-2:]) else None


def _bytes(sizes: tuple[Size, ...], node: Node) -> str:
    if not all(isinstance(size, int) for size in sizes):
        return ""
    count = math.prod(map(int, sizes)) * tensor(node).dtype.itemsize
    size, unit = next(known for known in _UNITS if count >= known[0] or known[0] == 1)
    return f" ({count / size:.3g} {unit})"


def explain(
    expression: Expr, operands: Sequence[Operand], space: Space, lifter: IndexLifter, precision: torch.dtype
) -> Explained:
    """Replace operands of ``expression`` by expressions over positions where those capture less, and where they are not
    rounded more than scores of the dtype ``precision`` are.
    """
    domain = domain_of(space)
    found: list[Captured] = list(operands)
    terms: dict[int, Expr] = {}
    notes: dict[int, str] = {}
    for number, operand in enumerate(operands):
        lifted = _lift(operand, space, domain, lifter, precision)
        if isinstance(lifted, str):
            notes[number] = lifted
            continue
        dtypes = [tensor(reading.node).dtype for reading in lifted.readings]
        read = [ReadTensor(r, is_counted(lifted.expr, n, dtypes)) for n, r in enumerate(lifted.readings)]
        found.extend(dict.fromkeys(new for new in read if new not in found))
        places = [found.index(each) for each in read]
        notes |= {place: lifter.origin(found[place].node) for place in places}
        terms[number] = _moved(lifted.expr, places)

    def change(expr: Expr) -> Expr:
        return terms.get(int(expr.value or 0), expr) if expr.op == "capture" else expr

    return Explained(expression.replace(change), tuple(found), notes)


def _moved(expr: Expr, places: Sequence[int]) -> Expr:
    """``expr`` with the captures at ``places`` in the place of its own."""

    def change(node: Expr) -> Expr:
        return capture(places[int(node.value or 0)]) if node.op == "capture" else node

    return expr.replace(change)


def _lift(operand: Operand, space: Space, domain: Domain, lifter: IndexLifter, precision: torch.dtype) -> Lifted | str:
    """The operand as an expression, or why it stays as it is (empty when it is as small as can be)."""
    found = read_at(operand, space)
    if found is None:
        return "its leading axes don't divide into batch and heads"
    node, at = found
    lifted = lifter.lift(node, at, domain)
    if isinstance(lifted, Unreadable):
        return str(lifted)
    lifted = renumbered(lifted)
    dtype = tensor(node).dtype
    if is_coarser(dtype, precision) and not is_unrounded(lifted.expr):
        return f"it is computed in {dtype}"
    if lifted.expr == capture(0) and lifted.readings[0].letters == _letters(at):
        return lifter.origin(node)
    return lifted


def read_at(operand: Captured, space: Space) -> tuple[Node, Index] | None:
    """The tensor that is captured and the index at which it is read, where those can be said."""
    if isinstance(operand, ReadTensor):
        return operand.node, operand.reading.index
    if not isinstance(operand, Operand):
        return None
    index = stage_index(operand.stage, space)
    if index is None:
        return None
    known = shape(operand.node)
    inner = index[len(index) - len(known) :]
    return operand.node, tuple(ZERO if same_size(size, 1) else part for size, part in zip(known, inner, strict=True))


def _letters(index: Index) -> frozenset[str]:
    return frozenset(name for name in _LETTERS if any(part.reads(symbol(name)) for part in index))


def stage_index(stage: tuple[Size, ...], space: Space) -> Index | None:
    """The index of each axis of a stage ``[*lead, S, T]``: which part of ``b`` and ``h`` each leading axis is."""
    lead, tail = stage[:-2], (symbol("i"), symbol("j"))
    split = split_lead(lead, space)
    if split is not None:
        batch, heads = _digits(lead[:split], "b"), _digits(lead[split:], "h")
        return None if batch is None or heads is None else (*batch, *heads, *tail)
    if len(lead) == 1 and isinstance(space.heads, int) and same_size(lead[0], space.batch * space.heads):
        return (call("add", call("mul", symbol("b"), const(space.heads)), symbol("h")), *tail)
    return None


def _digits(sizes: tuple[Size, ...], name: str) -> Index | None:
    """``name`` as digits to the base of ``sizes``."""
    if len(sizes) <= 1:
        return (symbol(name),) * len(sizes)
    result: list[Expr] = []
    rest: Expr = symbol(name)
    for size in reversed(sizes[1:]):
        if not isinstance(size, int):
            return None
        result.insert(0, call("mod", rest, const(size)))
        rest = call("floordiv", rest, const(size))
    return (rest, *result)
