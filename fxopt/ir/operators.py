"""The canonical operators: one operation for many spellings.

Each is a PyTorch operator in the namespace ``fxopt``, so a rewritten graph is an ordinary FX graph. Its meaning is the
plain PyTorch function registered by `define_meaning` (``codegen/<kind>/reference.py``); the operator decomposes into
that function wherever nothing better was chosen for it, under autograd, fake tensors, export and AOTAutograd alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch

NAMESPACE: Final = "fxopt"
_LIBRARY: Final = torch.library.Library(NAMESPACE, "DEF")  # noqa: TOR901 - lives as long as the process

#: Schema of every canonical operator. Legend of the shapes: see the reference of each.
SCHEMAS: Final[dict[str, str]] = {
    "attention": "(Tensor q, Tensor k, Tensor v, Tensor[] captures, str spec) -> Tensor",
    "attention_with_lse": "(Tensor q, Tensor k, Tensor v, Tensor[] captures, str spec) -> (Tensor, Tensor)",
    "attention_sdpa": "(Tensor q, Tensor k, Tensor v, Tensor[] captures, str spec, str backend) -> Tensor",
    "attention_weights": "(Tensor q, Tensor k, Tensor[] captures, str spec) -> Tensor",
    "attention_statistics": "(Tensor q, Tensor k, Tensor[] captures, str spec, str kind) -> Tensor",
    "attention_values": "(Tensor weights, Tensor v, str spec) -> Tensor",
    "linear_attention": "(Tensor q, Tensor k, Tensor v, Tensor? positions, Tensor? keep, Tensor? weight, Tensor? bias, "
    "str spec) -> Tensor",
    "layer_norm": "(Tensor x, int axes, Tensor? weight, Tensor? bias, float eps, ScalarType dtype, "
    "bool scale_after_cast) -> Tensor",
    "rms_norm": "(Tensor x, int axes, Tensor? weight, float eps, ScalarType dtype, bool scale_after_cast) -> Tensor",
    "residual_layer_norm": "(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, ScalarType dtype, "
    "bool scale_after_cast) -> (Tensor, Tensor)",
    "residual_rms_norm": "(Tensor x, Tensor residual, Tensor? weight, float eps, ScalarType dtype, "
    "bool scale_after_cast) -> (Tensor, Tensor)",
    "glu": "(Tensor gate, Tensor up, str activation) -> Tensor",
    "mlp": "(Tensor x, Tensor up, Tensor? up_bias, Tensor down, Tensor? down_bias, Tensor? residual, "
    "str activation) -> Tensor",
    "rotary": "(Tensor x, Tensor cos, Tensor sin, bool interleaved) -> Tensor",
    "repeat_heads": "(Tensor x, SymInt count, str order) -> Tensor",
}


def _declare() -> None:
    for name, schema in SCHEMAS.items():
        _LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))


_RESULTS: Final[dict[object, Callable[..., Any]]] = {}


def define_meaning(name: str, function: Callable[..., Any], result: Callable[..., Any] | None = None) -> None:
    """Register ``function`` as the decomposition of the canonical operator ``name`` (once per process).

    ``result``, if given, makes an empty result from the same arguments: same shape, dtype and strides, without the
    work.
    """
    if name not in SCHEMAS:
        raise KeyError(f"{name!r} is not a canonical operator; they are {', '.join(SCHEMAS)}")
    _LIBRARY.impl(name, function, "CompositeImplicitAutograd")
    if result is not None:
        _RESULTS[overload(name)] = result


def quick_result(target: object) -> Callable[..., Any] | None:
    """What computes an empty result of the operator ``target`` more cheaply than running it on fake tensors."""
    return _RESULTS.get(target)


def overload(name: str) -> torch._ops.OpOverload:
    """The operator ``fxopt::name`` as it stands in graph nodes."""
    packet: torch._ops.OpOverloadPacket = getattr(torch.ops.fxopt, name)
    return packet.default


_declare()
