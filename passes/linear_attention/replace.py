"""Writing linear attention into the graph of a module, in the place of its softmax attentions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

from fxopt.ir.attention import read_spec
from fxopt.ir.linear_attention import LinearSpec
from fxopt.ir.nodes import shape, tensor
from fxopt.ir.operators import overload
from fxopt.ir.program import Program
from fxopt.passes.linear_attention.capture import attentions
from fxopt.passes.linear_attention.meaning import Kept
from fxopt.rewriter.builder import Builder

aten = torch.ops.aten
#: The input of the graph that says how much of the original is left.
SHARE = "share"


@dataclass(frozen=True)
class Form:
    """What stands in the place of one attention: what is kept of it, its constants, and its new parameters by role.

    Attributes:
        kept: what stays of the original.
        side: the side of the grid, 0 without a convolution.
        first: tokens before the grid.
        eps: added to the sum of weights.
        names: for ``"positions"``, ``"weight"`` and ``"bias"`` the name of the module's parameter.
    """

    kept: Kept
    side: int
    first: int
    eps: float
    names: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Captured:
    """A graph that runs: its inputs are ``bound`` to the module's state by name, or are those of a call (``None``).

    Attributes:
        module: the graph; it takes flat inputs and gives flat results.
        bound: for each input what it is.
        sizes: for each input of a call that is a tensor its sizes, ``None`` for those that may be any; other inputs of
            a call are constants that it was captured with.
        in_spec: how the arguments of a call are flattened.
        out_spec: how results are.
    """

    module: fx.GraphModule
    bound: tuple[str | None, ...]
    sizes: tuple[Any, ...]
    in_spec: Any
    out_spec: Any


def replace_attentions(
    program: Program, read: Callable[[Node, int], Form], parameters: Mapping[str, Tensor], *, blended: bool
) -> Captured:
    """``program``, which this edits, with every attention replaced; ``blended`` keeps a share of the original.

    Args:
        program: of one module, canonical.
        read: what stands in the place of an attention, the nth of the program.
        parameters: of the module, new ones included, by name.
        blended: whether the graph reads, as a further input, the share of the original in the result.
    """
    assert program.signature is not None
    bound = dict(program.signature.bound)
    inputs = _Inputs(program, parameters, bound)
    for place, site in enumerate(attentions(program)):
        _replace(program, site, read(site, place), inputs, blended)
    program.graph.eliminate_dead_code()
    program.graph.lint()
    program.module.recompile()
    placeholders = program.graph.find_nodes(op="placeholder")
    called = [node for node in placeholders if node.name not in bound]
    names = tuple(bound.get(node.name) for node in placeholders)
    sizes = tuple(_sizes(node.meta.get("val")) for node in called)
    return Captured(program.generated(), names, sizes, program.signature.in_spec, program.signature.out_spec)


def _sizes(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return ("constant", value)
    return tuple(size if isinstance(size, int) else None for size in value.shape)


class _Inputs:
    """Inputs of the graph for state of the module that it did not read before; each is made once."""

    def __init__(self, program: Program, parameters: Mapping[str, Tensor], bound: dict[str, str]) -> None:
        self._program, self._parameters, self._bound = program, parameters, bound
        self._made: dict[str, Node] = {}

    def __getitem__(self, name: str) -> Node:
        if name not in self._made:
            self._made[name] = self._new(name)
        return self._made[name]

    def _new(self, name: str) -> Node:
        graph, mode = self._program.graph, self._program.fake_mode
        first = next(node for node in graph.nodes if node.op != "placeholder")
        with graph.inserting_before(first):
            node = graph.placeholder(f"new_{name}".replace(".", "_"))
        value = self._parameters[name].detach()
        node.meta["val"] = value if mode is None else mode.from_tensor(value, static_shapes=True)
        self._bound[node.name] = name
        return node


def _replace(program: Program, site: Node, form: Form, inputs: _Inputs, blended: bool) -> None:
    builder, readers = Builder(program, site, "linear-attention"), list(site.users)
    with builder.before(site.next):
        new = _call(builder, site, form, inputs)
        if blended:
            moved = builder.call(aten.mul.Tensor, builder.call(aten.sub.Tensor, site, new), inputs[SHARE])
            new = builder.call(aten.add.Tensor, new, moved)
    for reader in readers:
        reader.replace_input_with(site, new)
    if not site.users:
        program.graph.erase_node(site)


def _call(builder: Builder, site: Node, form: Form, inputs: _Inputs) -> Node:
    q, k, v = (node for node in site.args[:3] if isinstance(node, Node))
    spec = read_spec(str(site.args[4]))
    optional = {role: inputs[name] for role, name in form.names.items()}
    heads, kv_heads = shape(q)[1], shape(k)[1]
    if heads != kv_heads:
        repeat = overload("repeat_heads")
        count = heads // kv_heads
        k, v = (builder.call(repeat, x, count, spec.kv_map) for x in (k, v))
    keep = None if form.kept.keep is None else _mask(builder, form.kept.keep, q)
    # So that a student may be trained in another precision than it was prepared in.
    dtype = None if spec.out_dtype == tensor(q).dtype else spec.out_dtype
    linear = LinearSpec(form.kept.causal, form.side, form.first, form.eps, out_dtype=dtype, out_layout=spec.out_layout)
    given = [optional.get(role) for role in ("positions", "weight", "bias")]
    return builder.call(overload("linear_attention"), q, k, v, given[0], keep, *given[1:], str(linear))


def _mask(builder: Builder, captured: Node, q: Node) -> Node:
    """``[B, 1, 1, T]``, or ``[1, 1, 1, T]`` for all sequences, as ``[B, T]``."""
    flat = builder.call(aten.select.int, builder.call(aten.select.int, captured, 1, 0), 1, 0)
    if shape(captured)[0] == 1:
        return builder.call(aten.expand.default, flat, [builder.size(q, 0), -1])
    return flat
