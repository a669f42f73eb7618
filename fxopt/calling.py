"""The calls that a captured program serves: how arguments are given, their sizes and dtypes, and the constants."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final

import sympy
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxopt.errors import CallError
from fxopt.ir.program import Program

_ADVICE: Final = "rewrite the model for this call"
_SIZES: Final = "give dynamic_shapes to rewrite() for sizes that change"


@dataclass(frozen=True)
class Sized:
    """A tensor among the arguments. A size is a number, or the expression of a symbol where it may change."""

    name: str
    sizes: tuple[Any, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Constant:
    """An argument that is no tensor: the graph is that of this value. ``free`` where an integer may change."""

    name: str
    value: Any
    free: bool = False


@dataclass(frozen=True)
class CallForm:
    """The calls that a program serves.

    Attributes:
        spec: the structure of ``(args, kwargs)``.
        parameters: the model's positional parameters, in order.
        defaults: the values of parameters that a call may leave out.
        positional: how many arguments are positional.
        keywords: the names of the others, in order.
        leaves: what each tensor and constant of the arguments must be.
        bounds: the smallest and largest value of symbols that the user or the model bounds.
        guards: what else must hold of symbols, as the model asked while it was captured.
    """

    spec: pytree.TreeSpec
    parameters: tuple[str, ...]
    defaults: Mapping[str, Any]
    positional: int
    keywords: tuple[str, ...]
    leaves: tuple[Sized | Constant, ...]
    bounds: Mapping[str, tuple[int, int | None]]
    guards: tuple[Any, ...]

    def __deepcopy__(self, memo: dict[int, Any]) -> CallForm:
        return self  # nothing in it changes

    def flat(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The tensors and constants of a call, in the order of the program's inputs.

        Raises:
            CallError: the program is not that of this call; names the argument, and what to do.
        """
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if spec != self.spec:
            leaves, spec = pytree.tree_flatten(self._arranged(args, kwargs))
        if spec != self.spec:
            raise CallError(f"this module was rewritten for calls of the form {self.spec}, not {spec}; {_ADVICE}")
        symbols: dict[str, int] = {}
        for value, expected in zip(leaves, self.leaves, strict=True):
            if isinstance(expected, Sized):
                self._check_tensor(value, expected, symbols)
            elif not _is_same(value, expected):
                raise CallError(
                    f"{expected.name} is {value!r}, but this module was rewritten for {expected.value!r}; {_ADVICE}"
                )
        # In code that is compiled around it, expressions of sizes can't be computed.
        if not torch.compiler.is_compiling() and (self._derived or self.guards):
            self._check_derived(leaves, symbols)
        return leaves

    @cached_property
    def _derived(self) -> tuple[tuple[int, int, sympy.Expr], ...]:
        """Sizes that are expressions of symbols: of which argument, of which axis."""
        sized = [(place, leaf) for place, leaf in enumerate(self.leaves) if isinstance(leaf, Sized)]
        return tuple(
            (place, axis, size)
            for place, leaf in sized for axis, size in enumerate(leaf.sizes) if isinstance(size, sympy.Expr)
        )  # fmt: skip

    def _check_derived(self, leaves: list[Any], symbols: dict[str, int]) -> None:
        for place, axis, wanted in self._derived:
            unknown = [symbol for symbol in wanted.free_symbols if str(symbol) not in symbols]
            found = sympy.solve(wanted - leaves[place].shape[axis], unknown[0]) if len(unknown) == 1 else []
            symbols.update({str(unknown[0]): int(found[0])} if found else {})
        for place, axis, wanted in self._derived:
            if _value(wanted, symbols) != leaves[place].shape[axis]:
                raise self._other_shape(leaves[place], self.leaves[place])
        # Sizes of 0 and 1 run the graph of larger ones, as in torch.export.
        larger = {name: size for name, size in symbols.items() if size > 1}
        for guard in self.guards:
            if _value(guard, larger) is False:
                told = ", ".join(f"{name} = {size}" for name, size in symbols.items())
                raise CallError(f"this module was rewritten for sizes where {guard}, not for {told}; {_ADVICE}")

    def of_dtype(self, before: torch.dtype, now: torch.dtype) -> CallForm:
        """The same calls with tensors of another dtype."""
        leaves = (
            replace(leaf, dtype=now) if isinstance(leaf, Sized) and leaf.dtype == before else leaf
            for leaf in self.leaves
        )
        return replace(self, leaves=tuple(leaves))

    def _arranged(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call with each argument where the example had it: by position or by name, and in that order.

        One that can't be told by its name stays as it is.
        """
        named = dict(zip(self.parameters, args, strict=False))
        if len(args) > len(self.parameters) or any(name in named for name in kwargs):
            return args, kwargs
        given = {**self.defaults, **named, **kwargs}
        wanted = (*self.parameters[: self.positional], *self.keywords)
        left = [name for name in (*named, *kwargs) if name not in wanted and not self._is_default(name, given[name])]
        if self.positional > len(self.parameters):
            return args, kwargs
        missing = [name for name in wanted if name not in given]
        if left or missing:
            told = [f"with {name!r}" for name in missing] + [f"without {name!r}" for name in left]
            raise CallError(f"this module was rewritten for calls {' and '.join(told)}; {_ADVICE}")
        return tuple(given[n] for n in wanted[: self.positional]), {name: given[name] for name in self.keywords}

    def _is_default(self, name: str, value: Any) -> bool:
        return name in self.defaults and _is_same(value, Constant(name, self.defaults[name]))

    def _check_tensor(self, value: Any, expected: Sized, symbols: dict[str, int]) -> None:
        if not isinstance(value, Tensor):
            raise CallError(f"{expected.name} is {value!r}, but this module was rewritten for a tensor; {_ADVICE}")
        if value.dtype != expected.dtype and not _is_cast(value, expected.dtype):
            raise CallError(
                f"{expected.name} is of {value.dtype}, but this module was rewritten for {expected.dtype}; convert "
                "the tensor, move module and tensor together, or rewrite the model for this dtype"
            )
        sizes = tuple(value.shape)
        fits = len(sizes) == len(expected.sizes) and all(
            self._fits(size, wanted, symbols) for size, wanted in zip(sizes, expected.sizes, strict=True)
        )
        if not fits:
            raise self._other_shape(value, expected)

    def _other_shape(self, value: Tensor, expected: Any) -> CallError:
        wanted = ", ".join(map(self._described, expected.sizes))
        return CallError(
            f"{expected.name} has the shape {list(value.shape)}, but this module was rewritten for [{wanted}]; {_SIZES}"
        )

    def _fits(self, size: int, wanted: Any, symbols: dict[str, int]) -> bool:
        if isinstance(wanted, int):
            return size == wanted
        if not isinstance(wanted, str):  # an expression such as 2*s, which is checked when all symbols are known
            return True
        low, high = self.bounds.get(wanted, (0, None))
        known = symbols.setdefault(wanted, size)
        return known == size and size >= low and (high is None or size <= high)

    def _described(self, wanted: Any) -> str:
        low, high = self.bounds.get(str(wanted), (0, None))
        return str(wanted) if not low and high is None else f"{low} ≤ {wanted}" + (f" ≤ {high}" if high else "")


def call_form(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], program: Program
) -> CallForm:
    """The calls of ``forward`` that ``program`` serves, which was captured with ``args`` and ``kwargs``."""
    assert program.signature is not None
    bound = program.signature.bound
    inputs = [node for node in program.graph.find_nodes(op="placeholder") if node.name not in bound]
    paths, spec = pytree.tree_flatten_with_path((args, dict(kwargs)))
    parameters = inspect.signature(forward).parameters.values()
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    values = [node.meta.get("val") for node in inputs]
    leaves = tuple(
        _leaf(_name(path, positional), leaf, value) for (path, leaf), value in zip(paths, values, strict=True)
    )
    held = _bounds(values), _guards(values)
    return CallForm(spec, tuple(positional), defaults, len(args), tuple(kwargs), leaves, *held)


def _leaf(name: str, given: Any, value: Any) -> Sized | Constant:
    if isinstance(given, Tensor):
        return Sized(name, tuple(map(_size, value.shape)), given.dtype)
    return Constant(name, given, isinstance(value, torch.SymInt))


def _size(size: Any) -> Any:
    if not isinstance(size, torch.SymInt):
        return int(size)
    expression = size.node.expr
    return int(expression) if expression.is_number else str(expression) if expression.is_symbol else expression


def _bounds(values: list[Any]) -> dict[str, tuple[int, int | None]]:
    """What symbols may be. A lower bound of 2 is torch's way of telling sizes that are not broadcast: it is none."""
    known = _shape_env(values)
    ranges = {} if known is None else known.var_to_range
    found = {str(symbol): (_number(r.lower) or 0, _number(r.upper)) for symbol, r in ranges.items()}
    return {name: (low if low > 2 else 0, high) for name, (low, high) in found.items() if low > 2 or high is not None}


def _guards(values: list[Any]) -> tuple[Any, ...]:
    known = _shape_env(values)
    return () if known is None else tuple(dict.fromkeys(guard.expr for guard in known.guards))


def _shape_env(values: list[Any]) -> Any:
    """What the symbols among the sizes of ``values`` are known by; ``None`` where all sizes are numbers."""
    sizes: list[Any] = [size for value in values if isinstance(value, Tensor) for size in value.shape]
    return next((size.node.shape_env for size in sizes if isinstance(size, torch.SymInt)), None)


def _value(expression: Any, symbols: Mapping[str, int]) -> int | bool | None:
    """What a number or condition is for these values of symbols; ``None`` where they don't tell."""
    given = {symbol: symbols[str(symbol)] for symbol in expression.free_symbols if str(symbol) in symbols}
    found = expression.subs(given)
    if found in (sympy.true, sympy.false):
        return bool(found)
    return int(found) if found.is_number else None


def _is_cast(value: Tensor, wanted: torch.dtype) -> bool:
    """Whether autocast, around the call, takes floating tensors of either dtype."""
    both = value.dtype.is_floating_point and wanted.is_floating_point
    return both and torch.is_autocast_enabled(value.device.type)


def _number(bound: Any) -> int | None:
    return int(bound) if getattr(bound, "is_Integer", False) else None


def _name(path: tuple[Any, ...], positional: list[str]) -> str:
    """How the user names the argument at ``path`` of ``(args, kwargs)``."""
    kind, first, rest = path[0].idx, path[1], pytree.keystr(path[2:])
    if kind == 1:
        return f"argument {first.key!r}{rest}"
    return f"argument {positional[first.idx]!r}{rest}" if first.idx < len(positional) else f"argument {first.idx}{rest}"


def _is_same(value: Any, expected: Constant) -> bool:
    if isinstance(value, Tensor):
        return False
    if expected.free:
        return isinstance(value, int | torch.SymInt)
    return value is expected.value or (type(value) is type(expected.value) and bool(value == expected.value))
