"""The peers of a model benchmark: eager, the modes of Inductor, and fxopt, each as one way to make a callable."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch

from fxopt.backend import compile as fxopt_compile
from fxopt.passes import exact_pipeline

Forward = Callable[..., Any]


@dataclass(frozen=True)
class Peer:
    """How a model is compiled: a ``torch.compile`` backend ("" leaves it eager) and mode.

    ``attention`` asks for the model with another attention implementation; only models that offer it have this peer.
    ``kernels_of`` names a peer that generates the same kernels: this one finds them in that one's caches. ``passes``
    are names of passes that fxopt runs besides its default ones.
    """

    name: str
    backend: str = ""
    mode: str | None = None
    attention: str = ""
    kernels_of: str = ""
    passes: tuple[str, ...] = ()

    def compile(self, model: Any, fxopt_options: Mapping[str, str]) -> Forward:
        """``model`` as this peer runs it; compilation itself happens at the first call."""
        if not self.backend:
            return _call(model)
        # Strict: a graph that fxopt left alone would be timed as if it were rewritten.
        options: dict[str, Any] = {"strict": True, **fxopt_options} if self.backend == "fxopt" else {}
        if self.passes:
            options["passes"] = [*exact_pipeline(), *self.passes]
        if self.backend == "fxopt" and self.mode:
            # torch.compile takes a mode or options, not both.
            return _call(torch.compile(model, backend=partial(fxopt_compile, mode=self.mode, options=options)))
        return _call(torch.compile(model, backend=self.backend, mode=self.mode, options=options or None))


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("eager"),
        Peer("inductor", "inductor"),
        Peer("fxopt", "fxopt"),
        Peer("reduce-overhead", "inductor", "reduce-overhead", kernels_of="inductor"),
        Peer("fxopt-reduce-overhead", "fxopt", "reduce-overhead", kernels_of="fxopt"),
        Peer("flex", "inductor", attention="flex_attention"),
        Peer("max-autotune", "inductor", "max-autotune"),
        Peer("fxopt-max-autotune", "fxopt", "max-autotune"),
        Peer("fxopt-fuse-mlp", "fxopt", passes=("fuse-mlp",)),
        Peer("fxopt-fuse-mlp-graphs", "fxopt", "reduce-overhead", kernels_of="fxopt-fuse-mlp", passes=("fuse-mlp",)),
    )
}
#: The peers that run where they are asked for: they compile for minutes, or run passes that must be named.
ASKED_PEERS: Final = ("max-autotune", "fxopt-max-autotune", "fxopt-fuse-mlp", "fxopt-fuse-mlp-graphs")


def main_output(output: Any) -> torch.Tensor:
    """The tensor that is compared: the output itself, or the first field (the last hidden state) of a model output."""
    tensor = output if isinstance(output, torch.Tensor) else output[0]
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"the model's first output is a {type(tensor).__name__}, expected a tensor")
    return tensor


def _call(forward: Forward) -> Forward:
    """``forward`` told that a new step begins: outputs of the step before may be overwritten by CUDA graphs."""

    def step(**inputs: torch.Tensor) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return forward(**inputs)

    return step
