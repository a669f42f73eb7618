"""Attentions whose queries, keys and values are the columns of one tensor, as a packed projection gives them.

Their gradients are columns of one tensor too. Where the attention takes that tensor instead of views of it, kernels
write its gradient in place; autograd of the views puts it together from three others, one more walk through memory.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch.fx import Node

from fxopt.analysis.gradients import may_need_gradient
from fxopt.codegen.attention.backward.config import RECOMPUTE, split_config
from fxopt.codegen.attention.packed import Heads, Places
from fxopt.ir.nodes import Size, is_call, is_tensor, same_shape, same_size, shape, tensor
from fxopt.lowering.candidate import Candidate

aten = torch.ops.aten

#: The operator that takes the whole tensor.
PACKED: Final = torch.ops.fxopt.attention_packed.default
#: What always gives a view of its operand; the parts of a split are.
_VIEWS: Final = (
    aten.view.default, aten.transpose.int, aten.permute.default, aten.select.int, aten.slice.Tensor,
    aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.unflatten.int,
    aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int,
    aten.alias.default,
)  # fmt: skip
_SPLITS: Final = _VIEWS[10:15]
#: What gives a view where the strides of its operand allow it.
_RESHAPES: Final = (aten.reshape.default, aten.flatten.using_ints)


@dataclass(frozen=True)
class Packed:
    """The tensor ``[B, S, W]`` that an attention's queries, keys and values are columns of, and which."""

    node: Node
    places: Places


def as_one(site: Node, found: Sequence[Candidate]) -> list[Candidate]:
    """The candidates ``found`` to train ``site`` by, those generated as `PACKED` where they can be."""
    generated = [c for c in found if c.family == "triton" and split_config(c.extra[0])[1] != RECOMPUTE]
    one = packed(site) if generated else None
    if one is None:
        return list(found)
    arguments = (one.node, *site.args[3:5], one.places.numbers())
    return [replace(c, target=PACKED, arguments=arguments) if c in generated else c for c in found]


def packed(site: Node) -> Packed | None:
    """The tensor that queries, keys and values of ``site`` fill, if it may need a gradient.

    ``None`` also where one of them, or a view between, has another reader: its gradient would be added to the whole.
    """
    operands = [node for node in site.args[:3] if isinstance(node, Node)]
    paths = [_path(node) for node in operands]
    for node in paths[0]:
        if not all(node in path for path in paths):
            continue
        places = _places(node, operands)
        if places is not None:
            between = {inner for path in paths for inner in path[: path.index(node)]}
            alone = all(_reads_nothing(user, between, site) for inner in between for user in inner.users)
            return Packed(node, places) if alone and may_need_gradient(node) else None
    return None


def forget(node: Node) -> None:
    """Erase ``node`` and what it is a view of, as long as nothing reads them."""
    for view in _path(node)[:-1]:
        if view.users or view._erased:
            return
        view.graph.erase_node(view)


def _path(node: Node) -> list[Node]:
    """``node``, what it is a view of, what that is a view of, and so on."""
    path = [node]
    while (source := _viewed(path[-1])) is not None:
        path.append(source)
    return path


def _viewed(node: Node) -> Node | None:
    """What ``node`` is a view of."""
    source = node.args[0] if node.op == "call_function" and node.args else None
    if not isinstance(source, Node):
        return None
    part = is_call(node, operator.getitem) and is_call(source, *_SPLITS)
    return source if part or is_call(node, *_VIEWS) or (is_call(node, *_RESHAPES) and _is_view(node, source)) else None


def _is_view(node: Node, source: Node) -> bool:
    try:
        tensor(source).view(shape(node))
    except (RuntimeError, ValueError):
        return False
    return True


def _reads_nothing(user: Node, between: set[Node], site: Node) -> bool:
    """Whether ``user`` has no gradient of its own to add: the attention, a view before it, or one who asks a size."""
    return user is site or user in between or is_call(user, aten.sym_size.int)


def _places(node: Node, operands: Sequence[Node]) -> Places | None:
    """Where the ``operands``, views of ``node``, lie in it, if they are all of its columns."""
    if not is_tensor(node) or len(shape(node)) != 3 or not _is_dense(tensor(node)):
        return None
    found = [_heads(tensor(node), tensor(x)) for x in operands]
    widths = {shape(x)[3] for x in operands}
    if None in found or len(widths) > 1:
        return None
    q, k, v = (heads for heads in found if heads is not None)
    places = Places(int(widths.pop()), q, k, v)
    return places if same_size(places.columns, shape(node)[2]) and places.whole else None


def _heads(whole: torch.Tensor, view: torch.Tensor) -> Heads | None:
    """The columns of ``whole [B, S, W]`` that ``view``, of its memory, has as ``[B, heads, S, D]``, if it is so."""
    batch, count, length, width = view.shape
    step = view.stride(1) if not same_size(count, 1) else width
    first = view.storage_offset() - whole.storage_offset()
    if not all(isinstance(number, int) for number in (count, width, step, first)):
        return None
    along = zip((batch, length, width), (view.stride(0), view.stride(2), view.stride(3)), whole.stride(), strict=True)
    if not same_shape((batch, length), tuple(whole.shape[:2])) or not all(_same_stride(*axis) for axis in along):
        return None
    return Heads(int(first), int(step), int(count))


def _is_dense(whole: torch.Tensor) -> bool:
    _, length, columns = whole.shape
    strides = zip(whole.shape, whole.stride(), (length * columns, columns, 1), strict=True)
    return all(_same_stride(*axis) for axis in strides)


def _same_stride(size: Size, stride: Size, other: Size) -> bool:
    return same_size(size, 1) or same_size(stride, other)
