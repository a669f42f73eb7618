"""``fxopt::attention_and_weights_forward``: an attention and what is wanted of its weights, by generated kernels.

On CUDA it runs the kernels, on the CPU the same maths in plain PyTorch; it has fake and autograd implementations, so it
stands in graphs like any other operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor

from fxopt.cache import import_source
from fxopt.codegen.attention import reference
from fxopt.codegen.attention.backward.config import split_config
from fxopt.codegen.attention.operator import attention_forward, checked, pulled_back
from fxopt.codegen.attention.operator import on_cuda as attention_on_cuda
from fxopt.codegen.attention.portable.kernel import KIND
from fxopt.codegen.attention.short import kernel as short
from fxopt.codegen.attention.weights import backward, operator
from fxopt.codegen.attention.weights.wants import Want, read_wants, text_of_want
from fxopt.codegen.building import launcher, only_compiles
from fxopt.codegen.launching import bare
from fxopt.codegen.replay import Replay, layouts, precision, record, remember

#: Launches to repeat, by what they depend on.
_REPLAYS: Final[dict[tuple[object, ...], Replay]] = {}


@torch.library.custom_op("fxopt::attention_and_weights_forward", mutates_args=(), device_types="cpu")
def attention_and_weights_forward(
    q: Tensor, k: Tensor, v: Tensor, captures: Sequence[Tensor], spec: str, wants: str, config: str, with_lse: bool
) -> list[Tensor]:
    """Attention as ``fxopt::attention`` means it and what is wanted of its weights, by kernels of one configuration.

    Args:
        q: ``[B, H, S, D]``, any strides.
        k: ``[B, G, T, D]``, any strides.
        v: ``[B, G, T, E]``, any strides.
        captures: the captured tensors, any strides.
        spec: the printed `AttentionSpec`, without dropout.
        wants: what is wanted of the weights, as `fxopt.codegen.attention.weights.wants` prints it.
        config: the configuration of the attention, ``|`` and one for each want, by which a walk over the scores gives
            it from the attention's log-sum-exp, separated by commas; or that of a kernel for few keys alone, which
            writes all in one pass.
        with_lse: whether to return the log-sum-exp of the logits.

    Returns:
        ``out [B, H, S, E]`` as the specification lays it out, ``lse [B, H, S]`` in float32 (empty without
        ``with_lse``), and each want, contiguous.

    Raises:
        LoweringError: the kernels cannot serve the specification or the operands.
    """
    meaning = reference.specification(spec)
    out, lse = attention_forward(q, k, v, captures, spec, config_of(config), with_lse)
    weights_BHST = reference.weights(meaning, reference.logits(meaning, q, k, captures))
    found = (want.of(weights_BHST) for want in read_wants(wants))
    return [out, lse, *(x.clone(memory_format=torch.contiguous_format) for x in found)]


def config_of(config: str) -> str:
    """The configuration of the attention."""
    return config.partition("|")[0]


def walks_of(config: str) -> tuple[str, ...]:
    """The configurations of the walks over the scores, one for each want; none where all is written in one pass."""
    walks = config.partition("|")[2]
    return tuple(walks.split(",")) if walks else ()


def on_cuda(
    q: Tensor, k: Tensor, v: Tensor, captures: Sequence[Tensor], spec: str, wants: str, config: str, with_lse: bool
) -> list[Tensor]:
    """What `attention_and_weights_forward` is on CUDA, without PyTorch's layers around it."""
    walks = walks_of(config)
    if not walks:
        return _in_one_pass(q, k, v, captures, spec, wants, config_of(config), with_lse)
    out, lse = attention_on_cuda(q, k, v, captures, spec, config_of(config), True)
    found = [
        _walked(q, k, captures, lse, spec, want, walk) for want, walk in zip(read_wants(wants), walks, strict=True)
    ]
    return [out, lse if with_lse else lse.new_empty(0), *found]


