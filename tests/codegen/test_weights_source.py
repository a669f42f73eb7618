"""Generated source of attention weights as a product: deterministic, formatted, complete, as kept in ``golden``."""

from __future__ import annotations

import ast
import os
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from fxopt.codegen.attention.weights.kernel import source
from fxopt.codegen.attention.weights.source import KINDS
from fxopt.ir.attention import AttentionSpec, Capture
from fxopt.ir.expression import parse
from tests.codegen.cases import EXPRESSIONS, SHAPES, specification

pytest.importorskip("triton")
GOLDEN = Path(__file__).parent / "golden" / "column_sums_window_padding.py.txt"
SPEC = AttentionSpec(
    parse("50.0 * tanh(s * 0.0625 / 50.0)"),
    parse("(j <= i) & (j > i - 1024) & c0"),
    (Capture("b--j", torch.bool),),
    empty_rows="zero",
    out_dtype=torch.bfloat16,
)


def test_golden() -> None:
    text = source(SPEC, 72, torch.bfloat16, "column_sum", "64x64w4s2")
    text = text.replace(f"fxopt {version('fxopt')}", "fxopt VERSION")
    if os.environ.get("FXOPT_UPDATE_GOLDEN") == "1":
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8"), "set FXOPT_UPDATE_GOLDEN=1 to accept the new source"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", EXPRESSIONS)
def test_same_specification_same_bytes_and_valid_python(name: str, kind: str) -> None:
    spec = specification(name, SHAPES["packed"], torch.bfloat16)
    text = source(spec, 80, torch.bfloat16, kind, "64x64w4s2")
    assert text == source(specification(name, SHAPES["packed"], torch.bfloat16), 80, torch.bfloat16, kind, "64x64w4s2")
    tree = ast.parse(text)
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    kernels = ["rows_kernel", "columns_kernel"] if kind == "column_sum" else ["rows_kernel"]
    assert functions[-8 - len(kernels) :] == [
        "logits", "exponentials", "fold", "normalise", *kernels, "launch", "exact_logits", "reference", "main",
    ]  # fmt: skip
    assert str(spec.score) in (ast.get_docstring(tree) or "")
    assert KINDS[kind].maths in (ast.get_docstring(tree) or "")
    assert "fxopt" not in text.split('"""', 2)[2]
    assert max(map(len, text.splitlines())) <= 120
    assert not any(line.endswith(" ") for line in text.splitlines())


@pytest.mark.parametrize("kind", KINDS)
def test_the_log_sum_exp_saves_the_first_walk(kind: str) -> None:
    text = source(SPEC, 72, torch.bfloat16, kind, "64x64w4s2", known=True)
    functions = [node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    (kernel,) = (name for name in functions if name.endswith("_kernel"))
    assert functions[-7:] == ["logits", "normalise", kernel, "launch", "exact_logits", "reference", "main"]
    assert not {"exponentials", "fold"} & set(functions)
    assert kernel == ("columns_kernel" if kind == "column_sum" else "rows_kernel")
    assert max(map(len, text.splitlines())) <= 120 and "launch(q, k, captures, lse)" in text


@pytest.mark.parametrize("kind", KINDS)
def test_reference_of_the_file_computes_the_meaning(kind: str) -> None:
    from fxopt.cache import import_source
    from fxopt.codegen.attention.weights.kernel import KIND
    from fxopt.codegen.attention.weights.reference import exact_weights, reduction

    module = import_source(KIND, source(SPEC, 72, torch.bfloat16, kind, "64x64w4s2"))
    q, k = torch.randn(2, 4, 9, 72, dtype=torch.float64), torch.randn(2, 2, 11, 72, dtype=torch.float64)
    captures = [torch.rand(2, 1, 1, 11) < 0.5]
    weights = exact_weights(SPEC, q, k, captures)
    expected = weights if kind == "weights" else reduction(kind)(weights)
    torch.testing.assert_close(module.reference(q, k, captures), expected)
