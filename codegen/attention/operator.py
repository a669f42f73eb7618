"""``fxopt::attention_forward``: an attention by a generated Triton kernel, as a PyTorch operator.

On CUDA it runs the kernel, on the CPU the same maths in plain PyTorch; it has fake and autograd implementations, so it
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
from fxopt.codegen.attention.backward.operator import attention_backward
from fxopt.codegen.attention.backward.recompute import gradients
from fxopt.codegen.attention.kernels import family, source
from fxopt.codegen.attention.portable.config import widened
from fxopt.codegen.attention.portable.kernel import KIND, objection
from fxopt.codegen.building import launcher, only_compiles
from fxopt.codegen.launching import bare
from fxopt.codegen.replay import Replay, layouts, precision, record, remember
from fxopt.errors import LoweringError
from fxopt.ir.attention import AttentionSpec

#: Launches to repeat, by specification, configuration and layouts of the operands.
_REPLAYS: Final[dict[tuple[object, ...], Replay]] = {}


@torch.library.custom_op("fxopt::attention_forward", mutates_args=(), device_types="cpu")
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: Sequence[Tensor],
    spec: str,
    config: str,
    with_lse: bool,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention as ``fxopt::attention`` means it, by the generated kernel of one configuration.

    Args:
        q: ``[B, H, S, D]``, any strides.
        k: ``[B, G, T, D]``, any strides.
        v: ``[B, G, T, E]``, any strides.
        captures: the captured tensors, any strides.
        spec: the printed `AttentionSpec`.
        config: the printed configuration, followed by ``/`` and that of the backward where it is not to be the first
            that fits.
        with_lse: whether to return the log-sum-exp of the logits.
        seed: ``[1]``, int64: with dropout, and only then, what tells which weights are dropped.

    Returns:
        ``out [B, H, S, E]`` as the specification lays it out, and ``lse [B, H, S]`` in float32 (empty without
        ``with_lse``).

    Raises:
        LoweringError: the kernel cannot serve the specification or the operands.
    """
    meaning = checked(q, k, v, captures, spec, seed)
    logits_BHST = reference.logits(meaning, q, k, captures)
    out = reference.attended(meaning, logits_BHST, q, v, seed)
    lse = torch.logsumexp(logits_BHST, -1) if with_lse else q.new_empty(0)
    return out, lse.float()


@attention_forward.register_kernel("cuda")
def on_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: Sequence[Tensor],
    spec: str,
    config: str,
    with_lse: bool,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What `attention_forward` is on CUDA, without PyTorch's layers around it."""
    operands = (q, k, v, *captures) if seed is None else (q, k, v, *captures, seed)
    key = (spec, config, with_lse, precision(q.dtype), *layouts(operands))
    replay = None if only_compiles() else _REPLAYS.get(key)
    # A replay runs on the current device.
    if replay is not None and q.get_device() == torch.cuda.current_device():
        out, lse = replay(operands)
        return out, lse
    return _recorded(key, q, k, v, captures, spec, config, with_lse, seed)