attention_and_weights_forward.register_kernel("cuda")(on_cuda)


def _in_one_pass(
    q: Tensor, k: Tensor, v: Tensor, captures: Sequence[Tensor], spec: str, wants: str, config: str, with_lse: bool
) -> list[Tensor]:
    operands = (q, k, v, *captures)
    key = (spec, wants, config, with_lse, precision(q.dtype), *layouts(operands))
    replay = None if only_compiles() else _REPLAYS.get(key)
    # A replay runs on the current device.
    if replay is not None and q.get_device() == torch.cuda.current_device():
        return list(replay(operands))
    checked(q, k, v, captures, spec)
    kernel = module(spec, q.shape[3], v.shape[3], q.dtype, split_config(config)[0], wants)
    launch = partial(launcher(kernel), q, k, v, captures, with_lse)
    if only_compiles():
        return list(launch())
    results, replay = record(kernel, launch, operands)
    remember(_REPLAYS, key, replay)
    return list(results)


@lru_cache(maxsize=1024)
def module(spec: str, head_dim: int, value_dim: int, dtype: torch.dtype, config: str, wants: str) -> ModuleType:
    """The generated module that writes output and ``wants`` in one pass, from the source cache."""
    return import_source(KIND, source_of(spec, head_dim, value_dim, dtype, config, wants))


def source_of(spec: str, head_dim: int, value_dim: int, dtype: torch.dtype, config: str, wants: str) -> str:
    """The source of that module, for printed ``spec``, ``config`` and ``wants``."""
    forward, asked = split_config(config)[0], read_wants(wants)
    return short.source(reference.specification(spec), head_dim, value_dim, dtype, forward, wants=asked)


def _walked(
    q: Tensor, k: Tensor, captures: Sequence[Tensor], lse: Tensor, spec: str, want: Want, config: str
) -> Tensor:
    text, taken = text_of_want(spec, want, q.shape[2]), want.captures(reference.specification(spec), captures)
    if want.rows is not None:
        q, lse = q[:, :, want.cut], lse[:, :, want.cut]
    return operator.walk(q, k, taken, text, want.kind, config, lse)


@attention_and_weights_forward.register_fake
def _fake(
    q: Tensor, k: Tensor, v: Tensor, captures: Sequence[Tensor], spec: str, wants: str, config: str, with_lse: bool
) -> list[Tensor]:
    out = reference.empty_result(q, k, v, captures, spec)
    lse = q.new_empty(q.shape[:3] if with_lse else (0,), dtype=torch.float32)
    return [out, lse, *(q.new_empty(want.size(q, k), dtype=want.dtype) for want in read_wants(wants))]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    q, k, v, captures, spec, wants, config, with_lse = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output[:2], *captures)
    ctx.spec, ctx.wants, ctx.with_lse, ctx.config = spec, wants, with_lse, split_config(config_of(config))[1]


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    q, k, v, out, lse, *captures = ctx.saved_tensors
    grad_out, grad_lse, *grads_found = grads
    wanted = [bool(need) for need in ctx.needs_input_grad[3]]
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grad_lse = grad_lse if ctx.with_lse else None
    known = (q, k, v, captures, out, lse)
    dq, dk, dv, changing = pulled_back(*known, grad_out, grad_lse, wanted, ctx.spec, ctx.config)
    spec = reference.specification(ctx.spec)
    for want, grad in zip(read_wants(ctx.wants), grads_found, strict=True):
        if grad is None:
            continue
        more_q, more_k, more = backward.gradients(spec, q, k, captures, wanted, want, grad)
        dq, dk = dq + more_q, dk + more_k
        changing = [a if a is None or b is None else a + b for a, b in zip(changing, more, strict=True)]
    return dq, dk, dv, changing, None, None, None, None


attention_and_weights_forward.register_autograd(_backward, setup_context=_setup_context)
bare("attention_and_weights_forward", on_cuda, _fake, attention_and_weights_forward)
