"""A program as a Python file that runs on its own: the graph as a module, its inputs recorded, a main part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch.fx import Graph, GraphModule, Node

from fxopt.ir.nodes import source
from fxopt.ir.operators import NAMESPACE
from fxopt.ir.program import Program
from fxopt.ir.site import Source
from fxopt.report.constants import Constants
from fxopt.report.flow import namespace
from fxopt.report.literal import Unavailable, hint, literal, target
from fxopt.report.names import Names, is_identifier
from fxopt.report.printable import printable

_RESERVED: Final = frozenset(
    {"self", "torch", "math", "operator", "Path", "fxopt", "load", "random_input", "unavailable", "super", "getattr"}
)
_BODY: Final = " " * 8

_HEAD: Final = '''\
"""{title}

The graph as captured or rewritten by fxopt; run this file to evaluate it on random inputs of the recorded shapes.
"""

import math
import operator
from pathlib import Path

import torch
{imports}
#: Every input: its name and either (shape, strides, dtype, device) or a number. Symbolic sizes have the values they had
#: when the graph was captured.
INPUTS = (
{inputs})


def random_input(shape, strides, dtype, device):
    """Normal numbers for floating dtypes, zeros and ones for the others."""
    length = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides)) if all(shape) else 0
    if dtype.is_floating_point or dtype.is_complex:
        flat = torch.randn(length, device=device)
    else:
        flat = torch.randint(0, 2, (length,), device=device)
    return flat.to(dtype).as_strided(shape, strides)


def load(name, dtype, shape, device):
    """A constant from its raw little-endian bytes beside this file."""
    data = bytearray(Path(__file__).with_name("constants").joinpath(name).read_bytes())
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(shape).to(device)


def unavailable(what):
    """Stand-in for what cannot be written to a file."""
    raise NotImplementedError(what)


'''
_MAIN: Final = """

if __name__ == "__main__":
    torch.manual_seed(0)
    values = [random_input(*value) if isinstance(value, tuple) else value for _, value in INPUTS]
    with torch.no_grad():
        outputs = Program()(*values)
    for value in torch.utils._pytree.tree_leaves(outputs):
        print(f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else value)
"""
_MEANINGS: Final = "\nimport fxopt.codegen.meanings  # noqa: F401 - defines the canonical operators\n"


def write_listing(program: Program, title: str, constants: Constants) -> str:
    """``program`` as the text of a runnable Python file; long constants are added to ``constants``."""
    canonical = any(namespace(node) == NAMESPACE for graph in _graphs(program.module) for node in graph.nodes)
    inputs = "".join(f"    {line}\n" for line in _inputs(program.graph))
    title = printable(title).replace("\\", "\\\\").replace('"', "'")
    head = _HEAD.format(title=title, imports=_MEANINGS if canonical else "", inputs=inputs)
    bound = program.signature.bound if program.signature is not None else {}
    return head + _Class(program.module, constants, bound).text() + _MAIN


def _graphs(module: GraphModule) -> Iterator[Graph]:
    return (m.graph for m in module.modules() if isinstance(m, GraphModule))


def _inputs(graph: Graph) -> Iterator[str]:
    for node in graph.find_nodes(op="placeholder"):
        yield f"({node.name!a}, {_input(node.meta.get('val'))}),{_comment(describe(node.meta.get('val')))}"


def _input(value: Any) -> str:
    try:
        if not isinstance(value, torch.Tensor):
            return literal(value)
        sizes = tuple(hint(size) for size in value.shape)
        strides = tuple(hint(stride) for stride in value.stride())
        return f"({literal(sizes)}, {literal(strides)}, {value.dtype}, {literal(str(value.device))})"
    except (Unavailable, RuntimeError):
        return "None"


def describe(value: Any) -> str:
    """``float32[2, s0, 64]`` for a tensor, the type's name for anything else."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(describe, value))})"
    return str(value) if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool) else type(value).__name__


def _comment(text: str) -> str:
    return f"  # {printable(text)}"


@dataclass
class _Class:
    """One graph as the text of an ``nn.Module`` class; regions of higher-order operators become classes before it."""

    module: GraphModule
    constants: Constants
    bound: dict[str, str] = field(default_factory=dict)
    title: str = "Program"
    values: Names = field(default_factory=lambda: Names(_RESERVED))
    names: dict[Node, str] = field(default_factory=dict)
    attributes: dict[str, str] = field(default_factory=dict)
    setup: list[str] = field(default_factory=list)
    regions: list[str] = field(default_factory=list)
    last: Source | None = None

    def text(self) -> str:
        """The class, and the classes of its regions before it."""
        body = [line for node in self.module.graph.nodes for line in self._lines(node)]
        parameters = "".join(self._parameter(node) for node in self.module.graph.find_nodes(op="placeholder"))
        setup = "".join(f"{_BODY}{line}\n" for line in ("super().__init__()", *self.setup))
        text = (
            f"class {self.title}(torch.nn.Module):\n    def __init__(self):\n{setup}\n"
            f"    def forward(\n        self,\n{parameters}    ):\n" + "".join(f"{_BODY}{line}\n" for line in body)
        )
        return "".join(f"{region}\n\n" for region in self.regions) + text

    def _parameter(self, node: Node) -> str:
        role = self.bound.get(node.name)
        note = describe(node.meta.get("val")) + (f" {role}" if role else "")
        return f"{_BODY}{self.names[node]},{_comment(note)}\n"

    def _lines(self, node: Node) -> Iterator[str]:
        if node.op == "output":
            yield f"return {self._expression(lambda: literal(node.args[0], self.names))}"
            return
        expression = self._expression(lambda: self._value(node))
        self.names[node] = self.values.add(node.name, "value")
        if node.op == "placeholder":
            return
        if node.op == "call_function":
            yield from self._origin(node)
        yield f"{self.names[node]} = {expression}{_comment(describe(node.meta.get('val')))}"

    def _origin(self, node: Node) -> Iterator[str]:
        where = source(node)
        if where.location and where != self.last:
            yield f"# {printable(f'{where}: {where.code}')}"
        self.last = where

    def _expression(self, make: Callable[[], str]) -> str:
        try:
            return make()
        except Unavailable as reason:
            return f"unavailable({str(reason)!a})"

    def _value(self, node: Node) -> str:
        if node.op == "get_attr":
            return f"self.{self._attribute(str(node.target))}"
        if node.op != "call_function":
            return ""
        given = [literal(value, self.names) for value in node.args]
        given += [_keyword(name, literal(value, self.names)) for name, value in node.kwargs.items()]
        return f"{target(node.target)}({', '.join(given)})"

    def _attribute(self, path: str) -> str:
        if path in self.attributes:
            return self.attributes[path]
        value = _look_up(self.module, path)
        number = len(self.attributes)
        if isinstance(value, GraphModule):
            name, title = f"region_{number}", f"{self.title}Region{number}"
            self.regions.append(_Class(value, self.constants, title=title).text())
            self.setup.append(f"self.{name} = {title}(){_comment(path)}")
        elif isinstance(value, torch.Tensor):
            name = f"constant_{number}"
            self.setup.append(f"self.{name} = {self.constants.expression(value)}{_comment(path)}")
        else:
            raise Unavailable(f"{path} is a {type(value).__name__}")
        self.attributes[path] = name
        return name


def _keyword(name: str, value: str) -> str:
    return f"{name}={value}" if is_identifier(name) else f"**{{{name!a}: {value}}}"


def _look_up(module: torch.nn.Module, path: str) -> Any:
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part, None)
    return value
