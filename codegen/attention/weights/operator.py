"""``fxopt::attention_weights_forward``: weights of an attention, or a statistic of them, by a generated Triton kernel.

On CUDA it runs the kernel, on the CPU the same maths in plain PyTorch; it has fake and autograd implementations, so it
stands in graphs like any other operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor

from fxopt.cache import import_source
from fxopt.codegen.attention import reference
from fxopt.codegen.attention.weights.backward import gradients
from fxopt.codegen.attention.weights.kernel import KIND, objection, source
from fxopt.codegen.attention.weights.reference import exact_weights, reduction, result_size
from fxopt.codegen.attention.weights.wants import Want
from fxopt.codegen.building import launcher, only_compiles
from fxopt.codegen.replay import Replay, layouts, precision, record, remember
from fxopt.errors import LoweringError
from fxopt.ir.attention import AttentionSpec

#: Launches to repeat, by what they depend on.
_REPLAYS: Final[dict[tuple[object, ...], Replay]] = {}


@torch.library.custom_op("fxopt::attention_weights_forward", mutates_args=(), device_types="cpu")
def attention_weights_forward(
    q: Tensor, k: Tensor, captures: Sequence[Tensor], spec: str, kind: str, config: str
) -> Tensor:
    """What ``fxopt::attention_weights`` or ``fxopt::attention_statistics`` mean, by the kernel of one configuration.

    Args:
        q: ``[B, H, S, D]``, any strides.
        k: ``[B, G, T, D]``, any strides.
        captures: the captured tensors, any strides.
        spec: the printed `AttentionSpec`; its dropout doesn't matter.
        kind: ``"weights"``, ``"column_sum"`` or ``"diagonal"``.
        config: the printed `Config`.

    Returns:
        ``[B, H, S, T]``, ``[B, H, T]`` or ``[B, H, min(S, T)]``, contiguous, in the specification's ``out_dtype``.

    Raises:
        LoweringError: the kernel cannot serve the specification or the operands.
    """
    meaning = _checked(q, k, captures, spec)
    weights_BHST = exact_weights(meaning, q, k, captures)
    found = weights_BHST if kind == "weights" else reduction(kind)(weights_BHST)
    return found.to(meaning.out_dtype, memory_format=torch.contiguous_format, copy=True)


@attention_weights_forward.register_kernel("cuda")
def _cuda(q: Tensor, k: Tensor, captures: Sequence[Tensor], spec: str, kind: str, config: str) -> Tensor:
    _checked(q, k, captures, spec)
    return walk(q, k, captures, spec, kind, config)


def walk(
    q: Tensor, k: Tensor, captures: Sequence[Tensor], spec: str, kind: str, config: str, lse: Tensor | None = None
) -> Tensor:
    """Run the kernel on CUDA; given the log-sum-exp ``[B, H, S]`` of the rows, in one walk over the keys."""
    known = () if lse is None else (lse,)
    operands = (q, k, *captures, *known)
    key = (spec, kind, config, lse is None, precision(q.dtype), *layouts(operands))
    replay = None if only_compiles() else _REPLAYS.get(key)
    # A replay runs on the current device.
    if replay is not None and q.get_device() == torch.cuda.current_device():
        return replay(operands)[0]
    kernel = module(spec, q.shape[3], q.dtype, kind, config, lse is not None)
    launch = launcher(kernel)
    if only_compiles():
        out: Tensor = launch(q, k, captures, *known)
        return out
    results, replay = record(kernel, lambda: (launch(q, k, captures, *known),), operands)
    remember(_REPLAYS, key, replay)
    return results[0]


@lru_cache(maxsize=1024)
def module(spec: str, head_dim: int, dtype: torch.dtype, kind: str, config: str, known: bool = False) -> ModuleType:
    """The generated module for printed ``spec`` and ``config``, from the source cache."""
    return import_source(KIND, source_of(spec, head_dim, dtype, kind, config, known))


def source_of(spec: str, head_dim: int, dtype: torch.dtype, kind: str, config: str, known: bool = False) -> str:
    """The source that ``attention_weights_forward`` runs for printed ``spec`` and ``config``; ``known`` tells that the
    log-sum-exp of the rows is given.
    """
    return source(reference.specification(spec), head_dim, dtype, kind, config, known)


@attention_weights_forward.register_fake
def _fake(q: Tensor, k: Tensor, captures: Sequence[Tensor], spec: str, kind: str, config: str) -> Tensor:
    meaning = _checked(q, k, captures, spec)
    return q.new_empty(result_size(q, k, kind), dtype=meaning.out_dtype)


def _checked(q: Tensor, k: Tensor, captures: Sequence[Tensor], spec: str) -> AttentionSpec:
    meaning = reference.specification(spec)
    if q.dtype != k.dtype or len({x.device for x in (q, k, *captures)}) > 1:
        shown = ", ".join(f"{x.dtype} on {x.device}" for x in (q, k))
        raise LoweringError(f"attention operands must share dtype and device, found {shown}; lower it to ATen instead")
    reason = _objection(spec, q.shape[3], q.dtype)
    # Elsewhere than on CUDA no kernel is generated, and float64 serves as an oracle.
    if reason is not None and q.is_cuda:
        raise LoweringError(f"no Triton kernel for these attention weights: {reason}; lower them to ATen instead")
    return meaning


def _objection(spec: str, head_dim: int, dtype: torch.dtype) -> str | None:
    """`objection` to a printed specification, which every call asks for: looked up, unless the size is symbolic."""
    asked = _known_objection if isinstance(head_dim, int) else _known_objection.__wrapped__
    return asked(spec, head_dim, dtype)


@lru_cache(maxsize=1024)
def _known_objection(spec: str, head_dim: int, dtype: torch.dtype) -> str | None:
    return objection(reference.specification(spec), head_dim, dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, captures, spec, kind, _ = inputs
    ctx.save_for_backward(q, k, *captures)
    ctx.spec, ctx.kind = spec, kind


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    q, k, *captures = ctx.saved_tensors
    wanted = [bool(need) for need in ctx.needs_input_grad[2]]
    spec = reference.specification(ctx.spec)
    return (*gradients(spec, q, k, captures, wanted, Want(ctx.kind, spec.out_dtype), grad), None, None, None)


attention_weights_forward.register_autograd(_backward, setup_context=_setup_context)
