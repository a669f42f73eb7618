"""JIT entry: the graph that TorchDynamo hands to a backend, as a `Program`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import fx
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fxopt.frontend.borders import detach_at_borders
from fxopt.frontend.buffers import buffers_of
from fxopt.frontend.retrace import retrace
from fxopt.ir.nodes import REQUIRES_GRAD
from fxopt.ir.program import Program

#: What later stages (AOTAutograd, CUDA graphs) read from a placeholder of a Dynamo graph.
_CARRIED_META = ("tensor_dict", "_dynamo_static_input_type", "steal_arg", "example_value", "source")


def from_dynamo(module: fx.GraphModule, inputs: Sequence[Any]) -> Program:
    """Retrace Dynamo's graph. Parameters arrive as inputs; symbolic shapes and their guards are Dynamo's own.

    Raises:
        CaptureError: see `fxopt.frontend.retrace.retrace`; anything else that tracing raises passes through.
    """
    context = TracingContext.try_get()
    mode = context.fake_mode if context is not None and context.fake_mode is not None else FakeTensorMode()
    fakes = [_fake(x, mode, context) for x in inputs]
    traced = retrace(module, fakes, mode)
    traced.meta.update(module.meta)
    _carry_placeholders(module.graph, traced.graph)
    for node, value in zip(traced.graph.find_nodes(op="placeholder"), inputs, strict=True):
        node.meta[REQUIRES_GRAD] = torch.is_grad_enabled() and isinstance(value, torch.Tensor) and value.requires_grad
    program = Program(traced, "dynamo", held=buffers_of(module, traced.graph, inputs))
    detach_at_borders(program)
    return program


def hand_over(program: fx.GraphModule, captured: fx.GraphModule) -> None:
    """Mark ``program``, which replaces Dynamo's graph ``captured``, as one of Dynamo's, as AOTAutograd reads it.

    It then knows which inputs are parameters and stay where they are: CUDA graphs would copy them at every call, and
    other code would look at their addresses.
    """
    from torch._dynamo.source import ConstantSource

    if not hasattr(captured, "_param_name_to_source"):
        return
    # Both hold more than their classes declare.
    old, new = cast(Any, captured), cast(Any, program)
    own = (name for name, _ in (*program.named_parameters(), *program.named_buffers()))
    new._param_name_to_source = {**old._param_name_to_source, **{n: ConstantSource(f"fxopt_{n}") for n in own}}
    placeholders = captured.graph.find_nodes(op="placeholder"), program.graph.find_nodes(op="placeholder")
    for before, after in zip(*placeholders, strict=True):
        after._dynamo_source = getattr(before, "_dynamo_source", None)


def _fake(value: Any, mode: FakeTensorMode, context: TracingContext | None) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if isinstance(value, FakeTensor):
        return value
    symbolic = context.tensor_to_context.get(value) if context is not None else None
    if symbolic is None:
        return mode.from_tensor(value, static_shapes=True)
    return mode.from_tensor(value, static_shapes=False, symbolic_context=symbolic, source=symbolic.tensor_source)


def _carry_placeholders(old: fx.Graph, new: fx.Graph) -> None:
    for before, after in zip(old.find_nodes(op="placeholder"), new.find_nodes(op="placeholder"), strict=True):
        after.meta.update({key: before.meta[key] for key in _CARRIED_META if key in before.meta})
