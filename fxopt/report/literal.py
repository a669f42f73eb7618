"""Python expressions for what stands in a graph: constants, targets, shapes."""

from __future__ import annotations

import math
import operator  # noqa: F401 - looked up among the loaded modules
import sys
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch.fx import Node

from fxopt.report.names import is_identifier

_PLAIN: Final = (bool, int, complex, type(None), type(Ellipsis), torch.dtype, torch.layout, torch.memory_format)


class Unavailable(Exception):
    """Something that cannot stand in a file: an object without a name or a literal."""


def literal(value: Any, names: Mapping[Node, str] | None = None) -> str:
    """``value`` as a Python expression; nodes by their ``names``, symbolic numbers by their hints.

    Raises:
        Unavailable: there is no such expression.
    """
    if isinstance(value, Node):
        return _named(value, names or {})
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return repr(hint(value))
    if isinstance(value, float):
        return _float(value)
    if isinstance(value, str):
        return ascii(value)
    if isinstance(value, slice | Mapping | list | tuple):
        return _collection(value, names)
    return _single(value)


def _single(value: Any) -> str:
    if isinstance(value, torch.device):
        return f"torch.device({str(value)!a})"
    return repr(value) if isinstance(value, _PLAIN) else target(value)


def _named(node: Node, names: Mapping[Node, str]) -> str:
    if node not in names:
        raise Unavailable(f"the value {node.name} has no name here")
    return names[node]


def _float(value: float) -> str:
    if math.isnan(value):
        return "math.nan"
    if math.isinf(value):
        return "math.inf" if value > 0 else "-math.inf"
    return repr(value)


def _collection(value: Any, names: Mapping[Node, str] | None) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{literal(k, names)}: {literal(v, names)}" for k, v in value.items()) + "}"
    if isinstance(value, slice):
        return f"slice({', '.join(literal(part, names) for part in (value.start, value.stop, value.step))})"
    items = [literal(item, names) for item in value]
    if isinstance(value, list):
        return f"[{', '.join(items)}]"
    return f"({items[0]},)" if len(items) == 1 else f"({', '.join(items)})"


def target(value: Any) -> str:
    """The expression that names an operator or function: ``torch.ops.aten.linear.default``, ``operator.mul``.

    Raises:
        Unavailable: it cannot be reached by a name.
    """
    if isinstance(value, torch._ops.OpOverload):
        space, _, name = value._schema.name.partition("::")
        return _dotted("torch.ops", space, name, value._overloadname)
    if isinstance(value, torch._ops.HigherOrderOperator):
        return _dotted("torch.ops.higher_order", value.name())
    return _function(value)


def _function(value: Any) -> str:
    name = str(getattr(value, "__name__", ""))
    for module in ("operator", "math", "torch", str(getattr(value, "__module__", ""))):
        if is_identifier(name) and _is_importable(module) and getattr(sys.modules.get(module), name, None) is value:
            return f"{module}.{name}"
    raise Unavailable(f"{type(value).__name__} {name or value!r} has no name that a file can import")


def _is_importable(module: str) -> bool:
    """Whether a listing has ``module`` after ``import math, operator, torch``."""
    return module in ("operator", "math") or module.partition(".")[0] == "torch"


def _dotted(base: str, *parts: str) -> str:
    """``base.part.part``, by ``getattr`` where a part is a keyword or would be mangled inside a class."""
    for part in parts:
        mangled = part.startswith("__") and not part.endswith("__")
        base = f"{base}.{part}" if is_identifier(part) and not mangled else f"getattr({base}, {part!a})"
    return base


def hint(value: Any) -> int | float | bool:
    """A number for a size: itself, or for a symbolic one the value it had when the graph was captured (else 2)."""
    if not isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return value  # type: ignore[no-any-return]  # sizes of tensors are numbers
    known = getattr(value.node, "hint", None)
    return known if isinstance(known, bool | int | float) else 2
