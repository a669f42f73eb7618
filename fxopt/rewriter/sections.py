"""Patterns for a section of an axis, however it was cut: slices, narrow, chunk and split are one thing."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fxopt.ir.nodes import arguments, is_call, is_tensor, scalar, shape
from fxopt.rewriter.pattern import Match, Miss, Pattern, behind_identities

aten = torch.ops.aten


@dataclass(frozen=True)
class Section:
    """``base[..., start:stop:step, ...]`` along ``axis`` (counted from the end)."""

    base: Node
    axis: int
    start: int
    stop: int
    step: int = 1


@dataclass(frozen=True)
class Part(Pattern):
    """Part ``index`` of ``pattern`` cut into ``parts`` equal ones along its last axis.

    A part is a run of neighbours; with ``strided`` it is every ``parts``-th element, starting at ``index``.
    """

    pattern: Pattern
    index: int
    parts: int = 2
    strided: bool = False

    def match(self, value: Any, so_far: Match) -> Match | Miss:
        """See `Pattern.match`."""
        section = read_section(value)
        if section is None:
            return Miss(len(so_far.nodes), f"expected {self}, found {value}", so_far.root)
        size = scalar(shape(section.base)[section.axis])
        if section.axis != -1 or not isinstance(size, int) or not self._fits(section, size):
            return Miss(len(so_far.nodes), f"{value} is not {self}", value)
        return self.pattern.match(behind_identities(section.base), so_far.cover(value))

    def _fits(self, section: Section, size: int) -> bool:
        if size % self.parts:
            return False
        if self.strided:
            return (section.start, section.stop, section.step) == (self.index, size, self.parts)
        length = size // self.parts
        return (section.start, section.stop, section.step) == (self.index * length, (self.index + 1) * length, 1)

    def __str__(self) -> str:
        kind = "interleaved parts" if self.strided else "parts"
        return f"part {self.index} of {self.parts} equal {kind} of the last axis"


def read_section(node: object) -> Section | None:
    """What section of what ``node`` is, if it is one along an axis of static size."""
    if not is_tensor(node) or not isinstance(node, Node):
        return None
    if is_call(node, aten.slice.Tensor):
        return _slice(node)
    if is_call(node, aten.narrow.default):
        given = arguments(node)
        return _section(given["self"], given["dim"], given["start"], given["length"])
    if is_call(node, operator.getitem):
        return _piece(node.args[0], node.args[1])
    return None


def _slice(node: Node) -> Section | None:
    given = arguments(node)
    base, axis, step = given["self"], given["dim"], given["step"]
    size = scalar(shape(base)[axis])
    start, stop = given["start"] or 0, given["end"]
    stop = size if stop is None else stop
    if not all(isinstance(value, int) for value in (size, start, stop, step)):
        return None
    start, stop, _ = slice(start, stop, step).indices(int(size or 0))
    return Section(base, _from_end(axis, base), start, stop, step)


def _piece(cut: object, index: object) -> Section | None:
    """Result number ``index`` of a call that cuts an axis into pieces, all as long as the first but for the last."""
    if not is_call(cut, aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes):
        return None
    assert isinstance(cut, Node) and isinstance(index, int)
    lengths = [scalar(piece.shape[arguments(cut)["dim"]]) for piece in cut.meta["val"]]
    if not all(isinstance(length, int) for length in lengths):
        return None
    return _section(arguments(cut)["self"], arguments(cut)["dim"], sum(lengths[:index]), lengths[index])


def _section(base: Node, axis: int, start: Any, length: Any) -> Section | None:
    size = scalar(shape(base)[axis])
    if not all(isinstance(value, int) for value in (size, start, length)):
        return None
    start = start if start >= 0 else start + size
    return Section(base, _from_end(axis, base), start, start + length)


def _from_end(axis: int, base: Node) -> int:
    return axis - len(shape(base)) if axis >= 0 else axis
