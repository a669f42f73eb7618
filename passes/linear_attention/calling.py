"""Running captured graphs in the place of a module's forward: which one a call is for, and whether it is such."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxopt.errors import CaptureError
from fxopt.passes.linear_attention.replace import Argument, Calling, Captured

_AGAIN: Final = "prepare the model with example arguments that it is trained with"


@dataclass(frozen=True)
class Graphs:
    """What a module computes in one mode.

    Attributes:
        given: its graph for arguments as in the example call.
        without: its graph, or why there is none, where the tensors at these places are ``None``.
    """

    given: Captured
    without: Mapping[tuple[int, ...], Captured | str] = field(default_factory=dict)


class CapturedCalls(nn.Module):
    """A module's forward in one mode; it holds no state, but runs with that of the module.

    ``title`` names the module in errors.
    """

    def __init__(self, title: str, graphs: Graphs) -> None:
        super().__init__()
        self.title = title
        captured = {(): graphs.given, **graphs.without}
        for places, graph in captured.items():
            if isinstance(graph, Captured):
                self.add_module(_name(places), graph.module)
        self._known = _Known({n: g.calling if isinstance(g, Captured) else g for n, g in captured.items()})

    def run(self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the module's forward gives, with ``owner``'s state.

        Raises:
            CaptureError: the call is none that a graph was captured for.
        """
        known = self._known.callings
        flat, spec = pytree.tree_flatten((args, kwargs))
        expected = known[()].in_spec
        if spec != expected:
            raise CaptureError(
                f"{self.title} was captured for arguments of the structure {expected}, called with {spec}; {_AGAIN}"
            )
        places = self._known.absent(flat)
        calling = known.get(places, _UNKNOWN)
        if isinstance(calling, str):
            raise CaptureError(f"{self.title} is called with None for its {_named(places, spec)}, {calling}")
        operands = _operands(self.title, calling, flat, owner)
        results = self.get_submodule(_name(places))(*operands)
        return pytree.tree_unflatten(list(results), calling.out_spec)


class _Known:
    """The calls that a module has graphs for, by the places of missing masks; copies share it, as it never changes."""

    def __init__(self, callings: Mapping[tuple[int, ...], Any]) -> None:
        self.callings = callings
        self._places = sorted({place for places in callings for place in places})

    def __deepcopy__(self, memo: dict[int, Any]) -> _Known:
        return self

    def absent(self, flat: list[Any]) -> tuple[int, ...]:
        """The places of the masks that a call is without; none where they are read only by what has no graph."""
        places = tuple(place for place in self._places if flat[place] is None)
        found = self.callings.get(places, _UNKNOWN)
        read = any(self.callings[()].arguments[place].read for place in places)
        return places if read or not isinstance(found, str) else ()


_UNKNOWN: Final = f"which it was not captured for together; leave out one or all of its masks, or {_AGAIN}"


def _name(places: tuple[int, ...]) -> str:
    return "_".join(("without", *map(str, places))) if places else "given"


def _operands(title: str, calling: Calling, flat: list[Any], owner: nn.Module) -> list[Any]:
    for place, (value, expected) in enumerate(zip(flat, calling.arguments, strict=True)):
        if not _fits(value, expected):
            raise CaptureError(f"{title}: {_named((place,), calling.in_spec)} {_difference(value, expected)}; {_AGAIN}")
    tensors = [(value, each) for value, each in zip(flat, calling.arguments, strict=True) if each.sizes is not None]
    _check_repeated(title, tensors)
    inputs = iter([value if each.read else None for value, each in tensors])
    return [next(inputs) if name is None else _state(owner, name) for name in calling.bound]


def _fits(value: Any, expected: Argument) -> bool:
    """Whether an argument is such as the graph was captured for."""
    if expected.sizes is None:
        return not isinstance(value, Tensor) and bool(value == expected.constant)
    if not expected.read:
        return True
    if not isinstance(value, Tensor) or len(value.shape) != len(expected.sizes):
        return False
    return all(size in (None, own) for own, size in zip(value.shape, expected.sizes, strict=True))


def _difference(value: Any, expected: Argument) -> str:
    found = f"a tensor of sizes {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
    if expected.sizes is None:
        return f"was captured for {expected.constant!r} and got {found}"
    return f"was captured for a tensor of sizes {list(expected.sizes)} (None: any) and got {found}"


def _named(places: tuple[int, ...], spec: pytree.TreeSpec) -> str:
    """The arguments at ``places`` of the flattened ones, in words."""
    paths = [path for path, _ in pytree.tree_flatten_with_path(spec.unflatten(range(spec.num_leaves)))[0]]
    return " and ".join(_argument(paths[place]) for place in places)


def _argument(path: tuple[Any, ...]) -> str:
    _, first, *inner = path
    name = f"argument {first.key!r}" if isinstance(first, pytree.MappingKey) else f"positional argument {first.idx}"
    return name + (f" at {pytree.keystr(tuple(inner))}" if inner else "")


def _check_repeated(title: str, tensors: list[tuple[Any, Argument]]) -> None:
    """Raise where what was one tensor given twice is now two of different sizes."""
    for value, expected in tensors:
        before = None if expected.again is None else tensors[expected.again][0]
        if isinstance(value, Tensor) and isinstance(before, Tensor) and value.shape != before.shape:
            raise CaptureError(
                f"{title} was captured for one tensor given twice and got {list(before.shape)} and "
                f"{list(value.shape)}; {_AGAIN}"
            )


def _state(owner: nn.Module, path: str) -> Any:
    value: Any = owner
    for part in path.split("."):
        value = getattr(value, part)
    return value
