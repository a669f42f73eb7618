"""The families of generated backwards, and the one that a printed configuration belongs to.

That of Hopper has ``hopper:`` in front of its configurations (``hopper:64x128s2``), the portable one nothing
(``64x128w8s2-128x64w8s2``). The portable one serves wherever any does, and always in deterministic mode.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fxopt.codegen.attention.backward import kernel as portable
from fxopt.codegen.attention.backward.hopper import kernel as hopper
from fxopt.codegen.attention.backward.hopper.config import is_hopper
from fxopt.codegen.attention.problem import Problem
from fxopt.ir.attention import AttentionSpec

#: Configurations measured for a site.
_TRIED = 3


def candidates(problem: Problem, wanted: Sequence[bool] = ()) -> tuple[tuple[str, ...], dict[str, str]]:
    """The printed configurations worth measuring, best guess first, at most three; and why a family can't serve.

    The reasons are kept by family, ``""`` for the portable one. ``wanted`` says which captured tensors may need a
    gradient.
    """
    refused: dict[str, str] = {}
    reason = hopper.flow_objection(problem.spec, wanted) or hopper.objection_to(problem)
    if reason is not None:
        refused["hopper"] = reason
    found = [] if reason else [str(config) for config in hopper.candidates(problem)]
    general = [str(config) for config in portable.candidates(problem)]
    if not general:
        sizes = (problem.spec, problem.head_dim, problem.value_dim, problem.dtype)
        refused[""] = portable.objection(*sizes) or "no configuration of the backward fits the device"
    # Two of a family at most: the portable one stays among them.
    return tuple((*found[:2], *general[:2])[:_TRIED]), refused


def can_run(spec: AttentionSpec, config: str, wanted: Sequence[bool]) -> bool:
    """Whether a configuration may run now: sums in any order are out in deterministic mode."""
    if not is_hopper(config):
        return True
    return hopper.order_objection() is None and hopper.flow_objection(spec, wanted) is None


def source(
    spec: AttentionSpec, head_dim: int, value_dim: int, dtype: torch.dtype, config: str, wanted: Sequence[bool]
) -> str:
    """The source of the module of one configuration; the same arguments always give the same text.

    Raises:
        LoweringError: the kernels can't be generated.
    """
    if is_hopper(config):
        return hopper.source(spec, head_dim, value_dim, dtype, config, wanted)
    return portable.source(spec, head_dim, value_dim, dtype, portable.read_backward(config), wanted)
