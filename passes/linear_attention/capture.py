"""The graph of one module, captured alone for any batch, with its attentions as canonical operators."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from fxopt.errors import FxoptError
from fxopt.frontend.export import from_export
from fxopt.ir.operators import overload
from fxopt.ir.program import Program
from fxopt.passes.attention.fuse_attention import FuseAttention
from fxopt.passes.attention.fuse_sdpa import FuseSdpa
from fxopt.passes.canonical.contractions import Contractions
from fxopt.passes.canonical.fold_constants import FoldConstants
from fxopt.passes.canonical.inactive_dropout import InactiveDropout
from fxopt.passes.canonical.no_ops import NoOps
from fxopt.passes.canonical.repeat_heads import RepeatHeads
from fxopt.passes.canonical.softmax import Softmax
from fxopt.rewriter.pipeline import run_pipeline
from fxopt.rewriter.progressive import Call

#: What brings every spelling of attention to its canonical operator.
_CANONICAL = (
    NoOps(), InactiveDropout(), FoldConstants(), Contractions(), Softmax(), RepeatHeads(), FuseSdpa(), FuseAttention(),
)  # fmt: skip


def canonical(program: Program) -> Program:
    """``program`` with its attentions as canonical operators."""
    return run_pipeline(program, _CANONICAL).program


def attentions(program: Program) -> list[Node]:
    """The canonical attentions of ``program``, in order."""
    return program.graph.find_nodes(op="call_function", target=overload("attention"))


def isolated(module: nn.Module, call: Call, *, training: bool, lengths: bool) -> Program | str:
    """The program of ``module`` called as in ``call``, for any first size of its inputs; or why there is none.

    With ``lengths`` the second sizes may be any, too. Where a first size of 1 can be another, it may be.
    """
    modes = {inner: inner.training for inner in module.modules()}
    module.train(training)
    try:
        failure = ""
        for fewest in (2, 1):
            args, kwargs = (
                pytree.tree_map(lambda x, n=fewest: _stand_in(x, n), given) for given in (call.args, dict(call.kwargs))
            )
            try:
                return from_export(module, args, kwargs, _any_size(module, args, kwargs, 2 if lengths else 1))
            except FxoptError as error:
                failure = failure or str(error).splitlines()[0]
        return f"it can't be captured alone: {failure}"
    finally:
        for inner, mode in modes.items():
            inner.training = mode


def _stand_in(value: Any, fewest: int) -> Any:
    """A real tensor for a fake one, whose first size is ``fewest`` at least."""
    if not isinstance(value, Tensor):
        return value
    sizes = [int(size) for size in value.shape]
    sizes = [max(sizes[0], fewest), *sizes[1:]] if sizes else sizes
    return torch.zeros(sizes, dtype=value.dtype, device=value.device)


def _any_size(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], axes: int) -> dict[str, Any]:
    """The first ``axes`` sizes of every tensor as ones that may change, as torch.export takes it."""
    auto = torch.export.Dim.AUTO

    def free(value: Any) -> Any:
        return dict.fromkeys(range(min(axes, value.dim() - 1)), auto) if isinstance(value, Tensor) else None

    named = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    return {name: pytree.tree_map(free, value) for name, value in named.items()}
