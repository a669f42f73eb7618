"""Structural entry: `torch.export` of a model, as a `Program` that keeps parameter names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind

from fxopt.errors import CaptureError
from fxopt.frontend.retrace import retrace
from fxopt.ir.program import Program, Signature


class _Function(nn.Module):
    """A plain function seen as a module, which is what torch.export takes."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def from_export(
    model: nn.Module | Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> Program:
    """Capture one whole graph of ``model``; the model itself is left as it is.

    Raises:
        CaptureError: the model can't be exported as one graph; the message carries torch.export's own.
    """
    module = model if isinstance(model, nn.Module) else _Function(model)
    try:
        exported = torch.export.export(module, args, dict(kwargs or {}), dynamic_shapes=dynamic_shapes, strict=False)
    except Exception as error:
        name = type(model).__name__ if isinstance(model, nn.Module) else getattr(model, "__name__", "the function")
        raise CaptureError(f"{name} can't be captured as one graph: {error}") from error
    source = exported.graph_module
    placeholders = source.graph.find_nodes(op="placeholder")
    inputs = [node.meta["val"] for node in placeholders]
    mode = next((v.fake_mode for v in inputs if hasattr(v, "fake_mode")), None)
    traced = retrace(source, inputs, mode)
    return Program(traced, "export", _signature(exported, traced.graph))


def _signature(exported: torch.export.ExportedProgram, graph: fx.Graph) -> Signature:
    bound: dict[str, str] = {}
    constants: dict[str, torch.Tensor] = {}
    placeholders = graph.find_nodes(op="placeholder")
    for node, spec in zip(placeholders, exported.graph_signature.input_specs, strict=True):
        if spec.kind is InputKind.USER_INPUT or spec.target is None:
            continue
        bound[node.name] = spec.target
        constant = exported.constants.get(spec.target)
        if spec.kind is not InputKind.PARAMETER and isinstance(constant, torch.Tensor):
            constants[spec.target] = constant
    spec = exported.call_spec
    assert spec.in_spec is not None and spec.out_spec is not None
    return Signature(bound, constants, spec.in_spec, spec.out_spec)
