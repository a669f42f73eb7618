"""The gate of a gated linear unit becomes one operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch.fx import Node

from fxopt.ir.nodes import is_call, same_shape, shape
from fxopt.ir.operators import overload
from fxopt.ir.program import Program
from fxopt.ir.site import Tier
from fxopt.rewriter.builder import Builder
from fxopt.rewriter.passes import PassResult, apply_rules
from fxopt.rewriter.pattern import Literal, Match, Op, Pattern, Var, behind_identities
from fxopt.rewriter.registry import register_pass
from fxopt.rewriter.rule import Rejection, Rule
from fxopt.rewriter.sections import read_section

aten = torch.ops.aten

_GATE = Var("gate")
#: Activations by the name that ``fxopt.glu`` knows them by.
_ACTIVATIONS: Final[dict[str, Pattern]] = {
    "silu": Op(aten.silu.default, _GATE),
    "gelu": Op(aten.gelu.default, _GATE),
    "gelu_tanh": Op(aten.gelu.default, _GATE, approximate=Literal("tanh")),
    "relu": Op(aten.relu.default, _GATE),
    "sigmoid": Op(aten.sigmoid.default, _GATE),
}
#: Linear maps of their operand with this index.
_LINEARS: Final = {
    aten.linear.default: 0,
    aten.matmul.default: 0,
    aten.mm.default: 0,
    aten.bmm.default: 0,
    aten.addmm.default: 1,
}
_VIEWS: Final = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


@dataclass(frozen=True)
class _Gate:
    gate: Node
    up: Node
    activation: str


def _check(activation: str) -> Callable[[Match], _Gate | Rejection]:
    def check(match: Match) -> _Gate | Rejection:
        gate, up = match["gate"], match["up"]
        if not same_shape(shape(gate), shape(up)):
            return Rejection(f"the gate {shape(gate)} and what it gates {shape(up)} differ in shape", (gate, up))
        if not _are_linears_of_one_input(gate, up):
            return Rejection(
                "gate and gated value are neither linears of one input nor halves of one linear", (gate, up)
            )
        return _Gate(gate, up, activation)

    return check


def _are_linears_of_one_input(gate: Node, up: Node) -> bool:
    """Whether both are linear maps of the same value, or the two halves of one."""
    a, b = read_section(gate), read_section(up)
    if a is None or b is None:
        given = _linear_input(gate)
        return given is not None and given is _linear_input(up)
    first, second = sorted((a, b), key=lambda section: section.start)
    length = first.stop
    cut = (first.start, second.start, second.stop) == (0, length, 2 * length) and first.step == second.step == 1
    return cut and a.base is b.base and a.axis == b.axis == -1 and _linear_input(a.base) is not None


def _linear_input(node: Node) -> Node | None:
    """What ``node`` is a linear map of, views aside."""
    producer = _behind_views(node)
    index = _LINEARS.get(producer.target) if is_call(producer, *_LINEARS) else None  # type: ignore[call-overload]
    return None if index is None else _behind_views(producer.args[index])


def _behind_views(node: object) -> Node:
    value = behind_identities(node)
    while is_call(value, *_VIEWS):
        value = behind_identities(value.args[0])
    assert isinstance(value, Node)
    return value


def build_glu(builder: Builder, found: _Gate) -> Node:
    """``fxopt.glu(gate, up, activation)``."""
    return builder.call(overload("glu"), found.gate, found.up, found.activation)


RULES = tuple(
    Rule(
        name=activation.replace("_", "-"),
        patterns={f"{activation}(gate) * up": Op(aten.mul.Tensor, applied, Var("up"), commutative=True)},
        check=_check(activation),
        rewrite=build_glu,
        kind="mlp",
    )
    for activation, applied in _ACTIVATIONS.items()
)


@register_pass
@dataclass(frozen=True)
class Glu:
    """``activation(gate) * up -> fxopt.glu(gate, up, activation)``.

    ``gate`` and ``up`` are two linears of the same input (Llama, T5 v1.1), or the two halves of one (packed
    projections), and the activation is SiLU, GELU (exact or tanh), ReLU or the sigmoid. Exact: the same two operations.
    Any other product with an activation is not a gated linear unit and stays.
    """

    name: ClassVar[str] = "glu"
    tier: ClassVar[Tier] = "exact"
    requires: ClassVar[tuple[str, ...]] = ("gelu", "silu")

    def run(self, program: Program) -> PassResult:
        """Rewrite them."""
        return apply_rules(program, RULES)
