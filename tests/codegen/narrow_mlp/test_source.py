"""Generated source of narrow feed-forward blocks as a product: formatted, complete, as kept in ``golden``."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from fxopt.codegen.mlp.narrow_mlp.kernel import source
from tests.codegen.narrow_mlp.cases import CASES

GOLDEN = Path(__file__).parents[1] / "golden"
TEXTS = {
    "narrow_mlp_gelu": source(CASES["gelu bf16"].problem(96, 384), "128x64w8s3r128"),
    "narrow_mlp_silu": source(CASES["silu bf16"].problem(32, 64, 48), "64x64w4s3"),
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
    assert {"launch", "row_distance", "reference", "main"} <= functions
    assert "fxopt" not in text.split('"""', 2)[2] and max(map(len, text.splitlines())) <= 120
    command = [sys.executable, "-m", "ruff", "format", "--isolated", "--line-length", "120", "--diff", "-"]
    run = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout


@pytest.mark.parametrize("name", CASES)
def test_every_kind_is_valid_python(name: str) -> None:
    for sizes in ((16, 16), (96, 384), (176, 64, 48)):
        text = source(CASES[name].problem(*sizes), "32x16w4s1")
        ast.parse(text)
        assert "$" not in text.replace('"rcp.approx.ftz.f32 $0, $1;"', "")
