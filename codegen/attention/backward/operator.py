"""``fxopt::attention_backward``: the gradients of an attention, as a PyTorch operator.

On CUDA it runs generated kernels where they can serve; elsewhere the weights are recomputed in plain PyTorch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import lru_cache, partial
from types import ModuleType
from typing import Final

import torch
from torch import Tensor

from fxopt.cache import import_source
from fxopt.codegen.attention import reference
from fxopt.codegen.attention.backward import families, kernel
from fxopt.codegen.attention.backward.config import RECOMPUTE
from fxopt.codegen.attention.backward.recompute import gradients
from fxopt.codegen.attention.portable.config import widened
from fxopt.codegen.attention.problem import Problem
from fxopt.codegen.building import launcher, only_compiles
from fxopt.codegen.launching import bare
from fxopt.codegen.replay import Replay, layouts, precision, record, remember
from fxopt.ir.attention import AttentionSpec

#: Launches to repeat, by specification, configuration and layouts of the operands.
_REPLAYS: Final[dict[tuple[object, ...], Replay]] = {}
_NO_LSE: Final = "the forward did not return the log-sum-exp"


@torch.library.custom_op("fxopt::attention_backward", mutates_args=(), device_types="cpu")
def attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    wanted: Sequence[bool],
    spec: str,
    config: str,
    seed: Tensor | None = None,
) -> list[Tensor]:
    """The gradients of ``fxopt::attention_forward``.

    Args:
        q: ``[B, H, S, D]``, any strides.
        k: ``[B, G, T, D]``, any strides.
        v: ``[B, G, T, E]``, any strides.
        captures: the captured tensors, any strides.
        out: ``[B, H, S, E]``, what the forward gave.
        lse: ``[B, H, S]``, the log-sum-exp of the logits in float32; empty if the forward did not return it.
        grad_out: ``[B, H, S, E]``, the gradient of ``out``, any strides.
        grad_lse: ``[B, H, S]``, the gradient of ``lse``, if it was read.
        wanted: for each captured tensor, whether it needs a gradient.
        spec: the printed `AttentionSpec`.
        config: the printed configuration, ``""`` for the first portable one that fits, or ``"recompute"``.
        seed: that of the forward, where there is dropout.

    Returns:
        The gradients of ``q``, ``k``, ``v``, in the memory order of the specification's result, and of the captured
        tensors that are wanted, contiguous.
    """
    meaning = reference.specification(spec)
    return _recomputed(meaning, q, k, v, captures, wanted, grad_out, grad_lse if lse.numel() else None, seed)


def _recomputed(
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: Sequence[Tensor],
    wanted: Sequence[bool],
    grad_out: Tensor,
    grad_lse: Tensor | None,
    seed: Tensor | None,
) -> list[Tensor]:
    dq, dk, dv, dcaptures = gradients(spec, q, k, v, captures, wanted, grad_out, grad_lse, seed)
    laid_out = [_laid_out(spec, x, q.dtype) for x in (dq, dk, dv)]
    return [*laid_out, *(x.contiguous() for x in dcaptures if x is not None)]


def _laid_out(spec: AttentionSpec, x: Tensor, dtype: torch.dtype) -> Tensor:
    """A gradient in the memory order of the result, where models have their queries, keys and values too."""
    return reference.lay_out(dataclasses.replace(spec, out_dtype=dtype), x)


@attention_backward.register_kernel("cuda")
def _cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    wanted: Sequence[bool],
    spec: str,
    config: str,
    seed: Tensor | None = None,
) -> list[Tensor]:
    return on_cuda(q, k, v, captures, out, lse, grad_out, grad_lse, wanted, spec, config, seed)


def on_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    wanted: Sequence[bool],
    spec: str,
    config: str,
    seed: Tensor | None = None,
    into: Sequence[Tensor] = (),
) -> list[Tensor]:
    """What `attention_backward` is on CUDA; the gradients of ``q``, ``k`` and ``v`` are written to ``into``, if given:
    there are as many values as keys in a head then.
    """
    # A gradient that was broadcast, as that of a sum, would be read without coalescing.
    grad_out = grad_out if grad_out.stride(3) == 1 else grad_out.contiguous()
    further = [x for x in (grad_lse, seed) if x is not None]
    operands = (q, k, v, *captures, out, lse, grad_out, *further, *into)
    # Kernels may serve only where sums in any order are allowed.
    ordered = torch.are_deterministic_algorithms_enabled()
    constants = (spec, config, tuple(wanted), grad_lse is None, precision(q.dtype), ordered)
    key = (*constants, *layouts(operands))
    replay = None if only_compiles() else _REPLAYS.get(key)
    # A replay runs on the current device.
    if replay is not None and q.get_device() == torch.cuda.current_device():
        return [*into, *replay(operands)]
    return _recorded(key, q, k, v, captures, out, lse, grad_out, grad_lse, wanted, spec, config, seed, into)


def _recorded(
    key: tuple[object, ...],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    wanted: Sequence[bool],
    spec: str,
    config: str,
    seed: Tensor | None,
    into: Sequence[Tensor],
) -> list[Tensor]:
    meaning = reference.specification(spec)
    chosen = chosen_config(meaning, q, v, lse, config, wanted)
    if chosen == RECOMPUTE:
        found = _recomputed(meaning, q, k, v, captures, wanted, grad_out, grad_lse if lse.numel() else None, seed)
        return [*(x.copy_(y) for x, y in zip(into, found[: len(into)], strict=True)), *found[len(into) :]]
    width = v.shape[3]
    v, out, grad_out = (widened(x, q.shape[3]) for x in (v, out, grad_out))
    launched = module(spec, q.shape[3], v.shape[3], q.dtype, chosen, tuple(wanted))
    seeded = {} if seed is None else {"seed": seed}
    launch = partial(launcher(launched), q, k, v, captures, out, lse, grad_out, grad_lse, into, **seeded)
    if only_compiles() or v.shape[3] != width:
        found = launch()
        return found if v.shape[3] == width else _narrowed(meaning, found, width)
    operands = [x for x in (q, k, v, *captures, out, lse, grad_out, grad_lse, seed, *into) if x is not None]
    gradients, replay = record(launched, lambda: tuple(launch()[len(into) :]), operands)
    remember(_REPLAYS, key, replay)
    return [*into, *gradients]


def _narrowed(spec: AttentionSpec, found: Sequence[Tensor], width: int) -> list[Tensor]:
    """The gradients of an attention whose values were widened."""
    dq, dk, dv, *rest = found
    return [dq, dk, _laid_out(spec, dv[..., :width], dv.dtype), *rest]


def chosen_config(
    spec: AttentionSpec, q: Tensor, v: Tensor, lse: Tensor, config: str, wanted: Sequence[bool] = ()
) -> str:
    """The configuration that runs on CUDA operands: ``config``, the first portable one that fits, or ``"recompute"``.

    A ``config`` that sums in any order gives way in deterministic mode, whenever that was switched on.
    """
    if config == RECOMPUTE or objection(spec, q, v, lse) is not None:
        return RECOMPUTE
    if config and families.can_run(spec, config, wanted):
        return config
    capability = torch.cuda.get_device_capability(q.device)
    found = kernel.candidates(Problem(spec, q.shape[3], v.shape[3], q.dtype, capability))
    return str(found[0]) if found else RECOMPUTE


def objection(spec: AttentionSpec, q: Tensor, v: Tensor, lse: Tensor) -> str | None:
    """Why the generated kernels can't serve, as a sentence, or ``None`` when they can."""
    if lse.dim() != 3:
        return _NO_LSE
    return kernel.objection(spec, q.shape[3], v.shape[3], q.dtype, averages=True)


