"""BatchNorm with running statistics, and other scales per channel, move into the layers before or behind them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch.fx import Node

from fxopt.analysis.channels import PERMUTATIONS, Obstacle
from fxopt.analysis.readers import Layer, Writer, find_readers, find_writer
from fxopt.analysis.state import State
from fxopt.ir.nodes import arguments, tensor
from fxopt.ir.program import Program
from fxopt.ir.site import Tier
from fxopt.passes.norm.channel_form import ChannelForm, is_batch_norm, read_form, vectors
from fxopt.passes.norm.folding import (
    Folded,
    Refusal,
    count_layers,
    frozen_objection,
    into_readers,
    rebuilt,
    rebuilt_here,
    run_folds,
)
from fxopt.passes.norm.weights import Affine, write_through
from fxopt.rewriter.builder import Builder
from fxopt.rewriter.passes import PassResult
from fxopt.rewriter.registry import register_pass

aten = torch.ops.aten

_RULE: Final = "channel-affine"
#: What batch norm is in a graph of the training mode.
_IN_TRAINING: Final = frozenset(
    {
        aten._native_batch_norm_legit_functional.default,
        aten._native_batch_norm_legit.default,
        aten.native_batch_norm.default,
    }
)


@register_pass
@dataclass(frozen=True)
class FoldChannelAffine:
    """``a ⊙ (x·W + c) + b -> x·(diag(a)W) + (a ⊙ c + b)``, or ``(a ⊙ x + b)·W + c -> x·(W∘a) + (c + W·b)``.

    ``a``, ``b`` ``[C]`` are made of weights alone, one number a channel: BatchNorm with running statistics
    (``s = γ / √(σ² + ε)``, ``a = s``, ``b = β − s·μ``), RepBN (``BN(x) + α·x``: ``a = s + α``), ``x * γ + β``, a scale
    of a layer, and what they are one after the other. Any axis may hold the channels.

    First the layer that writes ``x`` is tried: a linear layer or a convolution, padded or not, that nothing else reads.
    Else all layers that read the result, as in `fold-norm-affine`: there a zero padding between or a padded convolution
    is refused unless ``b`` is 0. On the way elements may only be moved about. A bias is made where a layer has none.

    Weights are folded in float64 and rounded once, to the dtype of the layer's weight (not to float16). It applies in
    evaluation mode through `fxopt.rewrite`; see `fold-norm-affine`.

    Exact: the same sum of products, associated differently.
    """

    name: ClassVar[str] = "fold-channel-affine"
    tier: ClassVar[Tier] = "exact"
    requires: ClassVar[tuple[str, ...]] = ("no-ops",)

    def run(self, program: Program) -> PassResult:
        """Fold them."""
        return run_folds(program, _RULE, _attempts(program))


def _attempts(program: Program) -> Iterator[Folded | Refusal]:
    state = State(program)
    covered: set[Node] = set()
    for node in reversed(list(program.graph.nodes)):
        if node._erased or node in covered:
            continue
        form = read_form(state, node)
        if form is not None:
            covered |= set(form.nodes)
            yield _attempt(program, state, node, form)
        elif is_batch_norm(node) or node.target in _IN_TRAINING:
            yield Refusal(_why_not(state, node), (node,))


def _why_not(state: State, node: Node) -> str:
    given = arguments(node)
    if given["training"] or given["running_mean"] is None:
        return "it normalises by the statistics of each batch; running statistics, as in eval(), could be folded"
    return "its weights or statistics depend on the inputs of the model, or change in the call"


def _attempt(program: Program, state: State, node: Node, form: ChannelForm) -> Folded | Refusal:
    assert form.axis is not None
    named, kind = _named(form), _kind(form)
    writer = _writer(state, node, form)
    if isinstance(writer, Writer):
        objection = frozen_objection(program)
        builder = Builder(program, node, _RULE)
        return Refusal(objection, (named,), kind) if objection else _into_writer(builder, form, writer)
    readers = find_readers(program, state, node, form.axis, shifted=form.shift is not None)
    if isinstance(readers, Obstacle):
        reason = f"it stays: before it, {writer.reason}; behind it, {readers.reason}"
        return Refusal(reason, (named, *writer.nodes, *readers.nodes), kind)
    objection = frozen_objection(program)
    builder = Builder(program, node, _RULE)
    return Refusal(objection, (named,), kind) if objection else _into_readers(builder, form, *readers)


def _kind(form: ChannelForm) -> str:
    """A scale with a shift is what a norm with running statistics is in evaluation; a scale alone is a layer's."""
    return "norm" if form.shift is not None or any(map(is_batch_norm, form.nodes)) else "linear"


def _writer(state: State, node: Node, form: ChannelForm) -> Writer | Obstacle:
    assert form.axis is not None
    region = set(form.nodes)
    leaks = [inner for inner in form.nodes if inner is not node and not region.issuperset(inner.users)]
    if leaks:
        return Obstacle(f"{leaks[0]} is read elsewhere too", (leaks[0],))
    return find_writer(state, form.x, form.order[form.axis], region, shifted=form.shift is not None)


def _into_writer(builder: Builder, form: ChannelForm, writer: Writer) -> Folded:
    layer, affine = writer.layer, Affine(*vectors(builder, form))
    copies = rebuilt_here(builder, layer.node, write_through(builder, layer, affine), writer.between)
    result = _bare(builder, form, copies[form.x])
    became = f"folded into the {'convolution' if layer.form == 'convolution' else 'linear layer'} before it"
    made = " (which gets a bias)" if layer.bias is None and affine.shift is not None else ""
    return Folded(_named(form), ((builder.at, result),), tuple(builder.created), became + made, _kind(form))


def _into_readers(builder: Builder, form: ChannelForm, between: tuple[Node, ...], layers: tuple[Layer, ...]) -> Folded:
    affine = Affine(*vectors(builder, form))
    copies = rebuilt(builder, builder.at, _bare(builder, form, form.x), between)
    pairs = into_readers(builder, affine, copies, layers)
    became = f"folded into {count_layers(layers, affine)} behind it"
    return Folded(_named(form), pairs, tuple(builder.created), became, _kind(form))


def _named(form: ChannelForm) -> Node:
    """The node that reports are to name: the batch norm, if there is one, or else the last that is no permutation."""
    computing = [node for node in form.nodes if node.target not in PERMUTATIONS]
    return next(filter(is_batch_norm, computing), computing[0])


def _bare(builder: Builder, form: ChannelForm, x: Node) -> Node:
    """``x`` in the place of the affine: in its order of axes and its dtype."""
    if form.order != tuple(range(len(form.order))):
        x = builder.call(aten.permute.default, x, list(form.order))
    return builder.cast(x, tensor(form.nodes[0]).dtype)
