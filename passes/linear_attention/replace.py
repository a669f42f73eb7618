"""Writing linear attention into the graph of a module, in the place of its softmax attentions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

from fxopt.ir.attention import read_spec
from fxopt.ir.linear_attention import LinearSpec
from fxopt.ir.nodes import same_size, shape, tensor
from fxopt.ir.operators import overload
from fxopt.ir.program import Program
from fxopt.passes.linear_attention.capture import Isolated, attentions
from fxopt.passes.linear_attention.meaning import HIDDEN, Kept, KeyMask, weight_readers
from fxopt.rewriter.builder import Builder

aten = torch.ops.aten
#: The input of the graph that says how much of the original is left.
SHARE = "share"
_NO_MASK = (
    "a mask of keys holds numbers that are neither 0 nor far below it, which linear attention can't add to scores; "
    "drop='mask' leaves it out"
)


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
class Argument:
    """What an argument of a captured call has to be: a tensor of ``sizes`` (``None``: any), or else ``constant``.

    One that is not ``read`` may be anything. What is given ``again`` has the sizes of the tensor at that place among
    the tensors.
    """

    sizes: tuple[int | None, ...] | None = None
    constant: Any = None
    read: bool = True
    again: int | None = None


@dataclass(frozen=True)
class Calling:
    """How a captured graph, which takes flat inputs and gives flat results, is called.

    Attributes:
        bound: for each input the name of the module's state that it is, or ``None`` for those of a call.
        arguments: what each flattened argument of a call has to be.
        in_spec: how the arguments of a call are flattened.
        out_spec: how results are.
    """

    bound: tuple[str | None, ...]
    arguments: tuple[Argument, ...]
    in_spec: Any
    out_spec: Any


@dataclass(frozen=True)
class Captured:
    """A graph that runs, and how it is called."""

    module: fx.GraphModule
    calling: Calling


def replace_attentions(
    captured: Isolated, read: Callable[[Node, int], Form], parameters: Mapping[str, Tensor], *, blended: bool
) -> Captured:
    """A module's program, which this edits, with every attention replaced; ``blended`` keeps a share of the original.

    Args:
        captured: of one module, canonical.
        read: what stands in the place of an attention, the nth of the program.
        parameters: of the module, new ones included, by name.
        blended: whether the graph reads, as a further input, the share of the original in the result.
    """
    program = captured.program
    assert program.signature is not None
    bound = dict(program.signature.bound)
    inputs = _Inputs(program, parameters, bound)
    # A linear attention has no weights.
    forget_results(program, results_of_weights(program))
    for place, site in enumerate(attentions(program)):
        _replace(program, site, read(site, place), inputs, blended)
    placeholders = program.graph.find_nodes(op="placeholder")
    tensors = [node for node in placeholders if node.name not in bound]
    _read_sizes_early(program, tensors)
    program.graph.eliminate_dead_code()
    program.graph.lint()
    program.module.recompile()
    names = tuple(bound.get(node.name) for node in placeholders)
    rest = iter([_argument(node, captured.again.get(n)) for n, node in enumerate(tensors)])
    constants = captured.constants
    places = range(len(tensors) + len(constants))
    arguments = tuple(Argument(constant=constants[n]) if n in constants else next(rest) for n in places)
    calling = Calling(names, arguments, captured.in_spec, program.signature.out_spec)
    return Captured(program.generated(), calling)


def _read_sizes_early(program: Program, tensors: list[Node]) -> None:
    """Read every size of the first argument that has it: what is read of no other way may be anything."""
    for node in program.graph.find_nodes(op="call_function", target=aten.sym_size.int):
        places = ((x, axis) for x in tensors for axis, size in enumerate(shape(x)) if not isinstance(size, int))
        node.args = next((p for p in places if same_size(shape(p[0])[p[1]], node.meta["val"])), node.args)


def _argument(node: Node, again: int | None) -> Argument:
    sizes = tuple(size if isinstance(size, int) else None for size in shape(node))
    return Argument(sizes, read=bool(node.users), again=again)


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
            new = _blend(builder, site, new, inputs[SHARE])
    for reader in readers:
        reader.replace_input_with(site, new)
    if not site.users:
        program.graph.erase_node(site)


def _blend(builder: Builder, site: Node, new: Node, share: Node) -> Node:
    """``λ·site + (new − λ·new)``: where ``λ`` is 1 or 0, exactly one of the two."""
    old = builder.call(aten.mul.Tensor, site, share)
    rest = builder.call(aten.sub.Tensor, new, builder.call(aten.mul.Tensor, new, share))
    return builder.call(aten.add.Tensor, old, rest)


def results_of_weights(program: Program) -> frozenset[int]:
    """The places, among the flat results, of those that are computed from the weights of an attention."""
    moving = {reader for site in attentions(program) for reader in weight_readers(site)}
    for node in program.graph.nodes:
        if not moving.isdisjoint(node.all_input_nodes):
            moving.add(node)
    return frozenset(place for place, result in enumerate(_output(program).args[0]) if result in moving)  # type: ignore[arg-type]


def forget_results(program: Program, places: frozenset[int]) -> None:
    """Edit ``program`` to give ``None`` for the flat results at ``places``, and to compute nothing for them."""
    output = _output(program)
    results = enumerate(output.args[0])  # type: ignore[arg-type]
    output.args = (tuple(None if place in places else result for place, result in results),)
    program.graph.eliminate_dead_code()


def _output(program: Program) -> Node:
    (output,) = program.graph.find_nodes(op="output")
    assert isinstance(output, Node)
    return output


def _call(builder: Builder, site: Node, form: Form, inputs: _Inputs) -> Node:
    q, k, v = (node for node in site.args[:3] if isinstance(node, Node))
    spec = read_spec(str(site.args[4]))
    optional = {role: inputs[name] for role, name in form.names.items()}
    heads, kv_heads = shape(q)[1], shape(k)[1]
    if heads != kv_heads:
        repeat = overload("repeat_heads")
        count = heads // kv_heads
        k, v = (builder.call(repeat, x, count, spec.kv_map) for x in (k, v))
    # Tokens of a grid are never padded.
    keep = _mask(builder, form.kept.keys, q, k) if form.kept.keys and not form.side else None
    # So that a student may be trained in another precision than it was prepared in.
    dtype = None if spec.out_dtype == tensor(q).dtype else spec.out_dtype
    linear = LinearSpec(form.kept.causal, form.side, form.first, form.eps, out_dtype=dtype, out_layout=spec.out_layout)
    given = [optional.get(role) for role in ("positions", "weight", "bias")]
    return builder.call(overload("linear_attention"), q, k, v, given[0], keep, *given[1:], str(linear))


def _mask(builder: Builder, masks: tuple[KeyMask, ...], q: Node, k: Node) -> Node:
    """``[B, T]``, true for the keys that every one of ``masks`` counts."""
    counting = [_counting(builder, mask) for mask in masks]
    flat = reduce(lambda a, b: builder.call(aten.logical_and.default, a, b), counting)
    return builder.call(aten.expand.default, flat, [builder.size(q, 0), builder.size(k, 2)])


def _counting(builder: Builder, mask: KeyMask) -> Node:
    """``[B or 1, 1, 1 or S, T]`` as ``[B or 1, T]``: the last query sees all keys that count, causal or not."""
    flat = builder.call(aten.select.int, builder.call(aten.select.int, mask.node, 2, -1), 1, 0)
    if mask.hides:
        return builder.call(aten.logical_not.default, flat)
    if not tensor(flat).dtype.is_floating_point:
        return flat
    counts = builder.call(aten.gt.Scalar, flat, HIDDEN)
    if mask.unproved:
        either = builder.call(aten.eq.Tensor, counts, builder.call(aten.eq.Scalar, flat, 0.0))
        builder.call(aten._assert_async.msg, builder.call(aten.all.default, either), _NO_MASK)
    return counts