@lru_cache(maxsize=1024)
def module(
    spec: str, head_dim: int, value_dim: int, dtype: torch.dtype, config: str, wanted: tuple[bool, ...]
) -> ModuleType:
    """The generated module for printed ``spec`` and ``config``, from the source cache."""
    return import_source(kernel.KIND, source_of(spec, head_dim, value_dim, dtype, config, wanted))


def source_of(spec: str, head_dim: int, value_dim: int, dtype: torch.dtype, config: str, wanted: Sequence[bool]) -> str:
    """The source that ``attention_backward`` runs for printed ``spec`` and ``config``."""
    return families.source(reference.specification(spec), head_dim, value_dim, dtype, config, wanted)


@attention_backward.register_fake
def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    wanted: Sequence[bool],
    spec: str,
    config: str,
    seed: Tensor | None = None,
) -> list[Tensor]:
    meaning = reference.specification(spec)
    gradients = [_empty(meaning, x) for x in (q, k, v)]
    return gradients + [c.new_empty(c.shape) for c, want in zip(captures, wanted, strict=True) if want]


def _empty(spec: AttentionSpec, x: Tensor) -> Tensor:
    batch, heads, length, width = x.shape
    if spec.out_layout == "bhsd":
        return x.new_empty((batch, heads, length, width))
    return x.new_empty((batch, length, heads, width)).transpose(1, 2)


bare("attention_backward", _cuda, _fake, attention_backward)
