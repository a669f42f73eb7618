"""Values that do not depend on the program's inputs, evaluated for real."""

from __future__ import annotations

import math
from contextlib import ExitStack
from functools import cached_property
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.fx.experimental.symbolic_shapes import has_free_symbols

from fxopt.ir.held import contents
from fxopt.ir.nodes import is_impure
from fxopt.ir.program import Program

#: Elements above which a constant is not evaluated (a 16k x 16k boolean mask still is).
MAX_ELEMENTS = 2**28


class Constants:
    """Evaluates input-independent nodes of one program on demand; results are memoised.

    A node counts as input-independent when every leaf of its cone is a stored constant or a literal, it draws no random
    numbers, and every size in the cone is static. `with_buffers` counts buffers as constants too: whoever makes use of
    what they hold says so (`assume`), and it is checked at each call.
    """

    def __init__(self, program: Program, *, buffers: bool = False) -> None:
        self._program = program
        self._held = {n: held.tensor for n, held in program.held.items() if not held.doubt} if buffers else {}
        self._contents: dict[bytes | str, torch.Tensor] = {}
        self._known: dict[fx.Node, bool] = {}
        self._values: dict[fx.Node, Any] = {}

    @cached_property
    def with_buffers(self) -> Constants:
        """The same, buffers being constants."""
        return Constants(self._program, buffers=True)

    def assume(self, node: fx.Node) -> None:
        """Record that something was proved of the value of ``node``, so of the buffers that it is computed from."""
        self._program.assumed |= {leaf.name for leaf in _leaves(node) if leaf.name in self._held}

    def doubt(self, node: fx.Node) -> str:
        """Why a buffer that ``node`` is computed from is not constant; empty where there is none such."""
        held = (self._program.held.get(leaf.name) for leaf in _leaves(node))
        return next((f"the buffer {found.name}: {found.doubt}" for found in held if found and found.doubt), "")

    def is_constant(self, node: fx.Node) -> bool:
        """Whether `value` can evaluate ``node``."""
        pending = [node]
        while pending:
            current = pending[-1]
            if current in self._known:
                pending.pop()
                continue
            unknown = [n for n in current.all_input_nodes if n not in self._known]
            if unknown and self._may_fold(current):
                pending.extend(unknown)
                continue
            self._known[current] = self._may_fold(current) and all(self._known[n] for n in current.all_input_nodes)
            pending.pop()
        return self._known[node]

    def value(self, node: object) -> Any:
        """The real value of ``node``, or ``None`` when it depends on the inputs or is too large."""
        if not isinstance(node, fx.Node) or not self.is_constant(node):
            return None
        with ExitStack() as stack:
            stack.enter_context(unset_fake_temporarily())
            stack.enter_context(disable_proxy_modes_tracing())
            stack.enter_context(torch.no_grad())
            return self._evaluate(node)

    def number(self, node: object) -> float | int | bool | None:
        """The value of a constant that holds a single number."""
        value = self.value(node) if _element_count(node) == 1 else None
        if isinstance(value, torch.Tensor):
            return value.item()
        return value if isinstance(value, bool | int | float) else None

    def _evaluate(self, root: fx.Node) -> Any:
        pending = [root]
        while pending:
            node = pending[-1]
            missing = [n for n in node.all_input_nodes if n not in self._values]
            if missing:
                pending.extend(missing)
                continue
            if node not in self._values:
                self._values[node] = self._run(node)
            pending.pop()
        return self._values[root]

    def _may_fold(self, node: fx.Node) -> bool:
        return node.name in self._held if node.op == "placeholder" else _may_fold(node)

    def _run(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            # One tensor for all that hold the same: the layers of a model have a mask each.
            tensor = self._held[node.name]
            return self._contents.setdefault(contents(tensor) or node.name, tensor.detach())
        if node.op == "get_attr":
            value: Any = self._program.module
            for part in str(node.target).split("."):
                value = getattr(value, part)
            return value
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._values.__getitem__)
        assert callable(node.target)
        return node.target(*args, **kwargs)


def _may_fold(node: fx.Node) -> bool:
    if node.op == "get_attr":
        return True
    if node.op != "call_function" or is_impure(node):
        return False
    value = node.meta.get("val")
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return False
    if not isinstance(value, torch.Tensor):
        return isinstance(value, bool | int | float)
    return not has_free_symbols(value) and math.prod(value.shape) <= MAX_ELEMENTS


def _leaves(node: fx.Node) -> list[fx.Node]:
    """The inputs of the program that ``node`` is computed from."""
    pending, seen = [node], {node}
    while pending:
        fresh = [n for n in pending.pop().all_input_nodes if n not in seen]
        seen.update(fresh)
        pending.extend(fresh)
    return [leaf for leaf in seen if leaf.op == "placeholder"]


def _element_count(node: object) -> int:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, torch.Tensor):
        return 1
    return 0 if has_free_symbols(value) else math.prod(value.shape)
