"""Readers of an attention's weights get the least that serves them: what the rewritten graphs hold and compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fxopt
import fxopt.codegen.meanings
from fxopt import driver
from fxopt.codegen.attention import reference
from fxopt.codegen.attention.weights.reference import attention_weights
from fxopt.frontend.export import from_export
from fxopt.ir.attention import AttentionSpec, Capture, read_spec
from fxopt.ir.expression import parse
from fxopt.ir.program import Program
from fxopt.lowering.options import Options
from fxopt.passes.attention.answers import Operands, of_rows
from fxopt.passes.attention.readers import Rows
from fxopt.rewriter.builder import Builder
from fxopt.testing import DISTINCT
from tests.attention.case import Case
from tests.attention.spellings import SPELLINGS
from tests.attention.weight_readers import WEIGHT_READERS

CASES = {
    case.number: case for case in (*WEIGHT_READERS, *SPELLINGS) if case.number[0] == "P" or case.number in ("34", "35")
}
WHOLE = {"34", "P15k", "P15l", "P15m", "P15n", "P15q"}
END = 2**63 - 1


def rewritten(case: Case) -> Any:
    module, args = case.build(DISTINCT, torch.float32)
    options = Options(verify="numeric", strict=True)
    return driver.rewrite(from_export(module, args), options)


@pytest.mark.parametrize("number", CASES)
def test_whole_weights_exist_only_where_they_are_read(number: str) -> None:
    case = CASES[number]
    result = rewritten(case)
    (site,) = (r.site for r in result.replacements if r.site.kind == "attention")
    assert " -> fxopt.attention (out, " in site.reason
    size = DISTINCT.S * DISTINCT.S
    whole = [n for n in result.program.graph.nodes if isinstance(n.meta.get("val"), Tensor) and _plane(n) >= size]
    computed = [n for n in whole if n.op == "call_function" and "fxopt" in str(n.target)]
    assert bool(computed) == (number in WHOLE)


def _plane(node: torch.fx.Node) -> int:
    sizes = node.meta["val"].shape
    return int(sizes[-1] * sizes[-2]) if len(sizes) > 1 and sizes[-1] == DISTINCT.S else 0


@pytest.mark.parametrize(("number", "titles"), [
    ("34", "weights"), ("35", "weights of row 0"), ("P15b", "weights of row -1"),
    ("P15c", "weights of rows 1:3, weights of rows ::4"), ("P15h", "column sums"), ("P15j", "diagonal of the weights"),
    ("P15k", "weights"), ("P15o", "weights of row 0, column sums"),
])  # fmt: skip
def test_reports_say_what_is_read(number: str, titles: str) -> None:
    (site,) = (r.site for r in rewritten(CASES[number]).replacements if r.site.kind == "attention")
    assert f"(out, {titles})" in site.reason


@pytest.mark.parametrize("number", ["35", "P15b", "P15c", "P15h", "P15j", "P15k", "P15o"])
def test_values_are_there_before_the_weights_are_read(number: str) -> None:
    """So that one call may give the output and what is read."""
    program = rewritten(CASES[number]).program
    nodes = [node for node in program.graph.nodes if "fxopt.attention" in str(node.target)]
    (site,) = (node for node in nodes if str(node.target) == "fxopt.attention.default")
    assert len(nodes) > 1 and all(operand < min(nodes) for operand in site.all_input_nodes)


def test_weights_read_through_a_cast_are_written_in_its_dtype() -> None:
    def narrow(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        p = torch.softmax(q @ k.mT, -1, dtype=torch.float32).to(q.dtype)
        return p @ v, p

    def narrow_and_wide(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        p = torch.softmax(q @ k.mT, -1, dtype=torch.float32)
        return p.to(q.dtype) @ v, p

    operands = tuple(torch.randn(1, 2, 8, 4, dtype=torch.bfloat16) for _ in range(3))
    for function, dtype in ((narrow, torch.bfloat16), (narrow_and_wide, torch.float32)):
        program = driver.rewrite(from_export(function, operands), Options(verify="numeric", strict=True)).program
        (node,) = program.graph.find_nodes(op="call_function", target=torch.ops.fxopt.attention_weights.default)
        assert node.meta["val"].dtype is dtype
        assert program.operators().get("aten.to", 0) == 0


def five_rows(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    p = (q @ k.mT).softmax(-1)
    return p @ v, *(p[:, :, n] for n in range(5))


def all_rows_but_one(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    p = (q @ k.mT).softmax(-1)
    return p @ v, p[:, :, 1:]


@pytest.mark.parametrize("rows", [five_rows, all_rows_but_one])
def test_many_rows_are_read_from_whole_weights(rows: Callable[..., tuple[Tensor, ...]]) -> None:
    result = driver.rewrite(from_export(rows, tuple(torch.randn(1, 2, 12, 4) for _ in range(3))), Options(strict=True))
    assert result.program.operators()["fxopt.attention_weights"] == 1
    assert [r.site.reason[-14:] for r in result.replacements if r.site.kind] == ["(out, weights)"]


def test_a_row_read_without_gradient_gets_none() -> None:
    module, args = CASES["P15g"].build(DISTINCT, torch.float32, "training")
    out, row = torch.compile(module, backend="fxopt", options={"base": "eager", "strict": True})(*args)
    assert out.requires_grad and not row.requires_grad


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("rows", [Rows(0, 1), Rows(-1, END), Rows(2, 7, 3), Rows(-4, -1)])
def test_expressions_count_rows_as_before(rows: Rows, dynamic: bool) -> None:
    """A distance, a causal mask aligned to the end, a number per row, and how many rows there are."""
    captures = (Capture("b-i-", torch.float32), Capture("----", torch.float32))
    spec = AttentionSpec(parse("s * 0.25 + c0 + c1 * float(j - i) / float(Sq)"), parse("j <= i + (Sk - Sq)"), captures)
    given = (torch.randn(2, 3, 9, 4), torch.randn(2, 3, 11, 4), torch.randn(2, 1, 9, 1), torch.randn(1, 1, 1, 1))
    shapes = ({2: torch.export.Dim.DYNAMIC}, None, {2: torch.export.Dim.DYNAMIC}, None) if dynamic else None
    program = from_export(
        lambda q, k, c0, c1: (q + 0, k + 0, c0 + 0, c1 + 0), given, dynamic_shapes=shapes and (shapes,)
    )
    taken = _take(program, spec, rows)
    found = program.module(*given)
    whole = attention_weights(given[0], given[1], given[2:], str(spec))
    torch.testing.assert_close(found[0], whole[:, :, rows.start : rows.stop : rows.step])
    assert (len(taken.captures) > 2) == dynamic


def _take(program: Program, spec: AttentionSpec, rows: Rows) -> AttentionSpec:
    """Make ``program`` return the weights of ``rows`` of its outputs; the specification for them."""
    output = program.graph.output_node()
    results = output.args[0]
    assert isinstance(results, list | tuple)
    q, k, *captures = (node for node in results if isinstance(node, torch.fx.Node))
    builder = Builder(program, output, "test")
    found = of_rows(builder, Operands(q, k, tuple(captures), spec), rows)
    call = torch.ops.fxopt.attention_weights.default
    weights = builder.call(call, found.queries, found.keys, list(found.captures), str(found.spec))
    output.args = ((weights, k, *captures),)
    program.module.recompile()
    assert read_spec(str(found.spec)) == found.spec
    return found.spec


def test_statistics_are_those_of_the_weights() -> None:
    spec = str(AttentionSpec(parse("s"), parse("j <= i"), empty_rows="zero"))
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8)
    weights = torch.ops.fxopt.attention_weights(q, k, [], spec)
    torch.testing.assert_close(weights, reference.weights(read_spec(spec), reference.logits(read_spec(spec), q, k, [])))
    sums = torch.ops.fxopt.attention_statistics(q, k, [], spec, "column_sum")
    diagonal = torch.ops.fxopt.attention_statistics(q, k, [], spec, "diagonal")
    torch.testing.assert_close(sums, weights.sum(2))
    torch.testing.assert_close(diagonal, weights.diagonal(dim1=2, dim2=3))
    with pytest.raises(fxopt.FxoptError, match=r"no attention statistic 'row_sum'; they are column_sum, diagonal"):
        torch.ops.fxopt.attention_statistics(q, k, [], spec, "row_sum")


def test_output_from_known_weights_is_that_of_the_attention() -> None:
    spec = str(AttentionSpec(parse("s"), kv_map="tile", out_layout="bshd"))
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 6)
    weights = torch.ops.fxopt.attention_weights(q, k, [], spec)
    found, expected = torch.ops.fxopt.attention_values(weights, v, spec), reference.attention(q, k, v, [], spec)
    torch.testing.assert_close(found, expected)
    assert found.stride() == expected.stride()
