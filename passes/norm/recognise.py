"""Modules that compute a LayerNorm or an RMSNorm over the last axis, recognised by what they compute."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxopt.errors import FxoptError
from fxopt.frontend.export import from_export
from fxopt.ir.nodes import arguments, is_call, source, tensor
from fxopt.ir.operators import overload
from fxopt.ir.program import Program
from fxopt.passes.canonical.fold_constants import FoldConstants
from fxopt.passes.canonical.layer_norm import LayerNorm
from fxopt.passes.canonical.no_ops import NoOps
from fxopt.passes.canonical.rms_norm import RmsNorm
from fxopt.passes.canonical.synonyms import Synonyms
from fxopt.rewriter.pipeline import run_pipeline
from fxopt.rewriter.progressive import Call

aten = torch.ops.aten

_CANONICAL: Final = (Synonyms(), NoOps(), FoldConstants(), LayerNorm(), RmsNorm())
_LAYER_NORMS: Final = (aten.layer_norm.default, overload("layer_norm"))
_RMS_NORM: Final = overload("rms_norm")
_HOOKS: Final = ("forward", "forward_pre", "backward", "backward_pre")


@dataclass(frozen=True)
class NormModule:
    """What a module computes: ``normal(x) * (weight + offset) + bias`` over its last axis, ``normal`` with ``eps``.

    Attributes:
        kind: LayerNorm subtracts the mean and divides by the deviation, RMSNorm divides by the root mean square.
        channels: the size of the last axis.
        weight: the name of the module's parameter, ``None`` for 1.
        offset: what the module adds to its weight first (Gemma: 1).
        bias: the name of the module's parameter, ``None`` for 0.
        eps: added inside the root.
        promotes: whether the result has the dtype that ``x`` and weight promote to, not that of ``x``.
        where: the line that computes it.
    """

    kind: Literal["LayerNorm", "RMSNorm"]
    channels: int
    weight: str | None
    offset: float
    bias: str | None
    eps: float
    promotes: bool
    where: str = ""


def may_be_norm(module: nn.Module, calls: tuple[Call, ...]) -> bool:
    """Whether tracing ``module`` is worth it: it has no modules inside and reads floating tensors."""
    if not calls or any(True for _ in module.children()):
        return False
    return all(isinstance(arg, Tensor) and arg.is_floating_point() for arg in calls[0].args)


def recognise(module: nn.Module, calls: tuple[Call, ...]) -> NormModule | str | None:
    """What ``module`` computes; why it is not what we can exchange; ``None`` where it holds no norm at all."""
    program = _isolated(module, calls[0])
    norms = [node for node in program.graph.nodes if is_call(node, *_LAYER_NORMS, _RMS_NORM)] if program else []
    if program is None or not norms:
        return None
    return _objection(module, calls) or _read(module, program, norms[0])


def _isolated(module: nn.Module, call: Call) -> Program | None:
    """The module on its own, canonical; ``None`` where it can't be captured. Leading sizes don't matter to a norm over
    the last axis whose parameters have one axis, so those are small at first.
    """
    one_axis = all(parameter.dim() <= 1 for parameter in module.parameters())
    for small in dict.fromkeys((one_axis, False)):
        inputs = tuple(torch.zeros(_sizes(x, small), dtype=x.dtype, device=x.device) for x in call.args)
        with suppress(FxoptError):
            return run_pipeline(from_export(module, inputs), _CANONICAL, strict=True).program
    return None


def _sizes(x: Tensor, small: bool) -> list[int]:
    sizes = [int(size) for size in x.shape]
    return [*[3] * (len(sizes) - 1), *sizes[-1:]] if small else sizes


def _objection(module: nn.Module, calls: tuple[Call, ...]) -> str:
    if len(calls) > 1:
        return (
            f"it is called {len(calls)} times in one forward, and inputs of several places don't have the same "
            "statistics; give each place a norm of its own"
        )
    if len(calls[0].args) != 1 or calls[0].kwargs:
        return "it is called with more than one positional argument"
    if any(getattr(module, f"_{kind}_hooks") for kind in _HOOKS):
        return "it has hooks, which would be lost"
    return ""


def _read(module: nn.Module, program: Program, node: Node) -> NormModule | str:
    given = arguments(node)
    bound = program.signature.bound if program.signature is not None else {}
    result = program.graph.output_node().args[0]
    x = given.get("x", given.get("input"))
    if not (isinstance(result, tuple | list) and tuple(result) == (node,)) or not _is_input(x, bound):
        return "its forward does more than normalise its input"
    axes = given["axes"] if "axes" in given else len(given["normalized_shape"])
    if axes != 1:
        return f"it normalises over {axes} axes together; statistics of channels are over one"
    weight = _weight(given["weight"], bound)
    bias = _weight(given.get("bias"), bound)
    if weight is None or bias is None or bias[1]:
        return "its weight or bias is computed from its parameters in a way that is not known"
    held = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    if held - {weight[0], bias[0]}:
        return f"it holds {', '.join(sorted(held - {weight[0], bias[0]}))}, which its norm does not read"
    kind: Literal["LayerNorm", "RMSNorm"] = "RMSNorm" if node.target is _RMS_NORM else "LayerNorm"
    promotes = bool(given.get("scale_after_cast", False))
    channels = int(tensor(node).shape[-1])
    return NormModule(kind, channels, weight[0], weight[1], bias[0], given["eps"], promotes, source(node).location)


def _is_input(node: Any, bound: dict[str, str]) -> bool:
    return isinstance(node, Node) and node.op == "placeholder" and node.name not in bound


def _weight(node: Any, bound: dict[str, str]) -> tuple[str | None, float] | None:
    """The parameter that ``node`` is, and what is added to it; ``None`` where it is anything else."""
    if node is None:
        return None, 0.0
    offset = 0.0
    if is_call(node, aten.add.Tensor):
        left, right = node.args
        node, number = (right, left) if isinstance(right, Node) else (left, right)
        if not isinstance(number, int | float) or node.kwargs:
            return None
        offset = float(number)
    while is_call(node, aten.to.dtype):
        node = node.args[0]
    if not isinstance(node, Node) or node.name not in bound:
        return None
    return bound[node.name], offset
