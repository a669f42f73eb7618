"""A convolution that cuts the image into patches is a linear layer on them."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from fxopt.analysis.convolutions import CONVOLUTIONS, Convolution, read_convolution
from fxopt.analysis.layouts import relaid
from fxopt.ir.nodes import same_size, shape, tensor
from fxopt.ir.program import Program
from fxopt.ir.site import Tier
from fxopt.rewriter.builder import Builder
from fxopt.rewriter.passes import PassResult, apply_rules, difference
from fxopt.rewriter.pattern import Anything, Match, Op, Var
from fxopt.rewriter.registry import register_pass
from fxopt.rewriter.rule import Rejection, Rule

aten = torch.ops.aten


def check_patches(match: Match) -> Convolution | Rejection | None:
    """Windows lie side by side and cover whole patches; a convolution that cuts nothing up is none of our business."""
    found = read_convolution(match.root)
    if found is None or not found.cuts_patches:
        return None
    obstacle = _obstacle(found)
    return Rejection(obstacle) if obstacle else found


def _obstacle(found: Convolution) -> str:
    if found.stride != found.kernel:
        return f"the stride {found.stride} is not the kernel size {found.kernel}; windows must lie side by side"
    if any(found.padding):
        return f"the padding {found.padding} shifts the patches; pad the image before a convolution without padding"
    if any(step != 1 for step in found.dilation):
        return f"the dilation {found.dilation} leaves gaps in the windows; a linear layer needs dilation 1"
    if found.groups != 1:
        return f"its {found.groups} groups of channels would be as many linear layers; it needs groups=1"
    if not tensor(found.x).dtype.is_floating_point:
        return f"a linear layer on {tensor(found.x).dtype} is not supported; it needs a floating dtype"
    return ""


def build_linear(builder: Builder, found: Convolution) -> Node:
    """``linear(patches, weight, bias)`` with the channels moved to where the convolution has them."""
    grid = len(found.kernel)
    lead = len(shape(found.x)) - grid - 1
    channels_last = _is_channels_last(found.weight)
    patches = builder.call(aten.permute.default, _cut(builder, found, lead), _patch_order(lead, grid, channels_last))
    patches = builder.call(aten.flatten.using_ints, patches, lead + grid, -1)
    weight = found.weight
    if channels_last:
        weight = builder.call(aten.permute.default, weight, [0, *range(2, grid + 2), 1])
    weight = builder.call(aten.flatten.using_ints, weight, 1, -1)
    embedded = builder.call(aten.linear.default, patches, weight, found.bias)
    return builder.call(aten.permute.default, embedded, [*range(lead), lead + grid, *range(lead, lead + grid)])


def _cut(builder: Builder, found: Convolution, lead: int) -> Node:
    """``x`` with each spatial axis split into patches and places inside a patch: ``[…, C, H / h, h, W / w, w]``."""
    x = found.x
    for number, size in enumerate(found.kernel):
        axis = lead + 1 + 2 * number
        if not same_size(shape(x)[axis] % size, 0):
            x = _crop(builder, x, axis, size)
        x = builder.call(aten.unflatten.int, x, axis, [-1, size])
    return x


def _crop(builder: Builder, x: Node, axis: int, size: int) -> Node:
    """``x`` up to the last whole patch along ``axis``: a convolution ignores what is left over."""
    length = builder.size(x, axis)
    if isinstance(length, int):
        return builder.call(aten.slice.Tensor, x, axis, 0, length - length % size)
    count = builder.call(operator.floordiv, length, size)
    return builder.call(aten.slice.Tensor, x, axis, 0, builder.call(operator.mul, count, size))


def _patch_order(lead: int, grid: int, channels_last: bool) -> list[int]:
    """The axes of the result of `_cut`: batch and grid first, then a patch, its channels where the weight has them."""
    places = range(lead + 2, lead + 1 + 2 * grid, 2)
    patch = [*places, lead] if channels_last else [lead, *places]
    return [*range(lead), *(place - 1 for place in places), *patch]


def _is_channels_last(weight: Node) -> bool:
    """Whether the weight is stored with its channels innermost, so that flattening it in that order copies nothing."""
    stored = tensor(weight)
    return not stored.is_contiguous() and stored.movedim(1, -1).is_contiguous()


def _write(builder: Builder, found: Convolution, program: Program) -> Node:
    """`build_linear`, copied into row-major order where something downstream does not accept its strides."""
    new = build_linear(builder, found)
    if difference(builder.at, new):
        return new
    changed = relaid(program, builder.at, tensor(new))
    if changed is None:
        return builder.call(aten.clone.default, new, memory_format=torch.contiguous_format)
    for node, value in changed.items():
        node.meta["val"] = value
    return new


def rules(program: Program) -> tuple[Rule, ...]:
    """The rules of this pass for one program."""
    read: dict[str, Any] = {name: Anything() for name in ("bias", "stride", "padding", "dilation", "groups")}
    return (
        Rule(
            name="patches",
            kind="linear",
            patterns={
                "conv1d, conv2d or conv3d": Op(CONVOLUTIONS[:-1], Var("x"), Var("weight"), **read),
                "convolution": Op(
                    CONVOLUTIONS[-1], Var("x"), Var("weight"), transposed=Anything(), output_padding=Anything(), **read
                ),
            },
            check=check_patches,
            rewrite=lambda builder, found: _write(builder, found, program),
        ),
    )


@register_pass
@dataclass(frozen=True)
class PatchEmbedding:
    """``conv(x, w, b, stride=k) -> linear(patches(x), w.flatten(1), b)`` where ``k`` is the size of the kernel.

    ``x [B, C, H, W]`` is seen as ``[B, H / h, W / w, C·h·w]``, one row a patch, and the result ``[B, H / h, W / w, O]``
    as ``[B, O, H / h, W / w]``, so that ``flatten(2).transpose(1, 2)`` gives the rows back without moving a number.
    One, two or three spatial axes, any batch; rows and columns that fill no patch are cropped, as the convolution
    ignores them. It needs no padding, dilation 1 and one group. Where the weight is stored channels-last, so are the
    patches.

    The result's strides are those of a channels-last tensor. Where something downstream needs the convolution's own (a
    ``view``, an operator outside ATen, an output of the program), the result is copied into row-major order.

    Exact: the same products in another order of summation. In float32 they follow
    ``torch.set_float32_matmul_precision``, as a linear layer does, and not ``torch.backends.cudnn.allow_tf32``.
    """

    name: ClassVar[str] = "patch-embedding"
    tier: ClassVar[Tier] = "exact"
    requires: ClassVar[tuple[str, ...]] = ()

    def run(self, program: Program) -> PassResult:
        """Rewrite them."""
        return apply_rules(program, rules(program))
