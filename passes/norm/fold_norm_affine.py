"""The weight and bias of a norm move into the linear layers that read it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch.fx import Node

from fxopt.analysis.channels import Obstacle
from fxopt.analysis.readers import Layer, find_readers
from fxopt.analysis.state import State
from fxopt.ir.nodes import arguments, shape, tensor
from fxopt.ir.operators import overload
from fxopt.ir.program import Program
from fxopt.ir.site import Tier
from fxopt.passes.norm.folding import (
    Folded,
    Refusal,
    count_layers,
    frozen_objection,
    into_readers,
    rebuilt,
    run_folds,
)
from fxopt.passes.norm.weights import Affine, widened
from fxopt.rewriter.builder import Builder
from fxopt.rewriter.passes import PassResult
from fxopt.rewriter.registry import register_pass

aten = torch.ops.aten

_RULE: Final = "norm-affine"
#: Norms whose weights have the shape of what is normalised together, at the end of the shape.
_OVER_LAST: Final = (aten.layer_norm.default, overload("layer_norm"), overload("rms_norm"))
#: Norms whose weights are over the second axis, whatever is normalised together.
_OVER_SECOND: Final = (aten.group_norm.default, aten.instance_norm.default)


@dataclass(frozen=True)
class _Norm:
    """A norm whose affine part is over ``count`` axes of its result, the first of which is ``axis``."""

    node: Node
    axis: int
    count: int
    affine: Affine


def read_norm(node: Node) -> _Norm | None:
    """The norm that ``node`` computes, if it has a weight or a bias."""
    if node.op != "call_function" or node.target not in (*_OVER_LAST, *_OVER_SECOND):
        return None
    given = arguments(node)
    if given.get("running_mean") is not None:
        return None  # what an instance norm reads, or writes, there is more than this batch
    affine = Affine(given["weight"], given.get("bias"))
    if affine.scale is None and affine.shift is None:
        return None
    if node.target in _OVER_SECOND:
        return _Norm(node, 1, 1, affine)
    axes = given["axes"] if "axes" in given else len(given["normalized_shape"])
    return _Norm(node, len(shape(node)) - axes, axes, affine)


def _attempt(program: Program, state: State, norm: _Norm) -> Folded | Refusal:
    affine, node = norm.affine, norm.node
    if norm.count != 1:
        return Refusal(f"it normalises over {norm.count} axes together, a linear layer reads one", (node,))
    inputs = [operand for operand in (affine.scale, affine.shift) if operand is not None and not state.holds(operand)]
    if inputs:
        return Refusal(f"its weight {inputs[0]} depends on the inputs of the model", (node, *inputs))
    found = find_readers(program, state, node, norm.axis, shifted=affine.shift is not None)
    if isinstance(found, Obstacle):
        return Refusal(f"its weights stay: {found.reason}", (node, *found.nodes))
    objection = frozen_objection(program)
    return Refusal(objection, (node,)) if objection else _fold(program, norm, *found)


def _fold(program: Program, norm: _Norm, between: tuple[Node, ...], layers: tuple[Layer, ...]) -> Folded:
    builder = Builder(program, norm.node, _RULE)
    copies = rebuilt(builder, norm.node, _plain(builder, norm.node), between)
    wide = Affine(*(operand and widened(builder, operand) for operand in (norm.affine.scale, norm.affine.shift)))
    pairs = into_readers(builder, wide, copies, layers)
    became = f"weight and bias moved into {count_layers(layers, norm.affine)}"
    return Folded(norm.node, pairs, tuple(builder.created), became)


def _plain(builder: Builder, node: Node) -> Node:
    """The norm without weight and bias, in the dtype of the original."""
    nothing = {name: None for name in ("weight", "bias") if name in arguments(node)}
    return builder.cast(builder.again(node, **nothing), tensor(node).dtype)


def _attempts(program: Program) -> Iterator[Folded | Refusal]:
    state = State(program)
    for node in list(program.graph.nodes):
        norm = read_norm(node)
        if norm is not None:
            yield _attempt(program, state, norm)


@register_pass
@dataclass(frozen=True)
class FoldNormAffine:
    """``linear(γ ⊙ n + β, W, c) -> linear(n, W∘γ, c + W·β)``, where ``n`` is the normalised value of a LayerNorm,
    RMSNorm, GroupNorm or InstanceNorm (of the statistics of each sample).

    ``n [..., C]``, of GroupNorm and InstanceNorm ``[B, C, ...]``, ``γ``, ``β`` ``[C]``, ``W [O, C]``; ``W∘γ`` scales
    the columns of ``W``. Every reader of the norm must be a linear layer or a convolution with weights of the model;
    between them elements may only be moved about (permutations, reshapes that keep the channels whole, rolls, windows,
    slices and gathers of tokens, means over tokens). A norm that is also returned, added to something or otherwise read
    keeps its weight, and so does one whose result is padded with zeros and has a bias. A bias is made where a layer has
    none. Norms and layers may share their weights: each use gets its own folded copy.

    Weights are folded in float64 and rounded once, to the dtype of the layer's weight (not to float16, whose range a
    product of weights may leave). It applies in evaluation mode through `fxopt.rewrite`, which computes folded weights
    once and again after a weight has changed; in a graph from ``torch.compile`` weights are inputs and stay.

    Exact: the same sum of products, associated differently.
    """

    name: ClassVar[str] = "fold-norm-affine"
    tier: ClassVar[Tier] = "exact"
    requires: ClassVar[tuple[str, ...]] = ("no-ops", "layer-norm", "rms-norm")

    def run(self, program: Program) -> PassResult:
        """Fold them."""
        return run_folds(program, _RULE, _attempts(program))
