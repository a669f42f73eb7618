"""Assertions about which operators a graph holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node


def count_operators(program: Any) -> Counter[str]:
    """How often each operator is called, by full name (``aten.softmax.int``, ``fxopt.attention.default``).

    ``program`` is a ``torch.fx.Graph``, a ``GraphModule``, an ``ExportedProgram`` or a `fxopt.Program`. Graphs nested
    in a graph module (branches, regions) are counted too. A Python function counts as ``module.qualified_name``, a
    method call as ``Tensor.name``.
    """
    return Counter(_name(node) for graph in _graphs(program) for node in graph.nodes if _is_call(node))


def assert_operators(program: Any, expected: Mapping[str, int]) -> None:
    """Assert that each operator of ``expected`` is called exactly that often in ``program``.

    A name with its overload (``aten.softmax.int``) counts that overload; one without (``fxopt.attention``) counts all
    of them. Raises ``AssertionError`` that lists what differs and what the graph holds instead.
    """
    counts = count_operators(program)
    found = {name: _total(counts, name) for name in expected}
    wrong = [
        f"{name}: expected {expected[name]}, found {found[name]}" for name in expected if expected[name] != found[name]
    ]
    if wrong:
        present = ", ".join(f"{name} ×{count}" for name, count in sorted(counts.items())) or "no operator"
        raise AssertionError("\n  ".join(["the graph's operators are not as expected:", *wrong, f"it holds {present}"]))


def _total(counts: Counter[str], name: str) -> int:
    return sum(count for full, count in counts.items() if full == name or full.rpartition(".")[0] == name)


def _graphs(program: Any) -> list[Graph]:
    if isinstance(program, Graph):
        return [program]
    for module in (program, getattr(program, "graph_module", None), getattr(program, "module", None)):
        if isinstance(module, GraphModule):
            return [part.graph for part in module.modules() if isinstance(part, GraphModule)]
    raise TypeError(f"expected a graph, a graph module or a program, not {type(program).__qualname__}")


def _is_call(node: Node) -> bool:
    return node.op in ("call_function", "call_method")


def _name(node: Node) -> str:
    if isinstance(node.target, str):
        return f"Tensor.{node.target}"
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    module = getattr(node.target, "__module__", None) or "builtins"
    return f"{module}.{getattr(node.target, '__qualname__', repr(node.target))}"
