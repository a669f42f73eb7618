"""``fxopt::linear_attention_forward`` and its gradients, by generated Triton kernels, as PyTorch operators.

On CUDA they run kernels, on the CPU the same maths in plain PyTorch; they have fake and autograd implementations, so
they stand in graphs like any other operator.
"""

from __future__ import annotations

from functools import lru_cache, partial
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor

from fxopt.cache import import_source
from fxopt.codegen.building import launcher, only_compiles
from fxopt.codegen.launching import bare
from fxopt.codegen.linear_attention import reference
from fxopt.codegen.linear_attention.gradients import Optional, gradients
from fxopt.codegen.linear_attention.kernel import KIND, objection, source
from fxopt.codegen.linear_attention.operands import Operands
from fxopt.codegen.replay import Replay, layouts, precision, record, remember
from fxopt.errors import LoweringError
from fxopt.ir.linear_attention import LinearSpec

#: Launches to repeat, by specification, configuration and layouts of the operands.
_REPLAYS: Final[dict[tuple[object, ...], Replay]] = {}


@torch.library.custom_op("fxopt::linear_attention_forward", mutates_args=(), device_types="cpu")
def linear_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    keep: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    spec: str,
    config: str,
    with_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Linear attention as ``fxopt::linear_attention`` means it, by the generated kernel of one configuration.

    Args:
        q: ``[B, H, S, D]``, any strides.
        k: ``[B, H, T, D]``, any strides.
        v: ``[B, H, T, E]``, any strides.
        positions: ``[H, T, D]`` or ``None``.
        keep: ``[B, T]``, boolean, or ``None``.
        weight: ``[E, R, R]`` or ``None``.
        bias: ``[E]``, with ``weight``.
        spec: the printed `LinearSpec`.
        config: the printed `LinearConfig`.
        with_sums: whether to return what gradients are computed from.

    Returns:
        ``out [B, H, S, E]`` as the specification lays it out. With ``with_sums`` what that is without the convolution
        (empty where there is none) and the denominators ``[B, H, S]`` in float32; both empty without.

    Raises:
        LoweringError: the kernel cannot serve the specification or the operands.
    """
    meaning = _checked(q, k, v, (positions, keep, weight, bias), spec)
    out = reference.linear_attention(q, k, v, positions, keep, weight, bias, spec)
    apart, sums = _for_gradients(out, q, weight is not None, with_sums)
    if not with_sums:
        return out, apart, sums
    attended, denominators = reference.attended(q, k, v, positions, keep, meaning)
    return out, apart if weight is None else apart.copy_(attended), sums.copy_(denominators)


@linear_attention_forward.register_kernel("cuda")
def _cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    keep: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    spec: str,
    config: str,
    with_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    optional = (positions, keep, weight, bias)
    given = tuple(x for x in optional if x is not None)
    operands = (q, k, v, *given)
    key = (spec, config, with_sums, precision(q.dtype), *(x is None for x in optional), *layouts(operands))
    replay = None if only_compiles() else _REPLAYS.get(key)
    # A replay runs on the current device.
    if replay is not None and q.get_device() == torch.cuda.current_device():
        out, attended, sums = replay(operands)
        return out, attended, sums
    _checked(q, k, v, optional, spec)
    kernel = module(spec, q.shape[3], v.shape[3], q.dtype, operands_of(*optional), config)
    launch = partial(launcher(kernel), *operands, with_sums=with_sums)
    (out, attended, sums), replay = (launch(), None) if only_compiles() else record(kernel, launch, operands)
    remember(_REPLAYS, key, replay)
    return out, attended, sums


def operands_of(positions: Tensor | None, keep: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Operands:
    """Which of the optional operands are there."""
    return Operands(positions is not None, keep is not None, 0 if weight is None else int(weight.shape[-1]))


@lru_cache(maxsize=1024)
def module(spec: str, head_dim: int, value_dim: int, dtype: torch.dtype, operands: Operands, config: str) -> ModuleType:
    """The generated module for printed ``spec`` and ``config``, from the source cache."""
    return import_source(KIND, source_of(spec, head_dim, value_dim, dtype, operands, config))


def source_of(spec: str, head_dim: int, value_dim: int, dtype: torch.dtype, operands: Operands, config: str) -> str:
    """The source that the operators run for printed ``spec`` and ``config``."""
    return source(reference.specification(spec), head_dim, value_dim, dtype, operands, config)


def source_of_call(*arguments: Any) -> str:
    """The source that a call of ``linear_attention_forward`` with these (fake) arguments runs."""
    q, _, v, *optional, spec, config, _ = arguments
    return source_of(spec, int(q.shape[3]), int(v.shape[3]), q.dtype, operands_of(*optional), config)


@linear_attention_forward.register_fake
def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    keep: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    spec: str,
    config: str,
    with_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _checked(q, k, v, (positions, keep, weight, bias), spec)
    out = reference.empty_result(q, k, v, positions, keep, weight, bias, spec)
    return (out, *_for_gradients(out, q, weight is not None, with_sums))


def _for_gradients(out: Tensor, q: Tensor, convolved: bool, wanted: bool) -> tuple[Tensor, Tensor]:
    """Empty tensors for what gradients are computed from."""
    apart = torch.empty_like(out, dtype=q.dtype) if convolved and wanted else q.new_empty(0)
    return apart, q.new_empty(q.shape[:3] if wanted else (0,), dtype=torch.float32)


def _checked(q: Tensor, k: Tensor, v: Tensor, optional: Optional, spec: str) -> LinearSpec:
    meaning = reference.specification(spec)
    positions, keep, weight, bias = optional
    devices = {x.device for x in (q, k, v, positions, keep, weight, bias) if x is not None}
    if not q.dtype == k.dtype == v.dtype or len(devices) > 1:
        shown = ", ".join(f"{x.dtype} on {x.device}" for x in (q, k, v))
        raise LoweringError(f"operands must share dtype and device, found {shown}; lower it to ATen instead")
    if (weight is None) != (bias is None):
        raise LoweringError("a convolution needs both weight and bias; lower it to ATen instead")
    # Elsewhere than on CUDA no kernel is generated, and float64 serves as an oracle.
    reason = objection(meaning, q.shape[3], v.shape[3], q.dtype, operands_of(*optional)) if q.is_cuda else None
    tokens = meaning.first + meaning.side**2
    if meaning.side and any(isinstance(x.shape[2], int) and x.shape[2] != tokens for x in (q, k)):
        reason = f"{q.shape[2]} queries and {k.shape[2]} keys are not the {tokens} tokens of the grid"
    if reason is not None:
        raise LoweringError(f"no Triton kernel for this linear attention: {reason}; lower it to ATen instead")
    return meaning


@torch.library.custom_op("fxopt::linear_attention_backward", mutates_args=(), device_types="cpu")
def linear_attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    keep: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    attended: Tensor,
    sums: Tensor,
    grad: Tensor,
    spec: str,
    config: str,
) -> list[Tensor]:
    """The gradients of ``fxopt::linear_attention_forward``.

    Args:
        q: as the forward had it, and so have ``k``, ``v``, ``positions``, ``keep``, ``weight`` and ``bias``.
        k: see above.
        v: see above.
        positions: see above.
        keep: see above.
        weight: see above.
        bias: see above.
        attended: ``[B, H, S, E]``, the result without the convolution.
        sums: ``[B, H, S]``, the denominators.
        grad: ``[B, H, S, E]``, the gradient of the result, any strides.
        spec: the printed `LinearSpec`.
        config: the printed `LinearConfig`.

    Returns:
        The gradients of ``q``, ``k``, ``v``, in the memory order of the specification's result, and of those of
        ``positions``, ``weight`` and ``bias`` that are given, contiguous.
    """
    meaning = reference.specification(spec)
    found = gradients(q, k, v, (positions, keep, weight, bias), grad, meaning)
    laid_out = [_laid_out(meaning, x, q.dtype) for x in found[:3]]
    return [*laid_out, *(x.contiguous() for x in found[3:] if x is not None)]


def _laid_out(spec: LinearSpec, x: Tensor, dtype: torch.dtype) -> Tensor:
    """A gradient in the memory order of the result, where models have their queries, keys and values too."""
    return reference.lay_out(LinearSpec(out_layout=spec.out_layout), x, dtype)


@linear_attention_backward.register_kernel("cuda")
def _cuda_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    keep: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    attended: Tensor,
    sums: Tensor,
    grad: Tensor,
    spec: str,
    config: str,
) -> list[Tensor]:
    optional = (positions, keep, weight, bias)
    # A gradient that was broadcast, as that of a sum, would be read without coalescing.
    grad = grad if grad.stride(3) == 1 else grad.contiguous()
    kernel = module(spec, q.shape[3], v.shape[3], q.dtype, operands_of(*optional), config)
    launch = launcher(kernel, "launch_backward")
    found: list[Tensor] = launch(q, k, v, *(x for x in optional if x is not None), attended, sums, grad)
    return found


@linear_attention_backward.register_fake
def _fake_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    keep: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    attended: Tensor,
    sums: Tensor,
    grad: Tensor,
    spec: str,
    config: str,
) -> list[Tensor]:
    meaning = reference.specification(spec)
    narrow = str(LinearSpec(out_layout=meaning.out_layout))
    own = [reference.empty_result(x, x, x, None, None, None, None, narrow) for x in (q, k, v)]
    return [*own, *(x.new_empty(x.shape) for x in (positions, weight, bias) if x is not None)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *operands, spec, config, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*operands, *output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.spec, ctx.config = spec, config


def _backward(ctx: Any, grad: Tensor | None, *others: Tensor | None) -> tuple[Any, ...]:
    q, k, v, positions, keep, weight, bias, out, attended, sums = ctx.saved_tensors
    grad = torch.zeros_like(out) if grad is None else grad
    if torch.is_grad_enabled():
        # Gradients that are differentiated again need operations that can be.
        spec = reference.specification(ctx.spec)
        dq, dk, dv, dpositions, dweight, dbias = gradients(q, k, v, (positions, keep, weight, bias), grad, spec)
    else:
        whole = out if weight is None else attended
        arguments = (q, k, v, positions, keep, weight, bias, whole, sums, grad, ctx.spec, ctx.config)
        dq, dk, dv, *found = linear_attention_backward(*arguments)
        rest = iter(found)
        dpositions, dweight, dbias = (None if x is None else next(rest) for x in (positions, weight, bias))
    return dq, dk, dv, dpositions, None, dweight, dbias, None, None, None


linear_attention_forward.register_autograd(_backward, setup_context=_setup_context)
bare("linear_attention_forward", _cuda, _fake, linear_attention_forward)
