"""A residual sum and the norm that reads it become one operator."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch.fx import Node

from fxopt.analysis.effects import disturbance
from fxopt.ir.nodes import arguments, is_call, is_tensor, same_shape, scalar, shape, tensor
from fxopt.ir.operators import overload
from fxopt.ir.program import Program
from fxopt.ir.site import Tier
from fxopt.rewriter.builder import Builder
from fxopt.rewriter.passes import PassResult, apply_rules
from fxopt.rewriter.pattern import Anything, Match, Op, Var, behind_identities, cast_operand
from fxopt.rewriter.registry import register_pass
from fxopt.rewriter.rule import Rejection, Rule

aten = torch.ops.aten

_DROPOUTS: Final = (aten.dropout.default, aten.native_dropout.default)
_ORIGIN: Final[tuple[str, ...]] = ("stack_trace", "nn_module_stack", "source_fn_stack")


@dataclass(frozen=True)
class Found:
    """A sum and its norm: the operands of both, who else reads the sum, and the node that the operator stands before.

    ``settings`` are eps, the dtype that is computed in, and whether weight and bias come after rounding.
    """

    norm: Node
    addition: Node
    weights: tuple[Node | None, ...]
    settings: tuple[float, torch.dtype, bool]
    others: tuple[Node, ...]
    first: Node


def _check(match: Match) -> Found | Rejection | None:
    norm = match.root
    summed = behind_identities(match["sum"])
    between = _between(summed)
    if between is not None:
        return Rejection(between, (norm, summed))
    if not _is_sum(summed):
        return None
    objection = _objection(norm, summed)
    return Rejection(objection, (norm, summed)) if objection else _placed(norm, summed)


def _is_sum(node: object) -> bool:
    return is_call(node, aten.add.Tensor) and isinstance(node, Node) and all(is_tensor(x) for x in node.args[:2])


def _between(summed: object) -> str | None:
    """What stands between a sum and its norm, as a sentence, if anything does that is known to."""
    if is_call(summed, *_DROPOUTS) and isinstance(summed, Node) and _is_sum(behind_identities(summed.args[0])):
        return "dropout is active between the sum and its norm"
    operand = cast_operand(summed)
    if operand is not None and _is_sum(behind_identities(operand)):
        return f"the sum is cast from {tensor(operand).dtype} to {tensor(summed).dtype} before its norm"
    return None


def _objection(norm: Node, addition: Node) -> str | None:
    x, residual = addition.args[:2]
    alpha = scalar(arguments(addition)["alpha"])
    if alpha != 1:
        return f"what is added is multiplied by {alpha}"
    if not same_shape(shape(x), shape(residual)):
        return f"the sum broadcasts {list(shape(x))} against {list(shape(residual))}"
    axes = _axes(norm)
    if axes != 1:
        return f"the norm is over {axes} axes together, a residual norm over the last one"
    disturbing = disturbance(addition, norm)
    if disturbing is not None:
        return f"{disturbing} stands between the sum and its norm and may change what they read or whether they learn"
    return None


def _axes(norm: Node) -> int:
    given = arguments(norm)
    return int(given["axes"]) if "axes" in given else len(given["normalized_shape"])


def _placed(norm: Node, addition: Node) -> Found | Rejection:
    given = arguments(norm)
    weights = tuple(given[name] for name in ("weight", "bias") if name in given)
    others = tuple(user for user in addition.users if user is not norm)
    order = {node: place for place, node in enumerate(norm.graph.nodes)}
    first = min((norm, *others), key=lambda node: order[node])
    late = [node for node in weights if isinstance(node, Node) and order[node] > order[first]]
    if late:
        return Rejection(f"{first} reads the sum before {late[0]}, a weight of its norm, is there", (norm, first))
    return Found(norm, addition, weights, _settings(norm), others, first)


def _settings(norm: Node) -> tuple[float, torch.dtype, bool]:
    given = arguments(norm)
    if "dtype" in given:
        return given["eps"], given["dtype"], given["scale_after_cast"]
    return given["eps"], torch.promote_types(tensor(norm).dtype, torch.float32), False


def _write(builder: Builder, found: Found) -> Node:
    name = "residual_rms_norm" if is_call(found.norm, overload("rms_norm")) else "residual_layer_norm"
    origin: dict[str, Any] = {key: found.norm.meta[key] for key in _ORIGIN if key in found.norm.meta}
    with builder.before(found.first):
        both = builder.call(overload(name), *found.addition.args[:2], *found.weights, *found.settings)
        normal = builder.call(operator.getitem, both, 0)
        created = [both, normal]
        if found.others:
            created.append(builder.call(operator.getitem, both, 1))
            builder.also(found.addition, created[-1], "sum")
    for node in created:
        node.meta.update(origin)
    return normal


_ARGUMENTS: Final = {
    aten.layer_norm.default: ("normalized_shape", "weight", "bias", "eps", "cudnn_enable"),
    overload("layer_norm"): ("axes", "weight", "bias", "eps", "dtype", "scale_after_cast"),
    overload("rms_norm"): ("axes", "weight", "eps", "dtype", "scale_after_cast"),
}


def _norm(target: torch._ops.OpOverload) -> Op:
    named: dict[str, Any] = dict.fromkeys(_ARGUMENTS[target], Anything())
    return Op(target, Var("sum"), **named)


RULES = (
    Rule(
        name="residual-norm",
        patterns={
            "layer_norm(x + residual)": _norm(aten.layer_norm.default) | _norm(overload("layer_norm")),
            "rms_norm(x + residual)": _norm(overload("rms_norm")),
        },
        check=_check,
        rewrite=_write,
        kind="norm",
    ),
)


@register_pass
@dataclass(frozen=True)
class FuseResidualNorm:
    """``s = x + residual; norm(s) -> fxopt.residual_layer_norm`` or ``fxopt.residual_rms_norm``, which gives both.

    ``x`` and ``residual`` have the same shape, and the norm is over the last axis. Who else reads the sum (the residual
    stream of a pre-norm block) reads the operator's second result; where nobody does (post-norm) it is not kept. The
    sum is rounded to its own dtype before it is normalised, as it was. Broadcast or scaled sums, dropout or a cast
    between sum and norm, and anything between the two that writes into a tensor or switches a mode keep them apart.

    What it runs as is measured: a generated kernel where that is faster than the base compiler's, else sum and norm
    as they were. It is not among the default passes: on an H100 Inductor's kernel was as fast, up to 1024 channels.
    Name it behind them: ``passes=[*fxopt.passes.exact_pipeline(), "fuse-residual-norm"]``. A frozen program
    (`fxopt.rewrite` in evaluation mode) is not lowered and stays; norms are folded there.

    Exact: the same operations in the same dtypes.
    """

    name: ClassVar[str] = "fuse-residual-norm"
    tier: ClassVar[Tier] = "exact"
    requires: ClassVar[tuple[str, ...]] = ("no-ops", "layer-norm", "rms-norm")

    def run(self, program: Program) -> PassResult:
        """Fuse them."""
        return PassResult(False) if program.frozen else apply_rules(program, RULES)
