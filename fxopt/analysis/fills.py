"""Tensors that may hold stand-ins for −inf, such as additive masks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

import torch
from torch import fx

from fxopt.analysis.constants import Constants
from fxopt.ir.expression import const
from fxopt.ir.nodes import is_call, is_tensor, tensor

aten = torch.ops.aten

_DTYPES: Final = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: What masks write, or add, where they hide a key: −inf and the lowest finite numbers.
FILLS: Final = (const(-math.inf), *(const(torch.finfo(dtype).min) for dtype in _DTYPES))
#: What these give is content: products of activations and weights, and entries of learned tables.
_CONTENT: Final = (
    aten.matmul.default, aten.linear.default, aten.embedding.default, aten.convolution.default,
)  # fmt: skip


def may_hold_fill(node: fx.Node, limit: float, constants: Constants) -> bool:
    """Whether ``node`` may hold numbers of size ``limit`` by design: it reads such a literal, a constant that holds
    one, or a real input of the program that no contraction or table lies in front of.
    """
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        if not is_tensor(current) or not tensor(current).dtype.is_floating_point or is_call(current, *_CONTENT):
            continue
        if current.op == "placeholder" or _is_large(current, limit, constants):
            return True
        fresh = [n for n in current.all_input_nodes if n not in seen]
        seen.update(fresh)
        pending.extend(fresh)
    return False


def literals(node: fx.Node) -> Iterator[float]:
    """The numbers written in the code that computes ``node`` from content and inputs."""
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        if not is_tensor(current) or not tensor(current).dtype.is_floating_point or is_call(current, *_CONTENT):
            continue
        yield from (float(a) for a in (*current.args, *current.kwargs.values()) if isinstance(a, int | float))
        fresh = [n for n in current.all_input_nodes if n not in seen]
        seen.update(fresh)
        pending.extend(fresh)


def _is_large(node: fx.Node, limit: float, constants: Constants) -> bool:
    """Whether a literal operand of ``node``, or its value where it is constant, reaches ``limit``."""
    literals = (a for a in (*node.args, *node.kwargs.values()) if isinstance(a, int | float))
    if any(abs(a) >= limit for a in literals):
        return True
    value = constants.value(node)
    return isinstance(value, torch.Tensor) and value.numel() > 0 and bool((value.abs() >= limit).any())
