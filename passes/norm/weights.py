"""Folding a scale and a shift per channel into the weights of a linear layer, in float64, rounded once at the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch.fx import Node

from fxopt.analysis.readers import Layer
from fxopt.ir.nodes import FOLDED, shape, tensor
from fxopt.rewriter.builder import Builder

aten = torch.ops.aten
#: Inductor pads rows of more elements than this to a multiple of so many bytes (`padding_stride_threshold` and
#: `padding_alignment_bytes` in its configuration).
_PADDED_FROM: Final = 1024
_ROW_BYTES: Final = 128


@dataclass(frozen=True)
class Affine:
    """``a ⊙ x + b``: ``scale`` and ``shift`` are ``[C]`` in float64, or ``None`` for 1 and 0."""

    scale: Node | None
    shift: Node | None


def read_through(builder: Builder, layer: Layer, x: Node, affine: Affine) -> Node:
    """``layer(a ⊙ x + b) = x·(W∘a) + (c + W·b)``: the layer with folded weights on ``x``.

    ``∘`` scales what belongs to an input channel. A bias is made where there is none and ``b`` is not 0.
    """
    weight, bias, wide = layer.weight, layer.bias, widened(builder, layer.weight)
    if affine.scale is not None:
        weight = fold(builder, _by_input(builder, layer, wide, affine.scale), layer.weight)
    if affine.shift is not None:
        added = _through(builder, layer, wide, affine.shift)
        total = added if bias is None else builder.call(aten.add.Tensor, widened(builder, bias), added)
        bias = fold(builder, total, layer.weight if bias is None else bias)
    return call_layer(builder, layer, x, weight, bias)


def write_through(builder: Builder, layer: Layer, affine: Affine) -> Node:
    """``a ⊙ layer(x) + b = x·(diag(a)W) + (a ⊙ c + b)``: the layer with folded weights."""
    weight, bias = layer.weight, layer.bias
    if affine.scale is not None:
        factors = _as_outputs(builder, layer, affine.scale)
        scaled = builder.call(aten.mul.Tensor, widened(builder, weight), factors)
        weight = fold(builder, scaled, layer.weight)
    total: Node | None = None if bias is None else widened(builder, bias)
    if total is not None and affine.scale is not None:
        total = builder.call(aten.mul.Tensor, total, affine.scale)
    if affine.shift is not None:
        total = affine.shift if total is None else builder.call(aten.add.Tensor, total, affine.shift)
    if total is not None:
        bias = fold(builder, total, layer.weight if bias is None else bias)
    return call_layer(builder, layer, layer.x, weight, bias)


def fold(builder: Builder, wide: Node, like: Node) -> Node:
    """``wide`` rounded to the dtype that the weight ``like`` has when the program runs: a folded weight."""
    like = like.args[1] if FOLDED in like.meta else like  # type: ignore[assignment]
    folded = builder.call(aten.type_as.default, wide, like)
    folded.meta[FOLDED] = True
    return folded


def call_layer(builder: Builder, layer: Layer, x: Node, weight: Node, bias: Node | None) -> Node:
    """The call of ``layer`` with other operands."""
    if layer.form == "addmm":
        return builder.call(aten.addmm.default, bias, x, weight)
    if layer.form == "matmul":
        product = builder.call(aten.matmul.default, x, weight)
        return product if bias is None else builder.call(aten.add.Tensor, product, bias)
    if layer.form == "linear" and layer.bias is None and bias is not None and _rows_are_padded(layer.node):
        return builder.call(aten.add.Tensor, builder.again(layer.node, input=x, weight=weight), bias)
    return builder.again(layer.node, input=x, weight=weight, bias=bias)


def _rows_are_padded(node: Node) -> bool:
    """Whether Inductor may leave room between the rows of this half-precision result.

    cuBLAS has no product with a bias for such a result: PyTorch writes the bias to all of it first, which the product
    then reads. Added apart, a bias becomes a part of what reads the result.
    """
    features, size = shape(node)[-1], tensor(node).dtype.itemsize
    aligned = not isinstance(features, int) or features * size % _ROW_BYTES == 0
    return size == 2 and not aligned and features > _PADDED_FROM


def widened(builder: Builder, node: Node) -> Node:
    """In float64, a folded weight as it was before it was rounded."""
    return node.args[0] if FOLDED in node.meta else builder.cast(node, torch.float64)  # type: ignore[return-value]


def _by_input(builder: Builder, layer: Layer, weight: Node, scale: Node) -> Node:
    """``W∘a``."""
    if layer.form == "linear":
        return builder.call(aten.mul.Tensor, weight, scale)
    if layer.form != "convolution":
        return builder.call(aten.mul.Tensor, weight, builder.call(aten.unsqueeze.default, scale, 1))
    window = len(shape(weight)) - 2
    grouped = builder.call(aten.unflatten.int, weight, 0, [layer.groups, -1])
    factors = builder.call(aten.reshape.default, scale, [layer.groups, 1, -1, *[1] * window])
    return builder.call(aten.flatten.using_ints, builder.call(aten.mul.Tensor, grouped, factors), 0, 1)


def _through(builder: Builder, layer: Layer, weight: Node, shift: Node) -> Node:
    """``W·b``, one number an output channel."""
    if layer.form == "linear":
        return builder.call(aten.matmul.default, weight, shift)
    if layer.form != "convolution":
        return builder.call(aten.matmul.default, shift, weight)
    weighted = _by_input(builder, layer, weight, shift)
    return builder.call(aten.sum.dim_IntList, weighted, list(range(1, len(shape(weight)))))


def _as_outputs(builder: Builder, layer: Layer, scale: Node) -> Node:
    """``a`` so that it multiplies the output channels of ``W``."""
    if layer.form in ("addmm", "matmul"):
        return scale
    return builder.call(aten.reshape.default, scale, [-1, *[1] * (len(shape(layer.weight)) - 1)])
