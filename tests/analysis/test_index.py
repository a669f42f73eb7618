"""Tensors made of positions, read as expressions: compared with the tensors over all elements, for many sizes."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.export import Dim

from fxopt.analysis.constants import Constants
from fxopt.analysis.domain import Domain
from fxopt.analysis.index import IndexLifter, Lifted, Reading, renumbered
from fxopt.codegen.expression import evaluate
from fxopt.frontend.export import from_export
from fxopt.ir.expression import Expr, parse, symbol
from fxopt.ir.nodes import same_size, shape
from fxopt.ir.program import Program
from tests.analysis.mask_families import FAMILIES, NEARLY_CAUSAL, Build, Family

HEADS = 3


def operands(rows: int, keys: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(2, HEADS, rows, 1), torch.zeros(2, HEADS, keys, 1)


def captured(build: Build, data: tuple[Tensor, ...], rows: int, keys: int, shapes: Any) -> tuple[Program, Lifted]:
    """The program of a family, and its result as an expression."""
    program = from_export(build, (*operands(rows, keys), *data), None, shapes and (shapes,))
    (result,) = program.graph.output_node().all_input_nodes
    q, k = program.graph.find_nodes(op="placeholder")[:2]
    domain = Domain(shape(q)[0], HEADS, shape(q)[2], shape(k)[2])
    index = tuple(symbol(name) for name in "bhij")[4 - len(shape(result)) :]
    at = tuple(symbol_or_zero(size, part) for size, part in zip(shape(result), index, strict=True))
    lifted = IndexLifter(Constants(program)).lift(result, at, domain)
    assert isinstance(lifted, Lifted), str(lifted)
    return program, renumbered(lifted)


def symbol_or_zero(size: Any, part: Expr) -> Expr:
    return parse("0") if same_size(size, 1) else part


@lru_cache(maxsize=100)
def symbolic(name: str) -> tuple[Program, Lifted]:
    family = FAMILIES[name]
    rows, keys = Dim("rows", min=4, max=64), Dim("keys", min=4, max=64)
    keys = rows if family.square else keys
    data = family.data(7, 7 if family.square else 9)
    along_keys = tuple({1: keys} if len(x.shape) == 2 else None for x in data)
    return captured(family.build, data, 7, 7 if family.square else 9, ({2: rows}, {2: keys}, *along_keys))


class Recorder(fx.Interpreter):
    """Keeps the value of every node."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.values[n] = super().run_node(n)
        return self.values[n]


def as_read(reading: Reading, values: dict[fx.Node, Any]) -> Tensor:
    """A reading as a tensor that broadcasts with ``[B, H, S, T]``."""
    value: Tensor = values[reading.node]
    letters: list[str] = []
    for axis, part in reversed(list(enumerate(reading.index))):
        if part.op == "symbol":
            letters.insert(0, str(part))
        else:
            value = value.select(axis, int(part.value or 0))
    value = value.permute(sorted(range(len(letters)), key=lambda a: "bhij".index(letters[a])))
    return value[tuple(slice(None) if letter in letters else None for letter in "bhij")]


def check(program: Program, lifted: Lifted, inputs: tuple[Tensor, ...], expected: Tensor) -> None:
    """The expression over all elements against the tensor."""
    recorder = Recorder(program.module)
    recorder.run(*inputs)
    rows, keys = inputs[0].shape[2], inputs[1].shape[2]
    env: dict[str, Any] = {"Sq": rows, "Sk": keys, "s": torch.zeros(1)}
    for axis, (name, size) in enumerate(zip("bhij", (2, HEADS, rows, keys), strict=True)):
        env[name] = torch.arange(size).view([-1 if n == axis else 1 for n in range(4)])
    found = evaluate(lifted.expr, env, [as_read(r, recorder.values) for r in lifted.readings])
    full = (2, HEADS, rows, keys)
    torch.testing.assert_close(torch.as_tensor(found, dtype=expected.dtype).expand(full), expected.expand(full))


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=12, deadline=None)
@given(sizes=st.tuples(st.integers(4, 40), st.integers(4, 40)))
def test_symbolic_expression_is_the_tensor_for_any_lengths(name: str, sizes: tuple[int, int]) -> None:
    family = FAMILIES[name]
    rows, keys = (sizes[0], sizes[0]) if family.square else sizes
    program, lifted = symbolic(name)
    inputs = (*operands(rows, keys), *family.data(rows, keys))
    check(program, lifted, inputs, family.build(*inputs))


@pytest.mark.parametrize("name", FAMILIES)
def test_form_and_captures(name: str) -> None:
    family = FAMILIES[name]
    _, lifted = symbolic(name)
    assert str(canonical(lifted.expr)) == str(canonical(parse(family.form)))
    dims = ["".join(x if x in r.letters else "-" for x in "bhij") for r in lifted.readings]
    assert tuple(dims) == family.dims


def canonical(expr: Expr) -> Expr:
    """Conjunctions sorted, so that their order does not count."""

    def change(node: Expr) -> Expr:
        if node.op in ("and", "or") and str(node.args[0]) > str(node.args[1]):
            return Expr(node.op, node.args[::-1])
        return node

    return expr.replace(change)


def static(family: Family, rows: int, keys: int) -> tuple[Program, Lifted, tuple[Tensor, ...]]:
    data = family.data(rows, keys)
    return (*captured(family.build, data, rows, keys, None), (*operands(rows, keys), *data))


@pytest.mark.parametrize(("rows", "keys"), [(5, 5), (1, 6), (8, 3), (7, 12)])
@pytest.mark.parametrize("name", FAMILIES)
def test_static_expression_is_the_tensor(name: str, rows: int, keys: int) -> None:
    family = FAMILIES[name]
    program, lifted, inputs = static(family, rows, rows if family.square else keys)
    check(program, lifted, inputs, family.build(*inputs))


@pytest.mark.parametrize("name", NEARLY_CAUSAL)
def test_what_is_nearly_causal_is_not_causal_and_right(name: str) -> None:
    rows, keys = Dim("rows", min=4, max=64), Dim("keys", min=4, max=64)
    build = NEARLY_CAUSAL[name]
    program, lifted = captured(build, (), 7, 9, ({2: rows}, {2: keys}))
    assert lifted.expr != parse("j <= i")
    for sizes in ((4, 4), (7, 9), (12, 5)):
        check(program, lifted, operands(*sizes), build(*operands(*sizes)))
