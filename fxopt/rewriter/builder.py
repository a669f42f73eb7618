"""Builder: adds nodes to a graph with their metadata computed on the spot."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.fx import Node

from fxopt.ir.fake import COMPUTED_FROM, evaluate_fake, operand_values
from fxopt.ir.nodes import Size, arguments, shape
from fxopt.ir.program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class Further:
    """A node that a rewrite replaces besides the root of its match, and what reports call its value."""

    old: Node
    new: Node
    title: str


class Builder:
    """Adds calls just before ``at``; each new node inherits the source line and module of ``at``.

    ``graph`` is the graph being edited. Sizes read with `size` are integers where they are static and graph nodes where
    they are symbolic, so that a replacement never fixes a dynamic length.
    """

    def __init__(self, program: Program, at: Node, rule: str) -> None:
        self.graph: fx.Graph = program.graph
        self.at = at
        self.rule = rule
        self.created: list[Node] = []
        self.further: list[Further] = []
        self._mode = program.fake_mode

    @contextmanager
    def before(self, node: Node) -> Iterator[None]:
        """Inside the block calls are added just before ``node``, and inherit from it."""
        at, self.at = self.at, node
        try:
            yield
        finally:
            self.at = at

    def also(self, old: Node, new: Node, title: str) -> None:
        """Have the engine replace ``old`` by ``new`` too; ``new`` stands before every reader of ``old``."""
        self.further.append(Further(old, new, title))

    def call(self, target: OpOverload | Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """Add ``target(*args, **kwargs)``; operands are nodes or constants."""
        with self.graph.inserting_before(self.at):
            node = self.graph.call_function(target, args, kwargs)
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
            if key in self.at.meta:
                node.meta[key] = self.at.meta[key]
        node.meta["fxopt_rule"] = self.rule
        node.meta["val"] = evaluate_fake(node, self._mode)
        node.meta[COMPUTED_FROM] = operand_values(node)
        self.created.append(node)
        return node

    def again(self, node: Node, **changes: Any) -> Node:
        """The operator call ``node`` once more, with other arguments, by schema name."""
        assert isinstance(node.target, OpOverload)
        schema = node.target._schema.arguments
        given = dict(arguments(node)) | changes
        positional = [given[argument.name] for argument in schema if not argument.kwarg_only]
        named = {argument.name: given[argument.name] for argument in schema if argument.kwarg_only}
        return self.call(node.target, *positional, **named)

    def size(self, node: Node, axis: int) -> Any:
        """The size of an axis, as an ``int`` when static and as a graph node when symbolic."""
        value = shape(node)[axis]
        return value if isinstance(value, int) else self.call(aten.sym_size.int, node, axis % len(shape(node)))

    def reshape(self, node: Node, sizes: Sequence[Any]) -> Node:
        """``node`` viewed as ``sizes`` (integers, or nodes for symbolic sizes); a copy only where strides demand it."""
        return self.call(aten.reshape.default, node, list(sizes))

    def transpose(self, node: Node, a: int = -2, b: int = -1) -> Node:
        """``node`` with two axes swapped (a view)."""
        return self.call(aten.transpose.int, node, a, b)

    def cast(self, node: Node, dtype: torch.dtype) -> Node:
        """``node`` in ``dtype``; the node itself when it already has it."""
        if node.meta["val"].dtype == dtype:
            return node
        return self.call(aten.to.dtype, node, dtype)


def product(builder: Builder, sizes: Sequence[Size | Node]) -> Any:
    """The product of sizes as an ``int``, or as a node when any of them is symbolic."""
    result: Any = 1
    for size in sizes:
        static = isinstance(result, int) and isinstance(size, int)
        if isinstance(result, int) and result == 1:
            result = size
        elif static:
            result = result * size
        elif not (isinstance(size, int) and size == 1):
            result = builder.call(operator.mul, result, size)
    return result
