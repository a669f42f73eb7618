"""Metadata of nodes: running an operation on the fake values of its operands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode

from fxopt.ir.alike import Unlike, likeness, metadata
from fxopt.ir.autocast import autocast_at
from fxopt.ir.operators import quick_result

#: Key of the metadata that keeps the operand values from which a node's own value was computed.
COMPUTED_FROM: Final = "fxopt_computed_from"

#: The attribute of a fake mode that keeps results of calls by what they depend on. They hold the mode themselves: kept
#: anywhere else, neither would ever be freed.
_RESULTS: Final = "fxopt_results"


def evaluate_fake(node: fx.Node, mode: FakeTensorMode | None) -> Any:
    """What ``node`` computes on the fake values of its operands."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    assert callable(node.target)
    with autocast_at(node):
        return call_fake(node.target, args, kwargs, mode)


def call_fake(
    target: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], mode: FakeTensorMode | None
) -> Any:
    """``target`` on fake values. Calls alike, on static sizes, are run once and share the value."""
    known: dict[Any, Any] = vars(mode).setdefault(_RESULTS, {}) if mode is not None else {}
    try:
        key = target, _switches(), likeness(args, metadata), likeness(dict(kwargs), metadata)
        if key in known:
            return known[key]
        value = _run(target, args, kwargs, mode)
    except Unlike:
        return _run(target, args, kwargs, mode)
    if _is_static(value):
        known[key] = value
    return value


def _switches() -> tuple[Any, ...]:
    """What results depend on besides operands."""
    casts = tuple((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda"))
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(), casts


def _is_static(value: Any) -> bool:
    """Whether no size of a result is one of its own, as that of ``nonzero`` is."""
    try:
        likeness(value, metadata)
    except Unlike:
        return False
    return True


def _run(
    target: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], mode: FakeTensorMode | None
) -> Any:
    with mode or torch.no_grad(), enable_python_dispatcher():
        return (quick_result(target) or target)(*args, **kwargs)


def operand_values(node: fx.Node) -> tuple[Any, ...]:
    """The recorded values of the operands of ``node``, in order."""
    return tuple(operand.meta.get("val") for operand in node.all_input_nodes)


def is_computed(node: fx.Node) -> bool:
    """Whether the value of ``node`` was computed from exactly the values that its operands have now."""
    recorded = node.meta.get(COMPUTED_FROM)
    current = operand_values(node)
    return (
        recorded is not None
        and len(recorded) == len(current)
        and all(a is b for a, b in zip(recorded, current, strict=True))
    )
