"""An attention through one of PyTorch's own fused kernels, called by name so that what runs is what was chosen.

``scaled_dot_product_attention`` picks a kernel at run time, and compilers decompose it into unfused float32 products
where a mask is given; here the kernel is part of the program.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fxopt.analysis.simplify import simplify
from fxopt.codegen.attention import reference
from fxopt.codegen.expression import evaluate, gradient
from fxopt.errors import LoweringError
from fxopt.ir.attention import AttentionSpec
from fxopt.ir.expression import Expr, I, J, S, call, const, parse
from fxopt.ir.operators import define_meaning

aten = torch.ops.aten

#: The kernels by name, with the device type they run on. ``flash`` and ``cudnn`` take no bias here.
BACKENDS: Final[dict[str, str]] = {"cudnn": "cuda", "flash": "cuda", "efficient": "cuda", "cpu": "cpu"}
_HALF: Final = (torch.bfloat16, torch.float16)
_DTYPES: Final = {"cudnn": _HALF, "flash": _HALF, "efficient": (*_HALF, torch.float32),
                  "cpu": (*_HALF, torch.float32, torch.float64)}  # fmt: skip
#: Why a kernel can't drop weights; the others drop each with its probability.
_DROPOUT: Final = {
    "cpu": "it has no dropout",
    "flash": "it rounds the probability of dropout to 8 bits, but not the scale of what it keeps",
    "cudnn": "how it rounds the probability of dropout is not known",
}
_CAUSAL: Final = call("le", J, I)


def objection(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, backend: str) -> str | None:
    """Why ``backend`` can't serve the attention, as a sentence, or ``None`` when it can. Operands may be fake."""
    if q.device.type != BACKENDS[backend]:
        return f"{backend} runs on {BACKENDS[backend]}, not on {q.device.type}"
    if not q.dtype == k.dtype == v.dtype or q.dtype not in _DTYPES[backend]:
        return f"{backend} does not take {q.dtype}, {k.dtype}, {v.dtype}"
    if spec.dropout and (backend in _DROPOUT or spec.dropout == 1):
        return _DROPOUT.get(backend, "dropout leaves nothing")
    if linear_form(spec) is None:
        return f"the score {spec.score} is not a multiple of q·k plus a bias"
    if not isinstance(q.shape[3], int) or q.shape[3] != v.shape[3] or (backend != "cpu" and q.shape[3] % 8):
        return f"head dimensions {q.shape[3]} and {v.shape[3]} do not suit {backend}"
    if q.shape[1] != k.shape[1] and spec.kv_map != "group":
        return "heads are shared by tiling"
    return _objection_to_bias(spec, q.dtype, backend) if needs_bias(spec, q, k) else None


def _objection_to_bias(spec: AttentionSpec, dtype: torch.dtype, backend: str) -> str | None:
    if backend in ("cudnn", "flash") or (backend != "cpu" and spec.empty_rows == "nan"):
        return f"{backend} would not treat rows without keys as the model does, or takes no bias"
    if spec.empty_rows == "uniform" and dtype is torch.float16:
        return "the lowest number of float16 does not absorb scores, so rows without keys would not give the mean"
    return None


def linear_form(spec: AttentionSpec) -> tuple[float, Expr] | None:
    """``(a, bias)`` when the score is ``a·s + bias`` with a constant ``a`` and a bias that does not read ``s``."""
    return _linear_form(str(spec.score))


@lru_cache(maxsize=256)
def _linear_form(score: str) -> tuple[float, Expr] | None:
    """By the printed score: equal expressions may hold ``1`` or ``1.0``."""
    expr = parse(score)
    slope = simplify(gradient(expr, S))
    if slope.op != "const" or isinstance(slope.value, str | None):
        return None
    bias = simplify(expr.replace(lambda e: const(0.0) if e == S else e))
    return float(slope.value), bias


def needs_bias(spec: AttentionSpec, q: Tensor, k: Tensor) -> bool:
    """Whether a bias tensor must be built: any bias, or a mask that is not the kernel's own causal one."""
    form = linear_form(spec)
    return form is not None and (form[1] != const(0.0) or (spec.mask is not None and not _is_causal(spec, q, k)))


