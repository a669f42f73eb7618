"""Structural entry: `torch.export` of a model, as a `Program` that keeps parameter names."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any, Final

import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind, InputSpec
from torch.utils import _pytree as pytree

from fxopt.errors import CaptureError
from fxopt.frontend.borders import detach_at_borders
from fxopt.frontend.retrace import retrace
from fxopt.ir.held import Held
from fxopt.ir.nodes import REQUIRES_GRAD, is_tensor
from fxopt.ir.program import Program, Signature

#: PyTorch's folder, and fxopt's (this file is fxopt/frontend/export.py).
_NOT_THE_USERS: Final = tuple(
    f"{os.path.dirname(path)}{os.sep}" for path in (torch.__file__, os.path.dirname(__file__))
)
_STANDARD_LIBRARY: Final = os.path.dirname(os.__file__) + os.sep
#: What torch.export says of a result that it can't take apart.
_UNKNOWN_RESULT: Final = "in output, which is not a known type"
_UNCHECKED: Final = "a program that is not compiled by fxopt.optimize reads it at each call"
_REMEDY: Final = (
    "what the model returns must be tensors in tuples, lists and dictionaries, or of a type that is registered with "
    "torch.utils._pytree. A cache of keys and values is left out by use_cache=False (transformers), in the call or in "
    "the model's config. "
)


class _Function(nn.Module):
    """A plain function seen as a module, which is what torch.export takes."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = _named_forward(function)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def _named_forward(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` under the name ``forward``: torch.export records the lines of frames of that name only."""
    if not isinstance(function, FunctionType):
        return function
    code = function.__code__.replace(co_name="forward")
    renamed = FunctionType(code, function.__globals__, "forward", function.__defaults__, function.__closure__)
    renamed.__kwdefaults__ = function.__kwdefaults__
    return renamed


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
        # Of symbolic sizes, making an entry of this cache takes longer than what the entry saves in one graph.
        with torch._dynamo.config.patch(fake_tensor_cache_enabled=not dynamic_shapes):
            exported = torch.export.export(
                module, args, dict(kwargs or {}), dynamic_shapes=dynamic_shapes, strict=False
            )
    except Exception as error:
        name = type(model).__name__ if isinstance(model, nn.Module) else getattr(model, "__name__", "the function")
        remedy = _REMEDY if _UNKNOWN_RESULT in str(error) else ""
        raise CaptureError(f"{name} can't be captured as one graph: {remedy}{_told(error)}") from error
    source = exported.graph_module
    placeholders = source.graph.find_nodes(op="placeholder")
    inputs = [node.meta["val"] for node in placeholders]
    mode = next((v.fake_mode for v in inputs if hasattr(v, "fake_mode")), None)
    traced = retrace(source, inputs, mode)
    signature = _signature(exported, traced.graph)
    _mark_learning(exported, traced.graph, pytree.tree_leaves((args, dict(kwargs or {}))))
    held = _buffers(exported, traced.graph)
    _store_constants(traced, exported)
    program = Program(traced, "export", signature, held=held)
    detach_at_borders(program)
    return program


def _told(error: Exception) -> str:
    """The message of ``error``; behind it the user's line, unless the message has one."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]
    text = str(error).rstrip()
    if not frames or frames[-1].filename in text:
        return text
    where, code = frames[-1], frames[-1].line or ""
    return f"{type(error).__name__}: {text}\n  at {where.filename}:{where.lineno} in {where.name}\n      {code}"


def _is_users(file: str) -> bool:
    installed = "site-packages" in file or "dist-packages" in file
    return not file.startswith(_NOT_THE_USERS) and (installed or not file.startswith(_STANDARD_LIBRARY))


def _signature(exported: torch.export.ExportedProgram, graph: fx.Graph) -> Signature:
    bound: dict[str, str] = {}
    for node, spec in _bound_placeholders(exported, graph):
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            bound[node.name] = str(spec.target)
    spec = exported.call_spec
    assert spec.in_spec is not None and spec.out_spec is not None
    buffers = exported.graph_signature.non_persistent_buffers
    constants = {name: value for name, value in exported.constants.items() if name in buffers}
    return Signature(bound, constants, spec.in_spec, spec.out_spec)


def _buffers(exported: torch.export.ExportedProgram, graph: fx.Graph) -> dict[str, Held]:
    """The buffers among the placeholders. Whoever compiles or exports a rewritten module has no check of them."""
    kept = {**exported.constants, **exported.state_dict}
    named = [(node.name, str(spec.target)) for node, spec in _bound_placeholders(exported, graph)
             if spec.kind is InputKind.BUFFER]  # fmt: skip
    return {name: Held(target, kept[target], _UNCHECKED) for name, target in named}


def _mark_learning(exported: torch.export.ExportedProgram, graph: fx.Graph, examples: list[Any]) -> None:
    """Mark what stands for a tensor that may need a gradient; of inputs the examples tell, of any order of names."""
    learning = any(isinstance(x, torch.Tensor) and x.requires_grad for x in examples)
    for node, spec in _bound_placeholders(exported, graph):
        parameter = exported.state_dict[str(spec.target)] if spec.kind is InputKind.PARAMETER else None
        given = learning and spec.kind is InputKind.USER_INPUT and is_tensor(node)
        node.meta[REQUIRES_GRAD] = parameter.requires_grad if parameter is not None else given


def _store_constants(module: fx.GraphModule, exported: torch.export.ExportedProgram) -> None:
    """Tensors written in the user's code arrive as inputs; they become attributes, which passes may evaluate."""
    for index, (node, spec) in enumerate(_bound_placeholders(exported, module.graph)):
        constant = exported.constants.get(str(spec.target))
        if spec.kind is not InputKind.CONSTANT_TENSOR or not isinstance(constant, torch.Tensor):
            continue
        name = f"_constant{index}"
        module.register_buffer(name, constant, persistent=False)
        with module.graph.inserting_before(node):
            attribute = module.graph.get_attr(name)
        attribute.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(attribute)
        module.graph.erase_node(node)
    module.recompile()


def _bound_placeholders(exported: torch.export.ExportedProgram, graph: fx.Graph) -> list[tuple[fx.Node, InputSpec]]:
    placeholders = graph.find_nodes(op="placeholder")
    return list(zip(placeholders, exported.graph_signature.input_specs, strict=True))
