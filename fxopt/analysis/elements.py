"""Operators read element by element: the value of each at an index, from the values of its operands.

Every operator that builds masks, positions and biases out of sizes has an entry in `ELEMENTS`; what has none stays a
captured tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Protocol

import torch
from torch.fx import Node

from fxopt.analysis.linear import Bounds
from fxopt.analysis.values import apply as compute
from fxopt.analysis.values import choose, compared, converted, is_coarser, known_here, rounded
from fxopt.analysis.views import ZERO, Index, Unreadable, Views
from fxopt.ir.expression import Expr, call, const
from fxopt.ir.nodes import arguments, is_tensor, same_size, scalar, shape, tensor

aten = torch.ops.aten


class Walk(Protocol):
    """What an operator asks of the walk that reads it; ``reach`` bounds what dtypes must hold."""

    views: Views
    reach: Bounds

    def element(self, node: Node, index: Index) -> Expr:
        """The value of ``node`` at ``index``; raises `Unreadable`."""
        ...

    def depends(self, expr: Expr, index: Expr) -> bool:
        """Whether ``expr``, or a tensor that it captures, varies with ``index``."""
        ...

    def settled(self, expr: Expr) -> Expr:
        """A truth value in its simplest form."""
        ...


Element = Callable[[Walk, Node, Index], Expr]


def operand(walk: Walk, value: Any, node: Node, index: Index, dtype: torch.dtype | None = None) -> Expr:
    """The value of one operand of a pointwise ``node``, converted to ``dtype`` unless that is ``None``."""
    if is_tensor(value):
        expr = walk.element(value, walk.views.broadcast(value, index, node))
        before = tensor(value).dtype
    else:
        expr, before = _literal(walk, value, node)
    if dtype is None:
        return expr
    result = converted(expr, before, dtype, walk.reach)
    if result is None:
        raise Unreadable(f"{before} can't be followed into {dtype}", node)
    return result


def _literal(walk: Walk, value: Any, node: Node) -> tuple[Expr, torch.dtype]:
    number = scalar(value)
    if number is None:
        return walk.views.size(value, node), torch.int64
    kinds = {bool: torch.bool, int: torch.int64, float: torch.float64}
    return const(number), kinds[type(number)]


def _common(values: list[Any]) -> torch.dtype:
    """The dtype in which operands meet."""
    left, right = (tensor(v) if is_tensor(v) else (1 if (n := scalar(v)) is None else n) for v in values)
    return torch.result_type(left, right)


#: Arithmetic on truth values.
_OF_TRUTH: Final = {"add": "or", "mul": "and", "minimum": "and", "maximum": "or"}


def _arithmetic(op: str, *names: str) -> Element:
    def read(walk: Walk, node: Node, index: Index) -> Expr:
        given, dtype = arguments(node), tensor(node).dtype
        if dtype is torch.bool and op in _OF_TRUTH:
            return walk.settled(
                call(_OF_TRUTH[op], *(operand(walk, given[name], node, index, dtype) for name in names))
            )
        if dtype is torch.bool or dtype in (torch.uint8, torch.int8, torch.int16):
            raise Unreadable(f"arithmetic in {dtype} is not followed", node)
        terms = (operand(walk, given[name], node, index, _precision(op, given[name], dtype)) for name in names)
        return compute(op, tuple(terms), dtype)

    return read


def _precision(op: str, value: Any, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which an operand enters a computation: products of half precision take numbers as they are."""
    scales = op in ("mul", "div") and not is_tensor(value)
    return torch.float32 if scales and is_coarser(dtype, torch.float32) else dtype


def _scaled(op: str, first: str = "self", second: str = "other") -> Element:
    """``first ± alpha·second``."""

    def read(walk: Walk, node: Node, index: Index) -> Expr:
        given, dtype = arguments(node), tensor(node).dtype
        if given.get("alpha", 1) == 1:
            return _arithmetic(op, first, second)(walk, node, index)
        if dtype is torch.bool:
            raise Unreadable("arithmetic in bool is not followed", node)
        left, right, alpha = (operand(walk, given[name], node, index, dtype) for name in (first, second, "alpha"))
        return compute(op, (left, compute("mul", (right, alpha), dtype)), dtype)

    return read


def _division(walk: Walk, node: Node, index: Index) -> Expr:
    mode = arguments(node).get("rounding_mode")
    if mode is None:
        return _arithmetic("div", "self", "other")(walk, node, index)
    return _whole_division(walk, node, index, mode)


