"""A linear layer, an activation and a second linear layer become one operator, with the residual that is added."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch.fx import Node

from fxopt.analysis.effects import disturbance
from fxopt.ir.nodes import arguments, is_tensor, same_shape, shape, tensor
from fxopt.ir.operators import overload
from fxopt.ir.program import Program
from fxopt.ir.site import Tier
from fxopt.rewriter.builder import Builder
from fxopt.rewriter.passes import PassResult, apply_rules
from fxopt.rewriter.pattern import Anything, Literal, Match, OneOf, Op, Optional, Pattern, Var, behind_identities
from fxopt.rewriter.registry import register_pass
from fxopt.rewriter.rule import Rejection, Rule

aten = torch.ops.aten


@dataclass(frozen=True)
class Found:
    """The operands of a feed-forward block, in the order of ``fxopt::mlp``."""

    x: Node
    up: Node
    up_bias: Node | None
    down: Node
    down_bias: Node | None
    residual: Node | None
    activation: str


_FIRST: Final = Op(aten.linear.default, Var("x"), Var("up"), bias=Anything(), name="first")
#: Activations by the name that ``fxopt.mlp`` knows them by.
_ACTIVATIONS: Final[dict[str, Pattern]] = {
    "silu": Op(aten.silu.default, _FIRST, name="silu"),
    "gelu": Op(aten.gelu.default, _FIRST, name="gelu"),
    "gelu_tanh": Op(aten.gelu.default, _FIRST, approximate=Literal("tanh"), name="gelu_tanh"),
    "relu": Op(aten.relu.default, _FIRST, name="relu"),
    "sigmoid": Op(aten.sigmoid.default, _FIRST, name="sigmoid"),
}


def _dropped(hidden: Pattern) -> Pattern:
    return Op(aten.dropout.default, hidden, p=Anything(), train=Anything(), name="dropout")


def _detached(hidden: Pattern) -> Pattern:
    return Op(aten.detach.default, hidden, name="detached")


_HIDDEN: Final = Optional(_detached, Optional(_dropped, OneOf(tuple(_ACTIVATIONS.values()))))
_BLOCK: Final = Op(aten.linear.default, _HIDDEN, Var("down"), bias=Anything(), name="second")


def _check(match: Match) -> Found | Rejection:
    name = next(name for name in _ACTIVATIONS if match.get(name) is not None)
    first, activation, second = match["first"], match[name], match["second"]
    residual = match.get("residual")
    biases = [behind_identities(arguments(layer)["bias"]) for layer in (first, second)]
    found = Found(match["x"], match["up"], biases[0], match["down"], biases[1], residual, name)
    nodes = (match.root, first, activation, second)
    if match.get("dropout") is not None:
        return Rejection("dropout is active on the hidden elements", (match["dropout"], *nodes))
    if match.get("detached") is not None:
        return Rejection("no gradient may flow into the hidden elements", (match["detached"], *nodes))
    objection = _elsewhere(first, activation) or _layers_objection(found, second)
    disturbing = disturbance(first, match.root)
    if objection is None and disturbing is not None:
        objection = f"{disturbing} stands inside the block and may change what it reads or whether it learns"
    return Rejection(objection, nodes) if objection else found


def _elsewhere(*hidden: Node) -> str | None:
    """Who else reads hidden elements, as a sentence, if anybody does."""
    for node in hidden:
        if len(node.users) > 1:
            return f"the hidden elements {node} are read by {', '.join(map(str, node.users))}"
    return None


def _layers_objection(found: Found, second: Node) -> str | None:
    given = [found.x, found.up, found.up_bias, found.down, found.down_bias, found.residual, second]
    dtypes = dict.fromkeys(tensor(node).dtype for node in given if node is not None)
    if len(dtypes) > 1:
        return f"it is computed in several dtypes: {', '.join(map(str, dtypes))}"
    if len(shape(found.up)) != 2 or len(shape(found.down)) != 2:
        return "a weight is no matrix"
    for weight, bias in ((found.up, found.up_bias), (found.down, found.down_bias)):
        if bias is not None and not same_shape(shape(bias), shape(weight)[:1]):
            return f"the bias {bias} has the shape {list(shape(bias))} for {shape(weight)[0]} elements"
    return None


def _check_with_residual(match: Match) -> Found | Rejection | None:
    """The block with what is added to it; ``None`` leaves it to the rule without."""
    second, residual = match["second"], match["residual"]
    alone = list(second.users) == [match.root] and residual is not second
    if not alone or not is_tensor(residual) or not same_shape(shape(residual), shape(second)):
        return None
    found = _check(match)
    return None if isinstance(found, Rejection) else found


def _write(builder: Builder, found: Found) -> Node:
    operands = (found.x, found.up, found.up_bias, found.down, found.down_bias, found.residual)
    return builder.call(overload("mlp"), *operands, found.activation)


RULES = (
    Rule(
        name="mlp-residual",
        patterns={
            "linear(activation(linear(x))) + residual": Op(aten.add.Tensor, _BLOCK, Var("residual"), commutative=True)
        },
        check=_check_with_residual,
        rewrite=_write,
        describe=lambda found: found.activation,
        kind="mlp",
    ),
    Rule(
        name="mlp",
        patterns={"linear(activation(linear(x)))": _BLOCK},
        check=_check,
        rewrite=_write,
        describe=lambda found: found.activation,
        kind="mlp",
    ),
)


@register_pass
@dataclass(frozen=True)
class FuseMlp:
    """``linear(activation(linear(x))) + residual -> fxopt.mlp``, with or without the residual.

    The activation is GELU (exact or tanh), SiLU, ReLU or the sigmoid, written out or not; biases may be absent, and
    weights be any matrices of the graph. A sum of the same shape that alone reads the block goes with it; of any other
    reader the block stays apart. Hidden elements that are read elsewhere, dropout that is active on them, several
    dtypes (autocast), and anything inside the block that writes into a tensor or switches a mode keep the layers as
    they are. Gated units (`glu`) are another operator.

    What it runs as is measured, in inference on a GPU, for rows of up to 192 elements: a generated kernel in which
    hidden elements never reach memory, where that is faster than the base compiler's products; else the layers as they
    were. It is not among the default passes, since it compiles both ways where it measures. Name it behind them:
    ``passes=[*fxopt.passes.exact_pipeline(), "fuse-mlp"]``. A frozen program (`fxopt.rewrite` in evaluation mode) is
    not lowered and stays.

    Exact: the same operations in the same dtypes.
    """

    name: ClassVar[str] = "fuse-mlp"
    tier: ClassVar[Tier] = "exact"
    requires: ClassVar[tuple[str, ...]] = ("no-ops", "inactive-dropout", "gelu", "silu")

    def run(self, program: Program) -> PassResult:
        """Fuse them."""
        return PassResult(False) if program.frozen else apply_rules(program, RULES)
