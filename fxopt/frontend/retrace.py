"""One dialect out of both entries: any FX graph, retraced to pre-dispatch functional ATen on fake inputs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode, disable_functional_mode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta
from torch.utils import _pytree as pytree

from fxopt.errors import CaptureError
from fxopt.frontend.out_of_place import out_of_place
from fxopt.frontend.repeated import RepeatedCalls
from fxopt.frontend.switches import Switching

_BACKWARD = (torch.autograd.grad, torch.autograd.backward)
_OPAQUE = frozenset({"tag_activation_checkpoint", "wrap_activation_checkpoint"})
# What functional transforms begin with, where TorchDynamo writes them; what torch.export leaves of them. Which of their
# nodes a trace loses, and which it keeps without their meaning, is another matter in every release of PyTorch.
_TRANSFORMS = frozenset(f"_{kind}_increment_nesting" for kind in ("vmap", "grad", "jvp", "func")) | {
    "_add_batch_dim",
    "_unwrap_for_grad",
}
_TRANSFORMED = "the graph holds a functional transform (vmap, grad, …), whose results a retrace loses"
_CONSTANTS = frozenset({torch.ops.aten.lift_fresh_copy.default, torch.ops.aten.lift_fresh.default})
_IN_PLACE = frozenset({"setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "iand", "ior", "ixor", "ipow"})


def retrace(module: fx.GraphModule, inputs: Sequence[Any], fake_mode: FakeTensorMode | None) -> fx.GraphModule:
    """Trace ``module`` on fake ``inputs`` into the dialect.

    In-place operations are functionalised; edits of an input become ``copy_`` at the end of the graph. The user's line
    and owning module of each node are carried over.

    Raises:
        CaptureError: the graph holds something that can't be retraced without changing its meaning.
    """
    _reject_opaque(module)
    module = out_of_place(module)

    def interpret(*args: Any) -> Any:
        with preserve_node_meta():
            return Switching(module).run(*args)

    def repeat(*args: Any) -> Any:
        with preserve_node_meta():
            return RepeatedCalls(module).run(*args)

    edits = any(_edits(node) for node in module.graph.nodes)
    traced = None if edits else _trace(repeat, inputs, fake_mode)
    if traced is not None:
        _undetach_constants(traced.graph)
    if traced is None or any(_mutates(node) for node in traced.graph.nodes):
        _reject_detached(module)
        traced = _trace(_functionalised(interpret), inputs, fake_mode)
        _reshape_views(traced.graph)
    _reshape_attention(traced.graph)
    traced.graph.eliminate_dead_code()
    _reject_lost(traced)
    type(traced).__name__ = "Program"  # as printed; the class is this graph's own
    traced.recompile()
    return traced


def _trace(function: Callable[..., Any], inputs: Sequence[Any], fake_mode: FakeTensorMode | None) -> fx.GraphModule:
    with fake_mode or nullcontext(), enable_python_dispatcher():
        return make_fx(function, pre_dispatch=True, _allow_non_fake_inputs=True)(*inputs)


def _edits(node: fx.Node) -> bool:
    """Whether a node of an untraced graph writes into a tensor, as far as its name tells; that saves a trace."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.op == "call_method":
        return name.endswith("_") and not name.endswith("__")
    return node.op == "call_function" and (name in _IN_PLACE or "out" in node.kwargs)


