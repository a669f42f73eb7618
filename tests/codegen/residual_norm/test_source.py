"""Generated source of residual norms as a product: formatted, complete, and the same as the one kept in ``golden``."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from fxopt.codegen.norm.residual_norm.kernel import backward_source, source
from tests.codegen.residual_norm.cases import CASES

GOLDEN = Path(__file__).parents[1] / "golden"
TEXTS = {
    "residual_layer_norm": source(CASES["layer bf16"].problem(768), "4w4"),
    "residual_rms_norm_long": source(CASES["rms llama"].problem(20000), "1w16"),
    "residual_layer_norm_backward": backward_source(CASES["layer bf16"].problem(700), "4w4p4", ["weight", "bias"]),
}


@pytest.mark.parametrize("name", TEXTS)
def test_golden(name: str) -> None:
    path, text = GOLDEN / f"{name}.py.txt", TEXTS[name].replace(f"fxopt {version('fxopt')}", "fxopt VERSION")
    if os.environ.get("FXOPT_UPDATE_GOLDEN") == "1":
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), "set FXOPT_UPDATE_GOLDEN=1 to accept the new source"


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_file_is_formatted_and_runs_alone(text: str) -> None:
    functions = {node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
    assert {"launch", "row_distance", "normalised", "main"} <= functions
    assert "$" not in text and "fxopt" not in text.split('"""', 2)[2]
    command = [sys.executable, "-m", "ruff", "format", "--isolated", "--line-length", "120", "--diff", "-"]
    run = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout


@pytest.mark.parametrize("name", CASES)
def test_every_kind_is_valid_python(name: str) -> None:
    for width in (1, 96, 768, 20000):
        ast.parse(source(CASES[name].problem(width), "4w4" if width < 20000 else "1w8"))
    for wanted in ((), ("weight",) if CASES[name].weight else ()):
        ast.parse(backward_source(CASES[name].problem(96), "4w4p4", wanted))
