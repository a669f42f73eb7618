"""``fxopt::attention_decided``: an attention by what was decided for it, which may be after its graph was compiled.

A graph that names the decision by a key is the same whatever is decided: the base compiler can work on it while
candidates are built, and finds it in its caches the next time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from fxopt.codegen.attention import kernels, reference, sdpa  # noqa: F401 - sdpa gives its operator a meaning
from fxopt.codegen.attention.operator import on_cuda
from fxopt.codegen.attention.problem import Problem
from fxopt.errors import FxoptWarning

#: What serves, by key: a family and the argument that tells its operator how.
_DECIDED: Final[dict[str, tuple[str, str]]] = {}
_LIBRARY: Final = torch.library.Library("fxopt", "FRAGMENT")
#: What runs a family, as it would stand in a graph.
FAMILIES: Final[Mapping[str, Callable[..., Any]]] = {
    "triton": torch.ops.fxopt.attention_forward.default,
    "sdpa": torch.ops.fxopt.attention_sdpa.default,
    "aten": torch.ops.fxopt.attention.default,
}


def decide(key: str, family: str, how: str = "") -> None:
    """From now on calls with ``key`` run as ``family``, one of `FAMILIES`: by configuration or backend ``how``."""
    _DECIDED[key] = (family, how)


def config_of(key: str) -> str | None:
    """The configuration of the generated kernel that runs for ``key``, if one does."""
    family, how = _DECIDED.get(key, ("", ""))
    return how if family == "triton" else None


def attention_decided(q: Tensor, k: Tensor, v: Tensor, captures: Sequence[Tensor], spec: str, key: str) -> Tensor:
    """Attention as ``fxopt::attention`` means it, by the kernel that was decided on under ``key``.

    A process that was never told, such as one that loads a compiled program of another, takes the best guess of the
    cost model, and says so by a `FxoptWarning`. There is no gradient.

    Args:
        q: ``[B, H, S, D]``, any strides, on a CUDA device.
        k: ``[B, G, T, D]``, any strides.
        v: ``[B, G, T, E]``, any strides.
        captures: the captured tensors, any strides.
        spec: the printed `AttentionSpec`.
        key: the name under which the decision is known.

    Returns:
        ``out [B, H, S, E]`` as the specification lays it out.
    """
    family, how = _DECIDED.get(key) or _guessed(q, k, v, spec, key)
    if family == "triton":
        generated: tuple[Tensor, Tensor] = on_cuda(q, k, v, captures, spec, how, False)
        return generated[0]
    found: Tensor = FAMILIES[family](q, k, v, captures, spec, *([how] if how else []))
    return found


def _guessed(q: Tensor, k: Tensor, v: Tensor, spec: str, key: str) -> tuple[str, str]:
    sizes = (*q.shape[:2], k.shape[1], q.shape[2], k.shape[2])
    capability = torch.cuda.get_device_capability(q.device)
    problem = Problem(reference.specification(spec), q.shape[3], v.shape[3], q.dtype, capability, *sizes)
    configs, _ = kernels.candidates(problem)
    guess = ("triton", configs[0]) if configs else ("aten", "")
    decide(key, *guess)
    warnings.warn(
        f"nothing was decided in this process for an attention of a compiled program; it runs as {'-'.join(guess)}, "
        "the best guess. Compile the program in this process to have the candidates measured",
        FxoptWarning,
        stacklevel=2,
    )
    return guess


def _meaning(q: Tensor, k: Tensor, v: Tensor, captures: Sequence[Tensor], spec: str, key: str) -> Tensor:
    found: Tensor = FAMILIES["aten"](q, k, v, captures, spec)
    return found


def _fake(q: Tensor, k: Tensor, v: Tensor, captures: Sequence[Tensor], spec: str, key: str) -> Tensor:
    return reference.empty_result(q, k, v, captures, spec)


_LIBRARY.define(
    "attention_decided(Tensor q, Tensor k, Tensor v, Tensor[] captures, str spec, str key) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("attention_decided", attention_decided, "CUDA")
_LIBRARY.impl("attention_decided", _meaning, "CPU")
torch.library.register_fake("fxopt::attention_decided", _fake, lib=_LIBRARY)