def _is_causal(spec: AttentionSpec, q: Tensor, k: Tensor) -> bool:
    return spec.mask == _CAUSAL and bool(statically_known_true(q.shape[2] == k.shape[2]))


def attention_sdpa(q: Tensor, k: Tensor, v: Tensor, captures: Sequence[Tensor], spec: str, backend: str) -> Tensor:
    """``fxopt::attention`` by a fused kernel of PyTorch (``"cudnn"``, ``"flash"``, ``"efficient"``, ``"cpu"``).

    Raises:
        LoweringError: the kernel can't serve the attention; `objection` says why.
    """
    meaning = reference.specification(spec)
    reason = objection(meaning, q, k, v, backend)
    form = linear_form(meaning)
    if reason is not None or form is None:
        raise LoweringError(f"{backend} can't run this attention: {reason}")
    bias_BHST = _bias(meaning, form[1], q, k, captures) if needs_bias(meaning, q, k) else None
    causal = meaning.mask is not None and bias_BHST is None
    if q.shape[1] != k.shape[1] and backend in ("cpu", "efficient"):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    q, k, v = (_adjacent(x) for x in (q, k, v))
    bias_BHST = None if bias_BHST is None else _adjacent(bias_BHST)
    out = _KERNELS[backend](q, k, v, bias_BHST, causal, form[0], meaning.dropout)
    if bias_BHST is not None and meaning.empty_rows != "uniform" and reference.may_be_empty(meaning):
        empty_BHS1 = (bias_BHST == -math.inf).all(-1, keepdim=True)
        out = torch.where(empty_BHS1, math.nan if meaning.empty_rows == "nan" else 0.0, out)
    return reference.lay_out(meaning, out)


def _adjacent(x: Tensor) -> Tensor:
    """``x``, copied unless its last axis is adjacent in memory: called by name, the kernels take that for granted."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _bias(spec: AttentionSpec, bias: Expr, q: Tensor, k: Tensor, captures: Sequence[Tensor]) -> Tensor:
    """The additive bias in the dtype of ``q``, of rank 4, broadcast where nothing varies; −inf outside the mask.

    Where a row without keys gives the mean, it is the lowest finite number outside the mask: that absorbs the scores.
    """
    s_1 = q.new_zeros((), dtype=torch.float32).expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    readings = reference.read_captures(spec, captures, s_1)
    env = reference.environment(spec, s_1)
    value: Any = evaluate(bias, env, readings)
    bias_4: Tensor = value if isinstance(value, Tensor) else torch.full((), float(value), device=q.device)
    if spec.mask is not None:
        hidden = torch.finfo(q.dtype).min if spec.empty_rows == "uniform" else -math.inf
        bias_4 = torch.where(reference.kept(spec.mask, env, readings, s_1), bias_4, hidden)
    bias_4 = bias_4.to(q.dtype)[(None,) * (4 - bias_4.dim())]
    return bias_4.expand(-1, -1, q.shape[2], k.shape[2])


def _cpu(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float, dropout: float) -> Tensor:
    return aten._scaled_dot_product_flash_attention_for_cpu.default(  # type: ignore[no-any-return]
        q, k, v, dropout, causal, attn_mask=bias, scale=scale
    )[0]


def _flash(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float, dropout: float) -> Tensor:
    return aten._scaled_dot_product_flash_attention.default(q, k, v, dropout, causal, False, scale=scale)[0]  # type: ignore[no-any-return]


def _cudnn(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float, dropout: float) -> Tensor:
    return aten._scaled_dot_product_cudnn_attention.default(  # type: ignore[no-any-return]
        q, k, v, bias, True, dropout, causal, False, scale=scale
    )[0]


def _efficient(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float, dropout: float
) -> Tensor:
    shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    bias = None if bias is None else bias.expand(shape)
    return aten._scaled_dot_product_efficient_attention.default(  # type: ignore[no-any-return]
        q, k, v, bias, True, dropout, causal, scale=scale
    )[0]


_KERNELS: Final = {"cpu": _cpu, "flash": _flash, "cudnn": _cudnn, "efficient": _efficient}


def _empty_result(q: Tensor, k: Tensor, v: Tensor, captures: Sequence[Tensor], spec: str, backend: str) -> Tensor:
    return reference.empty_result(q, k, v, captures, spec)


define_meaning("attention_sdpa", attention_sdpa, _empty_result)