def _floor_division(walk: Walk, node: Node, index: Index) -> Expr:
    return _whole_division(walk, node, index, "floor")


def _whole_division(walk: Walk, node: Node, index: Index, mode: str) -> Expr:
    given, dtype = arguments(node), tensor(node).dtype
    if dtype not in (torch.int32, torch.int64):
        raise Unreadable(f"whole division in {dtype} is not followed", node)
    left, right = (operand(walk, given[name], node, index, dtype) for name in ("self", "other"))
    bounds = walk.views.bounds
    if mode == "trunc" and (bounds.between(left)[0] < 0 or bounds.between(right)[0] <= 0):
        raise Unreadable("a division that truncates may meet negative numbers", node)
    return walk.views.tidy(compute("floordiv", (left, right), dtype))


def _remainder(walk: Walk, node: Node, index: Index) -> Expr:
    if tensor(node).dtype not in (torch.int32, torch.int64):
        raise Unreadable("remainders of reals are not followed", node)
    return walk.views.tidy(_arithmetic("mod", "self", "other")(walk, node, index))


def _clamp(walk: Walk, node: Node, index: Index) -> Expr:
    given, dtype = arguments(node), tensor(node).dtype
    result = operand(walk, given["self"], node, index, dtype)
    for op, name in (("maximum", "min"), ("minimum", "max")):
        if given.get(name) is not None:
            result = compute(op, (result, operand(walk, given[name], node, index, dtype)), dtype)
    return result


def _comparison(op: str) -> Element:
    def read(walk: Walk, node: Node, index: Index) -> Expr:
        given = arguments(node)
        values = [given["self"], given["other"]]
        dtype = _common(values)
        left, right = (operand(walk, v, node, index, dtype) for v in values)
        result = compared(op, left, right, dtype, walk.reach)
        if result is None:
            raise Unreadable(f"a comparison in {dtype} depends on rounding", node)
        return walk.settled(result)

    return read


def _logical(op: str) -> Element:
    def read(walk: Walk, node: Node, index: Index) -> Expr:
        given = arguments(node)
        if tensor(node).dtype is not torch.bool:
            raise Unreadable("bits of integers are not followed", node)
        names = ("self",) if op == "not" else ("self", "other")
        truths = tuple(operand(walk, given[name], node, index, torch.bool) for name in names)
        return walk.settled(call("ne" if op == "xor" else op, *truths))

    return read


def _where(walk: Walk, node: Node, index: Index) -> Expr:
    given, dtype = arguments(node), tensor(node).dtype
    condition = walk.settled(operand(walk, given["condition"], node, index, torch.bool))
    return _chosen(walk, node, condition, given["self"], given["other"], index, dtype)


def _masked_fill(walk: Walk, node: Node, index: Index) -> Expr:
    given, dtype = arguments(node), tensor(node).dtype
    condition = walk.settled(operand(walk, given["mask"], node, index, torch.bool))
    return _chosen(walk, node, condition, given["value"], given["self"], index, dtype)


def _chosen(
    walk: Walk, node: Node, condition: Expr, kept: Any, otherwise: Any, index: Index, dtype: torch.dtype
) -> Expr:
    if condition.op == "const":
        return operand(walk, kept if condition.value else otherwise, node, index, dtype)
    first, second = (operand(walk, v, node, index, dtype) for v in (kept, otherwise))
    if dtype is torch.bool:
        return walk.settled(call("where", condition, first, second))
    return choose(condition, known_here(first, condition, True), known_here(second, condition, False))


def _cast(walk: Walk, node: Node, index: Index) -> Expr:
    result = operand(walk, node.args[0], node, index, tensor(node).dtype)
    return walk.settled(result) if tensor(node).dtype is torch.bool else result


def _arange(walk: Walk, node: Node, index: Index) -> Expr:
    given, dtype = arguments(node), tensor(node).dtype
    start, step = given.get("start", 0), given.get("step", 1)
    if any(isinstance(scalar(x), float) for x in (start, step)):
        raise Unreadable("positions that are not whole are not followed", node)
    first, pace = (operand(walk, x, node, index) for x in (start, step))
    place = walk.views.tidy(call("add", first, call("mul", index[0], pace)))
    result = converted(place, torch.int64, dtype, walk.reach)
    if result is None:
        raise Unreadable(f"positions in {dtype} are not followed", node)
    return result


