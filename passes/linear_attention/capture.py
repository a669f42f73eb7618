"""The graph of one module, captured alone for any batch, with its attentions as canonical operators."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

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
from fxopt.passes.canonical.fills import Fills
from fxopt.passes.canonical.fold_constants import FoldConstants
from fxopt.passes.canonical.inactive_dropout import InactiveDropout
from fxopt.passes.canonical.no_ops import NoOps
from fxopt.passes.canonical.repeat_heads import RepeatHeads
from fxopt.passes.canonical.softmax import Softmax
from fxopt.passes.canonical.synonyms import Synonyms
from fxopt.rewriter.pipeline import run_pipeline
from fxopt.rewriter.progressive import Call

#: What brings every spelling of attention to its canonical operator.
_CANONICAL = (
    Synonyms(), Fills(), NoOps(), InactiveDropout(), FoldConstants(), Contractions(), Softmax(), RepeatHeads(),
    FuseSdpa(), FuseAttention(),
)  # fmt: skip


#: What an argument may be besides a tensor.
_CONSTANTS: Final = (type(None), bool, int, float, str, torch.dtype, torch.device)


def canonical(program: Program) -> Program:
    """``program`` with its attentions as canonical operators."""
    return run_pipeline(program, _CANONICAL).program


def attentions(program: Program) -> list[Node]:
    """The canonical attentions of ``program``, in order."""
    return program.graph.find_nodes(op="call_function", target=overload("attention"))


@dataclass(frozen=True)
class Isolated:
    """A module captured alone: a program of its tensor arguments.

    Attributes:
        program: its state stands under the module's names.
        in_spec: how the arguments of a call are flattened.
        constants: of the flattened arguments those that are no tensors, by place.
        again: of the tensors those that were given before, each with the place of that among them.
    """

    program: Program
    in_spec: pytree.TreeSpec
    constants: Mapping[int, Any]
    again: Mapping[int, int]


class _OfTensors(nn.Module):
    """``inner`` called with its tensor arguments alone; the others are as in one call."""

    def __init__(self, inner: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        self.inner = inner
        self.given, self.in_spec = pytree.tree_flatten((args, dict(kwargs)))
        self.constants = {n: value for n, value in enumerate(self.given) if not isinstance(value, Tensor)}
        first: dict[int, int] = {}
        tensors = [value for value in self.given if isinstance(value, Tensor)]
        places = [first.setdefault(id(value), n) for n, value in enumerate(tensors)]
        self.again = {n: place for n, place in enumerate(places) if place != n}

    def forward(self, *tensors: Tensor) -> Any:
        for n, given in self.again.items():
            # What is given twice has the same sizes in every call.
            for size, other in zip(tensors[n].shape, tensors[given].shape, strict=True):
                torch._check(size == other)
        rest = iter(tensors)
        count = len(self.constants) + len(tensors)
        flat = [self.constants[n] if n in self.constants else next(rest) for n in range(count)]
        args, kwargs = pytree.tree_unflatten(flat, self.in_spec)
        return self.inner(*args, **kwargs)


def isolated(module: nn.Module, call: Call, *, training: bool, lengths: bool) -> Isolated | str:
    """``module`` called as in ``call``, for any first size of its inputs; or why it can't be captured.

    With ``lengths`` all sizes may be any that the module itself does not fix. Where a first size of 1 can be another,
    it may be.
    """
    modes = {inner: inner.training for inner in module.modules()}
    module.train(training)
    called = _OfTensors(module, call.args, call.kwargs)
    foreign = [value for value in called.constants.values() if not isinstance(value, _CONSTANTS)]
    if foreign:
        return f"it is called with a {type(foreign[0]).__name__}, which a graph can't hold"
    try:
        return _captured(called, lengths)
    finally:
        for inner, mode in modes.items():
            inner.training = mode


def _captured(called: _OfTensors, lengths: bool) -> Isolated | str:
    failure = ""
    # Beside a batch of several, a first size of 1 is one for all of them.
    largest = max((int(x.shape[0]) for x in called.given if isinstance(x, Tensor) and x.dim()), default=1)
    for fewest in (2, 1) if largest == 1 else (1,):
        inputs = tuple(_stand_in(value, fewest) for value in called.given if isinstance(value, Tensor))
        free = tuple(_free(x, lengths) for x in inputs)
        try:
            program = from_export(called, inputs, None, {"tensors": free})
        except FxoptError as error:
            failure = failure or str(error).splitlines()[0]
            continue
        assert program.signature is not None
        bound = {name: target.removeprefix("inner.") for name, target in program.signature.bound.items()}
        program.signature = replace(program.signature, bound=bound)
        return Isolated(program, called.in_spec, called.constants, called.again)
    return f"it can't be captured alone: {failure}"


def _free(x: Tensor, lengths: bool) -> dict[int, Any]:
    """Which sizes may change, as torch.export takes it: the first, or all; what the module fixes stays fixed."""
    axes = range(x.dim()) if lengths else range(min(x.dim() - 1, 1))
    return {axis: torch.export.Dim.AUTO for axis in axes if x.shape[axis] != 1}


def _stand_in(value: Tensor, fewest: int) -> Tensor:
    """A real tensor for a fake one, whose first size is ``fewest`` at least."""
    sizes = [int(size) for size in value.shape]
    sizes = [max(sizes[0], fewest), *sizes[1:]] if sizes else sizes
    return torch.zeros(sizes, dtype=value.dtype, device=value.device)
