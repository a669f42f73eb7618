"""What Triton's interpreter works out anew for each operation, and need not: more than half of its time went into that.

No value of a tensor depends on any of this. Types of blocks are made once and keep what follows from them; a look at an
overflow that ends in an assertion which is off (``debug``) isn't taken.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_make_block_type = core.block_type.__init__
_broadcast = TritonSemantic.broadcast_impl_value
_equal = core.dtype.__eq__
_same = {type(None), bool, int, float, str, core.dtype, core.pointer_type, core.block_type, core.tensor}


def _kept(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """What follows from a type is kept with it: types don't change."""
    name = f"_kept_{function.__name__}"

    @functools.wraps(function)
    def kept(of: Any) -> Any:
        known = of.__dict__.get(name)
        if known is None:
            known = of.__dict__[name] = function(of)
        return known

    return kept


def _block_type(cls: Any, element: Any, shape: Any) -> Any:
    """The one block type of these elements and this shape."""
    key = tuple(core._unwrap_if_constexpr(size) for size in shape)
    known = element.__dict__.setdefault("_blocks", {})
    if key not in known:
        made = known[key] = object.__new__(cls)
        _make_block_type(made, element, shape)
    return known[key]


@functools.cache
def _shape(*sizes: int) -> tuple[Any, Any]:
    return core.tuple([core.constexpr(size) for size in sizes]), core.constexpr(math.prod(sizes))


@_kept
def _facts(of: Any) -> tuple[Any, Any, Any]:
    return of.scalar, *_shape(*of.shape if of.is_block() else ())


def _tensor(self: Any, handle: Any, of: Any) -> None:
    self.handle, self.type = handle, of
    self.dtype, self.shape, self.numel = _facts(of)


def _unwrapped(value: Any) -> Any:
    """Most values are known at a glance not to be constexprs or to hold any."""
    if value.__class__ in _same:
        return value
    return value.value if value.__class__ is core.constexpr else _unwrap(value)


_unwrap = core._unwrap_if_constexpr


def _broadcast_where_shapes_differ(self: Any, left: Any, right: Any) -> Any:
    return (left, right) if left.shape is right.shape else _broadcast(self, left, right)


core.block_type.__new__ = _block_type
core.block_type.__init__ = lambda *_: None
core.block_type.to_ir = lambda self, builder: self
core.tensor.__init__ = _tensor
core._unwrap_if_constexpr = _unwrapped
core.dtype.__eq__ = lambda self, other: self is other or _equal(self, other)
TritonSemantic.broadcast_impl_value = _broadcast_where_shapes_differ
interpreter._get_np_dtype = _kept(interpreter._get_np_dtype)
interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