def _undetach_constants(graph: fx.Graph) -> None:
    """``torch.tensor`` detaches, in place, the new constant that it is traced as; that has no gradient, and needs no
    trace of every call to be made functional.
    """
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.detach_.default):
        if node.args[0].target in _CONSTANTS:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _mutates(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _functionalised(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` without in-place operations, except a final ``copy_`` into every input that it edited."""

    def run(*inputs: Any) -> Any:
        mode = FunctionalTensorMode(pre_dispatch=True, export=True)
        with disable_functional_mode(), mode, warnings.catch_warnings():
            # Canonical operators are what it describes, and are functional.
            warnings.filterwarnings("ignore", "At pre-dispatch tracing, we assume that any custom op", UserWarning)
            wrapped = pytree.tree_map_only(torch.Tensor, FunctionalTensor.to_functional, inputs)
            outputs = function(*wrapped)
            edits = [(old, _edited(new)) for old, new in zip(inputs, wrapped, strict=True)]
            outputs = pytree.tree_map_only(FunctionalTensor, _plain, outputs)
        for old, new in edits:
            if new is not None:
                torch.ops.aten.copy_.default(old, new)
        return outputs

    return run


def _plain(value: FunctionalTensor) -> torch.Tensor:
    torch._sync(value)  # type: ignore[attr-defined,no-untyped-call]
    return torch._from_functional_tensor(value.elem)


def _edited(value: object) -> torch.Tensor | None:
    if not isinstance(value, FunctionalTensor):
        return None
    torch._sync(value)  # type: ignore[attr-defined,no-untyped-call]
    if torch._functionalize_has_metadata_mutation(value.elem):
        raise CaptureError("the model changes the shape or storage of one of its inputs in place; use a new tensor")
    if not torch._functionalize_has_data_mutation(value.elem):  # type: ignore[attr-defined]
        return None
    return _plain(value)


def _reshape_views(graph: fx.Graph) -> None:
    """Made functional, a ``reshape`` is the ``view`` that fits the strides of fake tensors. Operators may give others
    when they run: batch norm in training does.
    """
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        node.target = torch.ops.aten.reshape.default


def _reshape_attention(graph: fx.Graph) -> None:
    """Strides of attention's result are those of the kernel that computes it. ``nn.MultiheadAttention`` of PyTorch 2.11
    makes it contiguous before it views it, which leaves no trace where the fake result is so already.
    """
    aten = torch.ops.aten
    for node in graph.find_nodes(op="call_function", target=aten.view.default):
        source = node.args[0]
        while source.target in (aten.transpose.int, aten.permute.default):
            source = source.args[0]
        if source.target is aten.scaled_dot_product_attention.default:
            node.target = aten.reshape.default


def _reject_detached(module: fx.GraphModule) -> None:
    """Without gradients, an edit leaves those of the tensor that it edits; a new tensor in its place has none."""
    recorded = True
    for node in module.graph.nodes:
        if node.target is torch._C._set_grad_enabled:
            recorded = bool(node.args[0])
        if recorded or not _edits(node) or not node.all_input_nodes:
            continue
        edited = node.all_input_nodes[0].meta.get("example_value")
        if isinstance(edited, torch.Tensor) and edited.requires_grad:
            raise CaptureError("the graph edits in place, inside no_grad, a tensor whose gradient is recorded")


def _reject_opaque(module: fx.GraphModule) -> None:
    for node in (node for part in module.modules() if isinstance(part, fx.GraphModule) for node in part.graph.nodes):
        name = getattr(node.target, "__name__", "")
        if node.op == "call_function" and name in _OPAQUE:
            raise CaptureError(f"the graph holds {name}, whose recomputation marks a retrace would lose")
        if node.op == "call_function" and name in _TRANSFORMS:
            raise CaptureError(_TRANSFORMED)
        if node.target in _BACKWARD or (node.op == "call_method" and node.target == "backward"):
            raise CaptureError("the graph computes gradients inside, which depend on how its tensors came about")


def _reject_lost(traced: fx.GraphModule) -> None:
    """What a functional transform computes may hide from the trace: it becomes a constant without value."""
    for node in traced.graph.find_nodes(op="get_attr"):
        value = getattr(traced, str(node.target), None)
        if isinstance(value, FakeTensor) or (isinstance(value, torch.Tensor) and is_functorch_wrapped_tensor(value)):
            raise CaptureError(_TRANSFORMED)
