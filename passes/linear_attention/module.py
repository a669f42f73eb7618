"""The modules that linear attention puts in the place of those that computed a softmax attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxopt.errors import CaptureError
from fxopt.passes.linear_attention.replace import Argument, Captured
from fxopt.rewriter.progressive import Progressive


@dataclass(frozen=True)
class Transition:
    """How long the original stays: alone for ``warmup`` optimiser steps, then less and less in ``steps`` more."""

    steps: int
    warmup: int

    @property
    def blends(self) -> bool:
        """Whether anything of the original is ever computed."""
        return bool(self.steps or self.warmup)


#: What a `LinearisedModule` holds and the module that it replaces may not.
RESERVED: Final = frozenset({"step", "transition", "title", "train_graph", "eval_graph", "graph", "share"})


class CapturedForward(nn.Module):
    """Runs a captured graph with the state of a module, which it holds under the module's names."""

    def __init__(self, original: nn.Module, graph: Captured) -> None:
        super().__init__()
        adopt(self, original)
        self.graph = graph.module
        self._captured = _Calling(graph)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the original's forward takes, and gives."""
        return self._captured.run(self, self.graph, args, kwargs)


class LinearisedModule(Progressive):
    """A module whose attentions are linear; its parameters keep their names.

    In training with a schedule each attention gives ``λ·softmax attention + (1 − λ)·linear attention``, in evaluation
    the linear one alone.
    """

    folds: ClassVar[bool] = False
    inlined: ClassVar[bool] = True
    step: Tensor

    def __init__(
        self,
        original: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        graphs: tuple[Captured, Captured],
        transition: Transition,
        title: str,
    ) -> None:
        super().__init__()
        adopt(self, original)
        for name, parameter in parameters.items():
            self.register_parameter(name, parameter)
        self.transition, self.title = transition, title
        self.train_graph, self.eval_graph = (graph.module for graph in graphs)
        self._captured = tuple(_Calling(graph) for graph in graphs)
        device = next(iter(self.parameters()), torch.empty(0)).device
        self._clock = next((name for name, _ in self.named_parameters()), "")
        if transition.blends:
            self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=device))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the original's forward takes, and gives."""
        if self.training:
            return self._captured[0].run(self, self.train_graph, args, kwargs)
        return self._captured[1].run(self, self.eval_graph, args, kwargs)

    def clock(self) -> Tensor:
        """See `Progressive.clock`."""
        # Without parameters there is no schedule either.
        return self.get_parameter(self._clock) if self._clock else torch.empty(0)

    def advance(self) -> None:
        """See `Progressive.advance`."""
        if self.transition.blends:
            with torch.no_grad():
                self.step.add_(1)

    @property
    def share(self) -> Tensor:
        """``λ [] = 1 − clamp(step − warmup, 0, steps) / steps``, in float32; 0 after the warm-up without ``steps``."""
        steps, warmup = self.transition.steps, self.transition.warmup
        if steps:
            return (steps - (self.step - warmup).clamp(0, steps)).float() / steps
        return (self.step < warmup).float()

    def remaining(self) -> float:
        """See `Progressive.remaining`."""
        return float(self.share) if self.transition.blends else 0.0

    def converted(self) -> CapturedForward:
        """The evaluation alone; parameters are shared with this module."""
        graph = Captured(self.eval_graph, *self._captured[1].described)
        return CapturedForward(self, graph).train(self.training)

    def extra_repr(self) -> str:
        """What each attention became, and the schedule."""
        schedule = f", warmup={self.transition.warmup}, steps={self.transition.steps}"
        return self.title + (schedule if self.transition.blends else "")


class _Calling:
    """How a captured graph is called."""

    def __init__(self, graph: Captured) -> None:
        self.described = (graph.bound, graph.arguments, graph.in_spec, graph.out_spec)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Calling:
        """Nothing of it ever changes."""
        return self

    def run(self, owner: nn.Module, graph: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the graph with ``owner``'s state."""
        bound, arguments, in_spec, out_spec = self.described
        flat, spec = pytree.tree_flatten((args, kwargs))
        if spec != in_spec:
            raise CaptureError(
                f"{type(owner).__name__} was captured for arguments of the structure {in_spec}, called with {spec}; "
                "prepare the model with example arguments that it is trained with"
            )
        given = [_checked(value, expected, flat) for value, expected in zip(flat, arguments, strict=True)]
        tensors = [(value, each) for value, each in zip(given, arguments, strict=True) if each.sizes is not None]
        _check_repeated(tensors)
        inputs = iter([value for value, _ in tensors])
        operands = [next(inputs) if name is None else _state(owner, name) for name in bound]
        return pytree.tree_unflatten(list(graph(*operands)), out_spec)


def _checked(value: Any, expected: Argument, flat: list[Any]) -> Any:
    """The argument as the graph reads it, if it is such as the graph was captured for."""
    if expected.sizes is None:
        fits = not isinstance(value, Tensor) and value == expected.constant
    elif not expected.read:
        return None
    elif value is None and expected.mask is not None:
        device = next(x.device for x in flat if isinstance(x, Tensor))
        # One for all keys: true, or nothing to add.
        return torch.full((1, 1, 1, 1), expected.mask is torch.bool, dtype=expected.mask, device=device)
    else:
        fits = isinstance(value, Tensor) and len(value.shape) == len(expected.sizes)
        fits = fits and all(size in (None, own) for own, size in zip(value.shape, expected.sizes, strict=True))
    if not fits:
        found = list(value.shape) if isinstance(value, Tensor) else value
        wanted = expected.constant if expected.sizes is None else list(expected.sizes)
        raise CaptureError(
            f"a module with linear attention was captured for {wanted} and got {found} (None: any size); "
            "prepare the model with example arguments that it is trained with"
        )
    return value


def _check_repeated(tensors: list[tuple[Any, Argument]]) -> None:
    """Raise where what was one tensor given twice is now two of different sizes."""
    for value, expected in tensors:
        before = None if expected.again is None else tensors[expected.again][0]
        if isinstance(value, Tensor) and isinstance(before, Tensor) and value.shape != before.shape:
            raise CaptureError(
                f"a module with linear attention was captured for one tensor given twice and got {list(before.shape)} "
                f"and {list(value.shape)}; prepare the model with example arguments that it is trained with"
            )


def _state(owner: nn.Module, path: str) -> Any:
    value: Any = owner
    for part in path.split("."):
        value = getattr(value, part)
    return value


def adopt(new: nn.Module, original: nn.Module) -> None:
    """Give ``new`` the submodules, parameters, buffers and plain attributes of ``original``, under their names."""
    for name, child in original.named_children():
        if not isinstance(child, torch.fx.GraphModule):
            new.add_module(name, child)
    for name, parameter in original._parameters.items():
        new.register_parameter(name, parameter)
    for name, buffer in original._buffers.items():
        if name != "step":
            new.register_buffer(name, buffer, persistent=name not in original._non_persistent_buffers_set)
    for name, value in vars(original).items():
        if not name.startswith("_") and not hasattr(new, name) and isinstance(value, int | float | str | tuple | None):
            setattr(new, name, value)
    if hasattr(original, "_qkv_same_embed_dim"):
        # By it PyTorch's encoder layers tell whether they may compute softmax attention from the weights themselves.
        new.__dict__["_qkv_same_embed_dim"] = False


def keep_padded(model: nn.Module, new: nn.Module) -> None:
    """Have PyTorch's encoders around ``new`` hand it padded sequences: in evaluation they may pack them otherwise."""
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and any(inner is new for inner in encoder.modules()):
            encoder.use_nested_tensor = False