def _fill(value: Any = None) -> Element:
    """A tensor of one number: ``value``, or the argument that holds it."""

    def read(walk: Walk, node: Node, index: Index) -> Expr:
        given, dtype = arguments(node), tensor(node).dtype
        number = value if value is not None else given.get("fill_value", given.get("s"))
        if isinstance(number, bool | int | float):
            return rounded(number, dtype)
        return operand(walk, number, node, index, dtype)

    return read


def _triangle(op: str) -> Element:
    """``tril``: what lies at ``column <= row + diagonal``; ``triu``: at ``column >= row + diagonal``."""

    def read(walk: Walk, node: Node, index: Index) -> Expr:
        given, dtype = arguments(node), tensor(node).dtype
        offset = operand(walk, given["diagonal"], node, index)
        inside = walk.settled(call(op, index[-1], call("add", index[-2], offset)))
        return _chosen(walk, node, inside, given["self"], False if dtype is torch.bool else 0, index, dtype)

    return read


def _eye(walk: Walk, node: Node, index: Index) -> Expr:
    dtype = tensor(node).dtype
    return choose(walk.settled(call("eq", *index)), rounded(1, dtype), rounded(0, dtype))


def _running_sum(walk: Walk, node: Node, index: Index) -> Expr:
    """``Σ x[0 … t]`` of an ``x`` that is the same everywhere: ``(t + 1)·x``."""
    given, dtype = arguments(node), tensor(node).dtype
    axis = int(given["dim"]) % len(index)
    place = index[axis]
    value = operand(walk, given["self"], node, index, dtype)
    others = (*index[:axis], *index[axis + 1 :])
    if place != ZERO and (place.op != "symbol" or place in others or walk.depends(value, place)):
        raise Unreadable("a running sum of what is not constant", node)
    count = converted(walk.views.tidy(call("add", place, const(1))), torch.int64, dtype, walk.reach)
    if count is None:
        raise Unreadable(f"counts in {dtype} are not followed", node)
    return compute("mul", (count, value), dtype)


def _difference(walk: Walk, node: Node, index: Index) -> Expr:
    """``x[t] - x[t - 1]``, with ``x[-1]`` given."""
    given = arguments(node)
    axis, before, source = int(given["dim"]) % len(index), given["prepend"], given["self"]
    fits = given["n"] == 1 and given["append"] is None and tensor(node).dtype in (torch.int32, torch.int64)
    if not fits or before is None or not same_size(shape(before)[axis], 1):
        raise Unreadable("only first differences with one element put before are followed", node)

    def at(tensor_node: Node, place: Expr) -> Expr:
        return walk.element(tensor_node, (*index[:axis], walk.views.tidy(place), *index[axis + 1 :]))

    def minus(left: Expr, right: Expr) -> Expr:
        return walk.views.tidy(call("sub", left, right))

    place = index[axis]
    first = minus(at(source, ZERO), at(before, ZERO))
    later = minus(at(source, place), at(source, call("sub", place, const(1))))
    return choose(walk.settled(call("eq", place, ZERO)), first, later)


def _index(walk: Walk, node: Node, index: Index) -> Expr:
    """``x[…, t₁, t₂, …]`` with tensors of positions."""
    source, given = node.args[0], list(node.args[1])  # type: ignore[arg-type]
    given += [None] * (len(shape(source)) - len(given))
    places = [n for n, t in enumerate(given) if t is not None]
    rank = max(len(shape(given[n])) for n in places)
    together = places == list(range(places[0], places[0] + len(places)))
    start = places[0] if together else 0
    shared, rest = index[start : start + rank], [*index[:start], *index[start + rank :]]
    sizes = shape(node)[start : start + rank]
    found = [_position(walk, t, shared, sizes, source, axis, node) if t is not None else rest.pop(0)
             for axis, t in enumerate(given)]  # fmt: skip
    return walk.element(source, tuple(found))  # type: ignore[arg-type]


def _position(walk: Walk, positions: Any, shared: Index, sizes: Any, source: Any, axis: int, node: Node) -> Expr:
    """Where a tensor of positions points to at ``shared``, counted from the front."""
    if tensor(positions).dtype not in (torch.int64, torch.int32):
        raise Unreadable("a selection by truth values", node)
    rank = len(shape(positions))
    inner = zip(shape(positions), sizes[len(sizes) - rank :], shared[len(shared) - rank :], strict=True)
    at = tuple(Views.aligned(size, full, place, node) for size, full, place in inner)
    return pointed(walk, walk.element(positions, at), shape(source)[axis], node)


