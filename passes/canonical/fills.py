"""Tensors of one number, made after the likeness of another, are made of its sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch.fx import Node

from fxopt.ir.nodes import Size, arguments, is_tensor, same_size, shape, source, tensor
from fxopt.ir.program import Program, operator_name
from fxopt.ir.site import Site, Tier
from fxopt.rewriter.builder import Builder
from fxopt.rewriter.passes import PassResult, Replacement, difference, erase_unused
from fxopt.rewriter.registry import register_pass

aten = torch.ops.aten

#: Operators that read of their first operand no more than its sizes, dtype and device; the number, or its argument.
_FILLS: Final[dict[Any, int | str]] = {
    aten.zeros_like.default: 0, aten.ones_like.default: 1, aten.full_like.default: "fill_value",
    aten.new_zeros.default: 0, aten.new_ones.default: 1, aten.new_full.default: "fill_value",
    aten.fill.Scalar: "value",
}  # fmt: skip

#: Elements of a constant that a program is worth evaluating for.
_LARGEST: Final = 2**24


@register_pass
@dataclass(frozen=True)
class Fills:
    """``zeros_like(x), ones_like(x), full_like(x, c), x.new_full(sizes, c), … -> full(sizes of x, c)``.

    ``x`` is then not read, so that scores from which a mask takes its shape stay between one softmax and its
    contraction, and what is made of static sizes alone is a constant. Applies where ``x`` is computed, the result
    is laid out in row-major order, of no more than 2²⁴ elements where sizes are static, and symbolic sizes are sizes
    of the program's inputs. A frozen program, which moves to other devices as it is, keeps what is made after another.
    """

    name: ClassVar[str] = "fills"
    tier: ClassVar[Tier] = "exact"
    requires: ClassVar[tuple[str, ...]] = ()

    def run(self, program: Program) -> PassResult:
        """Rewrite them."""
        found = [] if program.frozen else [node for node in program.graph.nodes if node.target in _FILLS]
        done = [r for node in found if (r := _fill(program, node))]
        if done:
            program.module.recompile()
        return PassResult(bool(done), tuple(done))


def _fill(program: Program, node: Node) -> Replacement | None:
    like, value, number = node.args[0], tensor(node), _FILLS[node.target]
    assert isinstance(like, Node)
    if like.op != "call_function" or _is_large(shape(node)):
        return None
    builder = Builder(program, node, "fills")
    sizes = [_input_size(builder, size) for size in shape(node)]
    if None in sizes:
        _erase(program, builder)
        return None
    number = arguments(node)[number] if isinstance(number, str) else number
    new = builder.call(aten.full.default, sizes, number, dtype=value.dtype, device=value.device)
    if difference(node, new) or tensor(new).stride() != value.stride():
        _erase(program, builder)
        return None
    site = Site("", "rewritten", "fills", f"{node} is made of sizes", source(node), (node.name,))
    node.replace_all_uses_with(new)
    erase_unused(program, node)
    return Replacement("fills", "made after the likeness of another", site, operator_name(new))


def _is_large(sizes: tuple[Size, ...]) -> bool:
    """Whether what is made of static sizes, and evaluated as a constant then, takes too much memory."""
    return math.prod(size for size in sizes if isinstance(size, int)) > _LARGEST


def _input_size(builder: Builder, size: Size) -> int | Node | None:
    """A size as a number, or as a node that reads nothing but an input."""
    if isinstance(size, int):
        return size
    for leaf in builder.graph.find_nodes(op="placeholder"):
        held = leaf.meta.get("val")
        if isinstance(leaf, Node) and isinstance(held, torch.SymInt) and same_size(held, size):
            return leaf
        axes = [axis for axis, other in enumerate(shape(leaf)) if same_size(other, size)] if is_tensor(leaf) else []
        if axes:
            return builder.call(aten.sym_size.int, leaf, axes[0])
    return None


def _erase(program: Program, builder: Builder) -> None:
    for created in reversed(builder.created):
        program.graph.erase_node(created)
