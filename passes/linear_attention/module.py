"""The modules that linear attention puts in the place of those that computed a softmax attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, nn

from fxopt.passes.linear_attention.calling import CapturedCalls
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
    """Runs captured graphs with the state of a module, which it holds under the module's names."""

    def __init__(self, original: nn.Module, graph: CapturedCalls) -> None:
        super().__init__()
        adopt(self, original)
        self.graph = graph

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the original's forward takes, and gives."""
        return self.graph.run(self, args, kwargs)


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
        training: CapturedCalls,
        evaluation: CapturedCalls,
        transition: Transition,
        title: str,
    ) -> None:
        super().__init__()
        adopt(self, original)
        for name, parameter in parameters.items():
            self.register_parameter(name, parameter)
        self.transition, self.title = transition, title
        self.train_graph, self.eval_graph = training, evaluation
        device = next(iter(self.parameters()), torch.empty(0)).device
        self._clock = next((name for name, _ in self.named_parameters()), "")
        if transition.blends:
            self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=device))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the original's forward takes, and gives."""
        graph = self.train_graph if self.training else self.eval_graph
        return graph.run(self, args, kwargs)

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
        return CapturedForward(self, self.eval_graph).train(self.training)

    def extra_repr(self) -> str:
        """What each attention became, and the schedule."""
        schedule = f", warmup={self.transition.warmup}, steps={self.transition.steps}"
        return self.title + (schedule if self.transition.blends else "")


def adopt(new: nn.Module, original: nn.Module) -> None:
    """Give ``new`` the submodules, parameters, buffers and plain attributes of ``original``, under their names."""
    for name, child in original.named_children():
        if not isinstance(child, CapturedCalls):
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
