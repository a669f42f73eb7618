"""Operators under their second names, and axes moved in other words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch.fx import Node

from fxopt.ir.nodes import arguments, shape, source, tensor
from fxopt.ir.program import Program, operator_name
from fxopt.ir.site import Site, Tier
from fxopt.rewriter.builder import Builder
from fxopt.rewriter.passes import PassResult, Replacement, difference, erase_unused
from fxopt.rewriter.registry import register_pass

aten = torch.ops.aten

#: Second names, and the operators that they stand for, which take the same arguments.
_NAMES: Final = {
    aten.multiply.Tensor: aten.mul.Tensor, aten.multiply.Scalar: aten.mul.Scalar,
    aten.divide.Tensor: aten.div.Tensor, aten.divide.Scalar: aten.div.Scalar,
    aten.divide.Tensor_mode: aten.div.Tensor_mode, aten.divide.Scalar_mode: aten.div.Scalar_mode,
    aten.true_divide.Tensor: aten.div.Tensor, aten.true_divide.Scalar: aten.div.Scalar,
    aten.subtract.Tensor: aten.sub.Tensor, aten.subtract.Scalar: aten.sub.Scalar,
    aten.negative.default: aten.neg.default, aten.absolute.default: aten.abs.default,
    aten.clip.default: aten.clamp.default, aten.clip.Tensor: aten.clamp.Tensor,
    aten.clamp_min.default: aten.clamp.default, aten.max.other: aten.maximum.default,
    aten.min.other: aten.minimum.default, aten.special_expit.default: aten.sigmoid.default,
    aten.greater.Tensor: aten.gt.Tensor, aten.greater.Scalar: aten.gt.Scalar,
    aten.greater_equal.Tensor: aten.ge.Tensor, aten.greater_equal.Scalar: aten.ge.Scalar,
    aten.less.Tensor: aten.lt.Tensor, aten.less.Scalar: aten.lt.Scalar,
    aten.less_equal.Tensor: aten.le.Tensor, aten.less_equal.Scalar: aten.le.Scalar,
    aten.not_equal.Tensor: aten.ne.Tensor, aten.not_equal.Scalar: aten.ne.Scalar,
    aten.concat.default: aten.cat.default, aten.concatenate.default: aten.cat.default,
    aten.linalg_matmul.default: aten.matmul.default,
    aten.swapaxes.default: aten.transpose.int, aten.swapdims.default: aten.transpose.int,
}  # fmt: skip


def _same_arguments(builder: Builder, node: Node) -> Node:
    return builder.call(_NAMES[node.target], *node.args, **node.kwargs)  # type: ignore[index]


def _bounded_above(builder: Builder, node: Node) -> Node:
    given = arguments(node)
    return builder.call(aten.clamp.default, given["self"], None, given["max"])


def _moved(builder: Builder, node: Node) -> Node:
    """Axes that are moved are taken out and put where they are to stand; the others keep their order."""
    given, rank = arguments(node), len(shape(node))
    start, stop = (_axes(given[name], rank) for name in ("source", "destination"))
    rest = iter(axis for axis in range(rank) if axis not in start)
    order = [start[stop.index(place)] if place in stop else next(rest) for place in range(rank)]
    return builder.call(aten.permute.default, given["self"], order)


def _axes(axes: Any, rank: int) -> list[int]:
    return [int(axis) % rank for axis in (axes if isinstance(axes, list | tuple) else [axes])]


def _adjoint(builder: Builder, node: Node) -> Node | None:
    operand = arguments(node)["self"]
    return None if tensor(operand).is_complex() or len(shape(operand)) < 2 else builder.transpose(operand)


def _reversed(builder: Builder, node: Node) -> Node:
    rank = len(shape(node))
    return builder.call(aten.permute.default, arguments(node)["self"], list(reversed(range(rank))))


_FORMS: Final[dict[Any, Callable[[Builder, Node], Node | None]]] = {
    **dict.fromkeys(_NAMES, _same_arguments),
    aten.clamp_max.default: _bounded_above,
    aten.movedim.int: _moved, aten.movedim.intlist: _moved, aten.moveaxis.int: _moved, aten.moveaxis.intlist: _moved,
    aten.mH.default: _adjoint, aten.adjoint.default: _adjoint, aten.matrix_H.default: _adjoint,
    aten.numpy_T.default: _reversed,
}  # fmt: skip


@register_pass
@dataclass(frozen=True)
class Synonyms:
    """``multiply, divide, subtract, clip, greater_equal, swapaxes, movedim, mH, concat, … -> mul, div, sub, clamp, ge,
    transpose, permute, transpose, cat, …``: one name for one operation.

    ``mH`` and ``adjoint`` of real tensors are transposes; ``movedim`` and ``.T`` are permutations; ``clamp_min``,
    ``clamp_max``, ``max(x, y)`` and ``min(x, y)`` are ``clamp``, ``maximum`` and ``minimum``.
    """

    name: ClassVar[str] = "synonyms"
    tier: ClassVar[Tier] = "exact"
    requires: ClassVar[tuple[str, ...]] = ()

    def run(self, program: Program) -> PassResult:
        """Rename them."""
        done = [r for node in list(program.graph.nodes) if node.target in _FORMS and (r := _rename(program, node))]
        if done:
            program.module.recompile()
        return PassResult(bool(done), tuple(done))


def _rename(program: Program, node: Node) -> Replacement | None:
    new = _FORMS[node.target](Builder(program, node, "synonyms"), node)
    if new is None:
        return None
    if difference(node, new):
        program.graph.erase_node(new)
        return None
    name = operator_name(new)
    site = Site("", "rewritten", "synonyms", f"{operator_name(node)} is {name}", source(node), (node.name,))
    node.replace_all_uses_with(new)
    erase_unused(program, node)
    return Replacement("synonyms", "another name", site, name)
