"""LayerNorm becomes RMSNorm where everything that writes into the residual stream can be centred."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch.fx import Node

from fxopt.analysis.channels import Obstacle
from fxopt.analysis.readers import Layer
from fxopt.analysis.state import State
from fxopt.analysis.stream import Stream, find_stream, reads_channels
from fxopt.ir.nodes import arguments, tensor
from fxopt.ir.operators import overload
from fxopt.ir.program import Program
from fxopt.ir.site import Tier
from fxopt.passes.norm.folding import Folded, Refusal, frozen_objection, move, run_folds
from fxopt.passes.norm.weights import call_layer, fold, widened
from fxopt.rewriter.builder import Builder
from fxopt.rewriter.passes import PassResult
from fxopt.rewriter.registry import register_pass

aten = torch.ops.aten

_RULE: Final = "centred"


@register_pass
@dataclass(frozen=True)
class CentreResidual:
    """``layer_norm(x) -> rms_norm(P·x)``, ``P = I − 11ᵀ/C`` folded into all that ``x [..., C]`` is a sum of.

    A LayerNorm is the RMSNorm of a value whose mean is 0, and the mean of a sum is 0 if those of its terms are:
    ``W -> P·W``, ``c -> P·c`` for linear layers and convolutions that write into the stream, ``E -> E·P`` for
    embeddings, positions and class tokens. It is legal only if *every* reader of the stream is a LayerNorm over the
    channels (their weights may differ, and may have been folded away). A stream that is also returned, read by
    anything else, or written by anything else (a norm, an input of the model, a scale per channel that was not folded
    before) keeps its LayerNorms, each with that reason.

    Embeddings that are tied to a head are untied: the head keeps the original. Weights are centred in float64 and
    rounded once. It applies in evaluation mode through `fxopt.rewrite`; see `fold-norm-affine`.

    Not part of the exact pipeline: what an RMSNorm saves is small, so name it where it is worth a second copy of the
    embeddings.

    Exact: the mean is subtracted from the terms instead of from their sum.
    """

    name: ClassVar[str] = "centre-residual"
    tier: ClassVar[Tier] = "exact"
    requires: ClassVar[tuple[str, ...]] = ("no-ops", "layer-norm")

    def run(self, program: Program) -> PassResult:
        """Centre every stream that can be."""
        return run_folds(program, _RULE, _attempts(program))


def _attempts(program: Program) -> Iterator[Folded | Refusal]:
    state = State(program)
    done: set[Node] = set()
    for norm in list(program.graph.nodes):
        if norm in done or not reads_channels(norm):
            continue
        stream = find_stream(state, norm)
        if isinstance(stream, Obstacle):
            yield Refusal(f"it stays a LayerNorm: {stream.reason}", (norm, *stream.nodes))
            continue
        done.update(stream.norms)
        objection = frozen_objection(program)
        if objection:
            yield from (Refusal(objection, (member,)) for member in stream.norms)
        else:
            yield from _centre(program, stream)


def _centre(program: Program, stream: Stream) -> list[Folded]:
    """Write the centred stream beside the old one, and an RMSNorm for each of its norms."""
    copies = _Centring(program, stream).values()
    became = f"rms_norm of a stream with {stream.writers} centred writers"
    folded = []
    for norm in stream.norms:
        builder = Builder(program, norm, _RULE)
        new = _rms_norm(builder, norm, copies)
        folded.append(Folded(norm, ((norm, new),), tuple(builder.created), became))
    return folded


class _Centring:
    """Writes a stream once more, every value of it without its mean over the channels."""

    def __init__(self, program: Program, stream: Stream) -> None:
        self._program, self._stream = program, stream
        self._copies: dict[Node, Node] = {}
        self._tables: dict[Node, Node] = {}

    def values(self) -> dict[Node, Node]:
        """For each value of the stream the centred one."""
        members = [node for node in self._program.graph.nodes if node in self._stream.axes]
        for node in members:
            self._copies[node] = self._copy(Builder(self._program, node, _RULE), node)
        return self._copies

    def _copy(self, builder: Builder, node: Node) -> Node:
        if node in self._stream.layers:
            return self._layer(builder, self._stream.layers[node])
        if node in self._stream.lookups:
            return builder.again(node, weight=self._table(builder, node.args[0], -1))  # type: ignore[arg-type]
        tables = [operand for operand in node.all_input_nodes if operand in self._stream.tables]
        written = {operand: self._table(builder, operand, self._stream.tables[operand]) for operand in tables}
        return move(builder, node, {**self._copies, **written})

    @staticmethod
    def _layer(builder: Builder, layer: Layer) -> Node:
        axis = 1 if layer.form in ("addmm", "matmul") else 0
        weight = _centred(builder, layer.weight, axis)
        bias = None if layer.bias is None else _centred(builder, layer.bias, 0)
        return call_layer(builder, layer, layer.x, weight, bias)

    def _table(self, builder: Builder, table: Node, axis: int) -> Node:
        if table not in self._tables:
            self._tables[table] = _centred(builder, table, axis)
        return self._tables[table]


def _centred(builder: Builder, weight: Node, axis: int) -> Node:
    wide = widened(builder, weight)
    mean = builder.call(aten.mean.dim, wide, [axis], True)
    return fold(builder, builder.call(aten.sub.Tensor, wide, mean), weight)


def _rms_norm(builder: Builder, norm: Node, copies: dict[Node, Node]) -> Node:
    """The RMSNorm in the place of ``norm``, computed in the same dtype and rounded as often."""
    given = arguments(norm)
    old = norm.args[0]
    assert isinstance(old, Node)
    x, weight, bias, eps = copies[old], given["weight"], given["bias"], given["eps"]
    dtype = given.get("dtype") or torch.promote_types(tensor(x).dtype, torch.float32)
    first = bool(given.get("scale_after_cast"))
    if bias is None or first:
        result = builder.call(overload("rms_norm"), x, 1, weight, eps, dtype, first)
        return result if bias is None else builder.call(aten.add.Tensor, result, bias)
    wide = builder.call(overload("rms_norm"), builder.cast(x, dtype), 1, weight, eps, dtype, False)
    return builder.cast(builder.call(aten.add.Tensor, wide, bias), tensor(norm).dtype)
