"""Telling calls apart by all that their results' metadata can depend on, so that calls alike are worked out once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch._subclasses.fake_tensor import FakeTensor

_CONSTANTS: Final = (
    bool, int, str, type(None), type(Ellipsis), torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip


class Unlike(Exception):
    """An argument that no other can be told to be like: a symbolic size, a tensor of unknown sizes, an object."""


def likeness(value: Any, of_operand: Callable[[Any], Any]) -> Any:
    """A hashable stand-in for an argument of a call; ``of_operand`` gives that of what is no constant.

    Raises:
        Unlike: from ``of_operand``.
    """
    if isinstance(value, _CONSTANTS):
        return type(value), value
    if isinstance(value, float):
        return float, repr(value)
    if isinstance(value, slice):
        return slice, *(likeness(part, of_operand) for part in (value.start, value.stop, value.step))
    if isinstance(value, dict):
        return dict, *((name, likeness(part, of_operand)) for name, part in value.items())
    if isinstance(value, tuple | list):
        return type(value), *(likeness(part, of_operand) for part in value)
    return of_operand(value)


def metadata(value: object) -> Any:
    """All that a call can ask of a fake tensor without its contents.

    Raises:
        Unlike: it is none, its sizes are symbolic, it is sparse, or its contents are known.
    """
    if type(value) is not FakeTensor or value.layout is not torch.strided or value.constant is not None:
        raise Unlike
    sizes = (*value.shape, *value.stride(), value.storage_offset(), value.untyped_storage().nbytes())
    if not all(isinstance(size, int) for size in sizes):
        raise Unlike
    flags = (value.requires_grad, value.is_leaf, value.is_conj(), value.is_neg(), value.is_inference())
    return value.dim(), sizes, value.dtype, value.device, flags
