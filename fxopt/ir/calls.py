"""The calls that a captured program serves: those of the example's form, constants and static sizes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxopt.errors import CaptureError

_BY_POSITION: Final = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_NOT_GIVEN: Final = inspect.Parameter.empty


@dataclass(frozen=True)
class Sizes:
    """The shape of a tensor argument: numbers where they are static, names of symbols, ``None`` for what is neither."""

    axes: tuple[int | str | None, ...]

    @staticmethod
    def of(value: Tensor) -> Sizes:
        """The shape of ``value``, whose sizes may be symbolic."""
        return Sizes(tuple(map(_size, value.shape)))

    def __str__(self) -> str:
        return f"[{', '.join('?' if axis is None else str(axis) for axis in self.axes)}]"


@dataclass(frozen=True)
class CallForm:
    """The call that a program was captured with, and so which others it serves.

    Attributes:
        spec: the structure of ``(args, kwargs)``.
        count: how many arguments stand by position.
        named: the names of the others.
        defaults: the model's parameters with their defaults (``inspect.Parameter.empty`` where there is none): in order
            those that may stand by position, then the others.
        positions: how many of them may stand by position.
        expected: of every flat argument its `Sizes`, or the constant that is written into the program; an integer or
            float that is symbolic is ``Sizes(())``.
    """

    spec: pytree.TreeSpec
    count: int
    named: tuple[str, ...]
    defaults: Mapping[str, Any]
    positions: int
    expected: tuple[Any, ...]

    def flat(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """The flat arguments of a call, given by position or by name.

        Raises:
            CaptureError: the program is not the one of this call.
        """
        flat, spec = pytree.tree_flatten((args, dict(kwargs)))
        if spec != self.spec:
            args, kwargs = self._arranged(args, kwargs)
            flat, spec = pytree.tree_flatten((args, dict(kwargs)))
        if spec != self.spec:
            raise CaptureError(
                f"this module was rewritten for arguments of the structure {self.spec}, called with {spec}; "
                "call it as in rewrite(), or rewrite it for this call"
            )
        symbols: dict[str, int] = {}
        for place, (expected, found) in enumerate(zip(self.expected, flat, strict=True)):
            if not _fits(expected, found, symbols):
                raise CaptureError(self._difference(args, kwargs, place, found, symbols))
        return flat

    def _arranged(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """The same call with every argument where the example had it; the call as it is where that can't be."""
        wanted = (*list(self.defaults)[: self.count], *self.named)
        places = list(self.defaults)[: self.positions]
        given = {**dict(zip(places, args, strict=False)), **kwargs}
        values = {**self.defaults, **given}
        further = [name for name in given if name not in wanted and given[name] is not self.defaults.get(name, given)]
        missing = [name for name in wanted if values.get(name, _NOT_GIVEN) is _NOT_GIVEN]
        lost = self.count > self.positions or len(given) < len(args) + len(kwargs)
        if further or missing or lost:
            return args, kwargs
        return tuple(values[name] for name in wanted[: self.count]), {name: values[name] for name in self.named}

    def _difference(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], place: int, found: Any, symbols: Mapping[str, int]
    ) -> str:
        paths, _ = pytree.tree_flatten_with_path((args, dict(kwargs)))
        (_, key, *rest), _ = paths[place]
        names = list(self.defaults)[: self.positions]
        known = not isinstance(key, pytree.SequenceKey)
        name = key.key if known else names[key.idx] if key.idx < len(names) else f"argument {key.idx}"  # type: ignore[attr-defined]
        expected, what = self.expected[place], f"{name}{pytree.keystr(tuple(rest))}"
        if not isinstance(expected, Sizes) or not isinstance(found, Tensor):
            return (
                f"this module was rewritten for {what}={expected}, called with {found!r}; rewrite it for this call too"
            )
        equal = "".join(f", where {name} is {size}" for name, size in symbols.items() if name in expected.axes)
        return (
            f"this module was rewritten for {what} of the sizes {expected}{equal}, called with {list(found.shape)}; "
            "rewrite it for these sizes, or with dynamic_shapes for any"
        )


def call_form(
    forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], values: Sequence[Any]
) -> CallForm:
    """The form of the call ``forward(*args, **kwargs)``; ``values`` are its flat arguments as the program knows them:
    fake tensors, symbolic numbers, and constants.
    """
    parameters = inspect.signature(forward).parameters.values()
    ordered = sorted(parameters, key=lambda parameter: parameter.kind not in _BY_POSITION)
    spec = pytree.tree_structure((tuple(args), dict(kwargs)))
    return CallForm(
        spec,
        len(args),
        tuple(kwargs),
        {parameter.name: parameter.default for parameter in ordered},
        sum(parameter.kind in _BY_POSITION for parameter in ordered),
        tuple(map(_expectation, values)),
    )


def _expectation(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Sizes.of(value)
    return Sizes(()) if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool) else value


def _size(size: int | torch.SymInt) -> int | str | None:
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return str(expression) if expression.is_Symbol else int(expression) if expression.is_Integer else None


def _fits(expected: Any, found: Any, symbols: dict[str, int]) -> bool:
    if not isinstance(expected, Sizes):
        return type(found) is type(expected) and (found is expected or bool(found == expected))
    if not isinstance(found, Tensor):
        return not expected.axes and isinstance(found, int | float | torch.SymInt | torch.SymFloat)
    if found.dim() != len(expected.axes):
        return False
    for axis, size in zip(expected.axes, found.shape, strict=True):
        wanted = symbols.setdefault(axis, size) if isinstance(axis, str) else axis
        if wanted is not None and wanted != size:
            return False
    return True
