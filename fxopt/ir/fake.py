"""Metadata of nodes: running an operation on the fake values of its operands."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode

from fxopt.ir.operators import quick_result

#: Key of the metadata that keeps the operand values from which a node's own value was computed.
COMPUTED_FROM: Final = "fxopt_computed_from"


def evaluate_fake(node: fx.Node, mode: FakeTensorMode | None) -> Any:
    """What ``node`` computes on the fake values of its operands."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    assert callable(node.target)
    function = quick_result(node.target) or node.target
    with mode or torch.no_grad(), enable_python_dispatcher():
        return function(*args, **kwargs)


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