def _recorded(
    key: tuple[object, ...],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: Sequence[Tensor],
    spec: str,
    config: str,
    with_lse: bool,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    meaning = checked(q, k, v, captures, spec, seed)
    config, width = split_config(config)[0], v.shape[3]
    v = widened(v, q.shape[3]) if family(config).pads_values else v
    kernel = module(spec, q.shape[3], v.shape[3], q.dtype, config)
    seeded = {} if seed is None else {"seed": seed}
    launch = partial(launcher(kernel), q, k, v, captures, with_lse, **seeded)
    operands = (q, k, v, *captures, *seeded.values())
    (out, lse), replay = (launch(), None) if only_compiles() else record(kernel, launch, operands)
    if v.shape[3] != width:
        return reference.lay_out(meaning, out[..., :width]), lse
    remember(_REPLAYS, key, replay)
    return out, lse


@lru_cache(maxsize=1024)
def module(spec: str, head_dim: int, value_dim: int, dtype: torch.dtype, config: str) -> ModuleType:
    """The generated module for printed ``spec`` and ``config``, from the source cache."""
    return import_source(KIND, source_of(spec, head_dim, value_dim, dtype, config))


def source_of(spec: str, head_dim: int, value_dim: int, dtype: torch.dtype, config: str) -> str:
    """The source that ``attention_forward`` runs for printed ``spec`` and ``config``."""
    return source(reference.specification(spec), head_dim, value_dim, dtype, split_config(config)[0])


@attention_forward.register_fake
def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: Sequence[Tensor],
    spec: str,
    config: str,
    with_lse: bool,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    checked(q, k, v, captures, spec, seed)
    out = reference.empty_result(q, k, v, captures, spec)
    return out, q.new_empty(q.shape[:3] if with_lse else (0,), dtype=torch.float32)


def checked(
    q: Tensor, k: Tensor, v: Tensor, captures: Sequence[Tensor], spec: str, seed: Tensor | None = None
) -> AttentionSpec:
    """The specification; raises `LoweringError` where the kernels can't serve it or the operands."""
    meaning = reference.specification(spec)
    if (seed is None) != (meaning.dropout == 0):
        raise LoweringError(f"dropout {meaning.dropout} {'needs a' if seed is None else 'has no'} seed ({meaning})")
    devices = {x.device for x in (q, k, v, *captures, *(() if seed is None else (seed,)))}
    if not q.dtype == k.dtype == v.dtype or len(devices) > 1:
        shown = ", ".join(f"{x.dtype} on {x.device}" for x in (q, k, v))
        raise LoweringError(f"attention operands must share dtype and device, found {shown}; lower it to ATen instead")
    reference.check_captures(meaning, captures, (*q.shape[:3], k.shape[2]))
    reason = _objection(spec, q.shape[3], v.shape[3], q.dtype)
    # Elsewhere than on CUDA no kernel is generated, and float64 serves as an oracle.
    if reason is not None and q.is_cuda:
        raise LoweringError(f"no Triton kernel for this attention: {reason}; lower it to ATen instead ({meaning})")
    return meaning


def _objection(spec: str, head_dim: int, value_dim: int, dtype: torch.dtype) -> str | None:
    """`objection` to a printed specification, which every call asks for: looked up, unless sizes are symbolic."""
    known = isinstance(head_dim, int) and isinstance(value_dim, int)
    asked = _known_objection if known else _known_objection.__wrapped__
    return asked(spec, head_dim, value_dim, dtype)


@lru_cache(maxsize=1024)
def _known_objection(spec: str, head_dim: int, value_dim: int, dtype: torch.dtype) -> str | None:
    return objection(reference.specification(spec), head_dim, value_dim, dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, captures, spec, config, with_lse, seed = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, seed, *captures)
    ctx.spec, ctx.with_lse, ctx.config = spec, with_lse, split_config(config)[1]


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, seed, *captures = ctx.saved_tensors
    wanted = [bool(need) for need in ctx.needs_input_grad[3]]
    # As many as arguments were given: the last one may have been left out.
    constants = (None,) * (len(ctx.needs_input_grad) - 4)
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grad_lse = grad_lse if ctx.with_lse else None
    known = (q, k, v, captures, out, lse)
    return (*pulled_back(*known, grad_out, grad_lse, wanted, ctx.spec, ctx.config, seed), *constants)


def pulled_back(
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
) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:
    """The gradients of queries, keys, values and of the captures that are ``wanted`` (``None`` for the others); the
    arguments are those of ``fxopt::attention_backward``.
    """
    if torch.is_grad_enabled():
        # Gradients that are differentiated again need operations that can be.
        meaning = reference.specification(spec)
        return gradients(meaning, q, k, v, captures, wanted, grad_out, grad_lse, seed)
    known = (q, k, v, captures, out, lse)
    dq, dk, dv, *found = attention_backward(*known, grad_out, grad_lse, wanted, spec, config, seed)
    rest = iter(found)
    return dq, dk, dv, [next(rest) if want else None for want in wanted]


attention_forward.register_autograd(_backward, setup_context=_setup_context)
bare("attention_forward", on_cuda, _fake, attention_forward)