def pointed(walk: Walk, place: Expr, size: Any, node: Node) -> Expr:
    """A position that is counted from the front, or, where it is negative, from the end."""
    place = walk.views.tidy(place)
    low, high = walk.views.bounds.between(place)
    if high < 0:
        return walk.views.tidy(call("add", place, walk.views.size(size, node)))
    if low < 0:
        raise Unreadable("a position may be counted from the end", node)
    return place


def _embedding(walk: Walk, node: Node, index: Index) -> Expr:
    given = arguments(node)
    row = pointed(walk, walk.element(given["indices"], index[:-1]), shape(given["weight"])[0], node)
    return walk.element(given["weight"], (row, index[-1]))


def _gather(walk: Walk, node: Node, index: Index) -> Expr:
    given = arguments(node)
    axis = int(given["dim"]) % len(index)
    place = pointed(walk, walk.element(given["index"], index), shape(given["self"])[axis], node)
    return walk.element(given["self"], (*index[:axis], place, *index[axis + 1 :]))


def _index_select(walk: Walk, node: Node, index: Index) -> Expr:
    given = arguments(node)
    axis = int(given["dim"]) % len(index)
    place = pointed(walk, walk.element(given["index"], (index[axis],)), shape(given["self"])[axis], node)
    return walk.element(given["self"], (*index[:axis], place, *index[axis + 1 :]))


def _repeat(walk: Walk, node: Node, index: Index) -> Expr:
    source = node.args[0]
    sizes = (*(1,) * (len(index) - len(shape(source))), *shape(source))
    places = [
        part if same_size(before, after) else call("mod", part, walk.views.size(before, node))
        for before, after, part in zip(sizes, shape(node), index, strict=True)
    ]
    inner = tuple(walk.views.tidy(part) for part in places[len(places) - len(shape(source)) :])
    return walk.element(source, inner)  # type: ignore[arg-type]


_BY_FORM: Final[dict[str, Element]] = {
    "add": _scaled("add"), "sub": _scaled("sub"), "rsub": _scaled("sub", "other", "self"),
    "mul": _arithmetic("mul", "self", "other"), "neg": _arithmetic("neg", "self"), "abs": _arithmetic("abs", "self"),
    "div": _division, "floor_divide": _floor_division, "remainder": _remainder, "clamp": _clamp, "clamp_min": _clamp,
    "clamp_max": _clamp, "minimum": _arithmetic("minimum", "self", "other"),
    "maximum": _arithmetic("maximum", "self", "other"),
    "min.other": _arithmetic("minimum", "self", "other"), "max.other": _arithmetic("maximum", "self", "other"),
    **{op: _comparison(op) for op in ("lt", "le", "gt", "ge", "eq", "ne")},
    "__and__": _logical("and"), "__or__": _logical("or"), "bitwise_and": _logical("and"),
    "bitwise_or": _logical("or"), "bitwise_not": _logical("not"), "logical_and": _logical("and"),
    "logical_or": _logical("or"), "logical_not": _logical("not"), "logical_xor": _logical("xor"),
    "where": _where, "masked_fill": _masked_fill,
    "to": _cast, "_to_copy": _cast, "type_as": _cast,
    "arange": _arange, "full": _fill(), "full_like": _fill(), "new_full": _fill(), "scalar_tensor": _fill(),
    "ones": _fill(1), "ones_like": _fill(1), "new_ones": _fill(1),
    "zeros": _fill(0), "zeros_like": _fill(0), "new_zeros": _fill(0),
    "eye": _eye, "tril": _triangle("le"), "triu": _triangle("ge"), "cumsum": _running_sum, "diff": _difference,
    "index": _index, "gather": _gather, "embedding": _embedding, "index_select": _index_select, "repeat": _repeat,
}  # fmt: skip
_FORMS: Final = frozenset({
    "default", "Tensor", "Scalar", "Tensor_mode", "Scalar_mode", "self", "ScalarOther", "ScalarSelf", "start",
    "start_step", "m", "device", "dtype", "dtype_layout", "other",
})  # fmt: skip


def element_of(node: Node) -> Element | None:
    """How the operator that ``node`` calls is read, if it is."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return None
    overload = str(target).removeprefix("aten.")
    name, _, form = overload.partition(".")
    return _BY_FORM.get(overload) or (_BY_FORM.get(name) if form in _FORMS else None)
