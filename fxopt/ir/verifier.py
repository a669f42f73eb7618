"""The verifier: what holds of every program, checked after every pass that changed something."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fxopt.errors import VerificationError
from fxopt.ir.fake import call_fake, is_computed
from fxopt.ir.nodes import has_effect, is_impure
from fxopt.ir.program import Program


def verify_structure(program: Program, before: Program | None = None) -> None:
    """Check the graph and its metadata.

    The graph must be well formed, and the value of every node, recomputed on fake tensors, must have its recorded
    shape,
    dtype and device. With ``before``, the program this one was made from, nodes that did not change are trusted, and
    inputs, types of outputs and effects must be what they were.

    Raises:
        VerificationError: names the node and what differs.
    """
    try:
        program.graph.lint()
    except RuntimeError as error:
        raise VerificationError(f"the graph is not well formed: {error}") from error
    trusted = {} if before is None else {node.name: node for node in before.graph.nodes}
    _propagate(program, trusted)
    if before is not None and _interface(program) != _interface(before):
        raise VerificationError(
            f"the program's interface changed: {_interface(program)} instead of {_interface(before)}"
        )


def _interface(program: Program) -> tuple[Any, ...]:
    """Inputs by name, types of the outputs, and the effects in order: what no pass may change."""
    inputs = tuple(node.name for node in program.graph.find_nodes(op="placeholder"))
    outputs = fx.node.map_arg(program.graph.output_node().args[0], lambda node: _describe(node.meta.get("val")))
    effects = tuple(str(n.target) for n in program.graph.nodes if n.op == "call_function" and has_effect(n))
    return inputs, str(outputs), effects


def _propagate(program: Program, trusted: dict[str, fx.Node]) -> None:
    changed: dict[fx.Node, Any] = {}
    mode = program.fake_mode
    for node in program.graph.nodes:
        if node.op == "get_attr" and "val" not in node.meta:
            node.meta["val"] = _attribute(program, node)
        if node.op != "call_function" or is_impure(node):
            continue
        known = is_computed(node) or _unchanged(node, trusted)
        if known and not any(operand in changed for operand in node.all_input_nodes):
            continue
        value = _recompute(node, changed, mode)
        if not _same(node.meta.get("val"), value):
            found, recorded = _describe(value), _describe(node.meta.get("val"))
            raise VerificationError(f"{node.name} computes {found} where {recorded} is recorded")
        if _strides(value) != _strides(node.meta.get("val")):
            changed[node] = value


def _unchanged(node: fx.Node, trusted: dict[str, fx.Node]) -> bool:
    old = trusted.get(node.name)
    if old is None or old.target is not node.target:
        return False
    return _same_arguments(old.args, node.args) and _same_arguments(old.kwargs, node.kwargs)


def _same_arguments(old: Any, new: Any) -> bool:
    """Whether arguments of nodes are the same constants, and nodes of the same names."""
    if isinstance(old, fx.Node):
        return isinstance(new, fx.Node) and old.name == new.name
    if isinstance(old, tuple | list):
        same = isinstance(new, tuple | list) and len(old) == len(new)
        return same and all(_same_arguments(a, b) for a, b in zip(old, new, strict=True))
    if isinstance(old, dict):
        return isinstance(new, dict) and list(old) == list(new) and all(_same_arguments(old[k], new[k]) for k in old)
    if isinstance(old, slice):
        parts = ((getattr(x, name) for name in ("start", "stop", "step")) for x in (old, new))
        return isinstance(new, slice) and _same_arguments(*map(tuple, parts))
    return old is new or (type(old) is type(new) and repr(old) == repr(new))


def _recompute(node: fx.Node, changed: dict[fx.Node, Any], mode: FakeTensorMode | None) -> Any:
    assert callable(node.target)
    try:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: changed.get(n, n.meta.get("val")))
        return call_fake(node.target, args, kwargs, mode)
    except Exception as error:
        raise VerificationError(f"{node.name} can't run on its operands: {error}") from error


def _attribute(program: Program, node: fx.Node) -> Any:
    value: Any = program.module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    mode = program.fake_mode
    return mode.from_tensor(value, static_shapes=True) if mode and isinstance(value, torch.Tensor) else value


def _strides(value: Any) -> Any:
    return value.stride() if isinstance(value, torch.Tensor) else None


def _same(recorded: Any, found: Any) -> bool:
    if not isinstance(recorded, torch.Tensor) or not isinstance(found, torch.Tensor):
        return isinstance(recorded, torch.Tensor) == isinstance(found, torch.Tensor)
    if (recorded.dtype, recorded.device, recorded.dim()) != (found.dtype, found.device, found.dim()):
        return False
    return all(statically_known_true(a == b) for a, b in zip(recorded.shape, found.shape, strict=True))


def _describe(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    sizes = "x".join(map(str, value.shape))
    return f"{str(value.dtype).removeprefix('torch.')}[{sizes}]@{value.device}"
