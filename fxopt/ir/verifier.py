"""The verifier: what holds of every program, checked after every pass that changed something."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fxopt.errors import VerificationError
from fxopt.ir.program import Program


def verify_structure(program: Program, interface: tuple[Any, ...] | None = None) -> None:
    """Check the graph and recompute all metadata.

    The graph must be well formed, every node's value recomputed on fake tensors must equal its recorded shape, dtype and
    device, and (with ``interface`` from `interface_of` before the pass) inputs, outputs and effects must be what they were.

    Raises:
        VerificationError: names the node and what differs.
    """
    try:
        program.graph.lint()
    except RuntimeError as error:
        raise VerificationError(f"the graph is not well formed: {error}") from error
    with program.fake_mode or torch.no_grad(), enable_python_dispatcher():
        _propagate(program)
    if interface is not None and interface_of(program) != interface:
        raise VerificationError(f"the program's interface changed: {interface_of(program)} instead of {interface}")


def interface_of(program: Program) -> tuple[Any, ...]:
    """Inputs by name, types of the outputs, and the effects in order: what no pass may change."""
    inputs = tuple(node.name for node in program.graph.find_nodes(op="placeholder"))
    outputs = fx.node.map_arg(program.graph.output_node().args[0], lambda node: _describe(node.meta.get("val")))
    effects = tuple(str(n.target) for n in program.graph.nodes if n.op == "call_function" and n.is_impure())
    return inputs, str(outputs), effects


def _propagate(program: Program) -> None:
    values: dict[fx.Node, Any] = {}
    for node in program.graph.nodes:
        if node.op != "call_function":
            values[node] = _leaf(program, node)
            continue
        try:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs) if not node.is_impure() else node.meta.get("val")
        except Exception as error:
            raise VerificationError(f"{node.name} can't run on its operands: {error}") from error
        if not _same(node.meta.get("val"), values[node]):
            found, recorded = _describe(values[node]), _describe(node.meta.get("val"))
            raise VerificationError(f"{node.name} computes {found} where {recorded} is recorded")


def _leaf(program: Program, node: fx.Node) -> Any:
    if node.op != "get_attr" or "val" in node.meta:
        return node.meta.get("val")
    value: Any = program.module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    mode = program.fake_mode
    return mode.from_tensor(value, static_shapes=True) if mode and isinstance(value, torch.Tensor) else value


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
