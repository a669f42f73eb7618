"""Reading graph nodes: values, shapes, arguments by schema name, and the user's source line."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import cache
from typing import Any, Final

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fxopt.ir.site import Source

Size = int | torch.SymInt
#: Key of the metadata that the frontend sets on placeholders standing for tensors with ``requires_grad``.
REQUIRES_GRAD: Final = "fxopt_requires_grad"
#: Key of the metadata of a node that is a folded weight: computed from weights alone, so once and not at every call.
FOLDED: Final = "fxopt_folded"

_IMPURE: Final[dict[tuple[torch._ops.OpOverload, bool], bool]] = {}
_TORCH = os.path.dirname(torch.__file__) + os.sep
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in [^\n]+\n\s*(?P<code>[^\n]*)')


def is_call(node: object, *targets: object) -> bool:
    """Whether ``node`` is a call of one of ``targets``."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def tensor(node: object) -> torch.Tensor:
    """The fake tensor that ``node`` computes; raises `TypeError` when it computes something else."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{node} does not compute a single tensor")
    return value


def is_tensor(node: object) -> bool:
    """Whether ``node`` is a graph node that computes one tensor."""
    return isinstance(node, Node) and isinstance(node.meta.get("val"), torch.Tensor)


def shape(node: object) -> tuple[Size, ...]:
    """The (possibly symbolic) shape of the tensor that ``node`` computes."""
    return tuple(tensor(node).shape)


def same_size(a: Size, b: Size) -> bool:
    """Whether two sizes are provably equal; never adds a guard."""
    return bool(statically_known_true(a == b))


def may_be_same_size(a: Size, b: Size) -> bool:
    """Whether two sizes are not provably different; never adds a guard."""
    return not statically_known_true(a != b)


def same_shape(a: tuple[Size, ...], b: tuple[Size, ...]) -> bool:
    """Whether two shapes have the same rank and provably equal sizes."""
    return len(a) == len(b) and all(same_size(x, y) for x, y in zip(a, b, strict=True))


def arguments(node: Node) -> Mapping[str, Any]:
    """Arguments of an operator call by schema name, defaults filled in."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return dict(node.kwargs)
    names, defaults = parameters(node.target)
    return {**defaults, **dict(zip(names, node.args, strict=False)), **node.kwargs}


@cache
def parameters(operator: torch._ops.OpOverload) -> tuple[tuple[str, ...], Mapping[str, Any]]:
    """The parameters of an operator by name, in order, and the defaults of those that have one."""
    schema = operator._schema.arguments
    return tuple(a.name for a in schema), {a.name: a.default_value for a in schema if a.has_default_value()}


def scalar(value: object) -> bool | int | float | None:
    """``value`` as a Python number, or ``None``. A symbolic float is specialised: its guard is recorded by the
    tracer.
    """
    if isinstance(value, Node):
        value = value.meta.get("val")
    if isinstance(value, torch.SymFloat):
        return float(value)
    if isinstance(value, torch.SymInt | torch.SymBool):
        return value.node.maybe_as_int() if isinstance(value, torch.SymInt) else None
    return value if isinstance(value, bool | int | float) else None


def source(node: Node) -> Source:
    """The innermost user frame that created ``node``, and its owning module."""
    frames = list(_FRAME.finditer(node.meta.get("stack_trace") or ""))
    frames = [f for f in frames if not f["file"].startswith(_TORCH)] or frames
    stack = node.meta.get("nn_module_stack") or {}
    owner = list(stack.values())[-1][0] if stack else ""
    owner = readable_path(owner if isinstance(owner, str) else "")
    if not frames:
        return Source(module=owner)
    last = frames[-1]
    return Source(f"{last['file']}:{last['line']}", last["code"].strip(), owner)


def readable_path(path: str) -> str:
    """``L['self']._modules['layer']._modules['0'].attn`` and its kin as ``layer.0.attn``, whatever ``self`` is
    called.
    """
    path = re.sub(r"^L\['[^']*'\]", "", path)
    path = re.sub(
        r"\._(?:modules|buffers)\['([^']*)'\]|\['([^']*)'\]|\[(\d+)\]",
        lambda m: "." + next(g for g in m.groups() if g),
        path,
    )
    return ".".join(part for part in path.split(".") if part)


def has_effect(node: Node) -> bool:
    """Whether ``node`` does more than compute its value: mutation, mode switches, run-time assertions.

    Random draws are not counted (a rule decides what may become of them), nor assertions on metadata, which the graph
    proves itself.
    """
    return is_impure(node, random=False) and node.target is not torch.ops.aten._assert_tensor_metadata.default


def is_impure(node: Node, *, random: bool = True) -> bool:
    """`Node.is_impure`, which of an operator's call depends on the operator alone; ``random``: draws count."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return node.is_impure(random)
    key = node.target, random
    if key not in _IMPURE:
        _IMPURE[key] = node.is_impure(random)
    return _IMPURE[key]
