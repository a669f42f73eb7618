"""The command line: what it prints where, and with which exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import fxopt
from fxopt.cli import app
from fxopt.report.report import Report

TARGETS = """
import torch
from torch import nn
from torch.nn import functional as F

print("chatter of the module")


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.drop = nn.LayerNorm(8), nn.Linear(8, 24), nn.Dropout(0.1)

    def forward(self, x, scale=1.0):
        print("chatter of the model")
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return self.drop((q @ k.mT * scale).softmax(-1)) @ v


x = torch.randn(2, 5, 8)


def pair():
    return Layer(), (x,)


def triple():
    return Layer(), (x,), {"scale": 0.5}


class Own(Layer):
    def __init__(self):
        super().__init__()
        self.example_inputs = (x,)


class ByName(Layer):
    example_inputs = {"x": x, "scale": 2.0}


class OneTensor(Layer):
    example_inputs = x


instance = Own()


def function():
    return lambda x: x.softmax(-2), (x,)


def raises():
    raise ValueError("no weights here")


def leaves():
    raise SystemExit(0)


def no_inputs():
    return Layer()


def wrong_type():
    return 7


def wrong_length():
    return (Layer(),)


def wrong_model():
    return 3, (x,)


def wrong_args():
    return Layer(), x


def wrong_kwargs():
    return Layer(), (x,), {1: 2}


def branching():
    def choose(x):
        return x if x.sum().item() > 0 else -x
    return choose, (x,)


number = 7
"""


@pytest.fixture
def file(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "my_targets.py").write_text(TARGETS)
    (tmp_path / "broken.py").write_text("import a_module_that_is_not_there\n")
    path = list(sys.path)
    yield str(tmp_path / "my_targets.py")
    sys.path[:] = path
    sys.modules.pop("my_targets", None)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_help_lists_the_commands_without_importing_torch() -> None:
    code = "import sys; from fxopt.cli import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, "--help"], capture_output=True, text=True, timeout=60, check=True
    )
    assert all(command in done.stdout for command in ("passes", "explain", "dump", "bench"))
    assert done.stdout.endswith("False\n")


def test_module_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fxopt", "nonsense"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "nonsense" in done.stderr


def test_passes_are_listed_with_tier_and_summary() -> None:
    listed = invoke("passes")
    assert listed.exit_code == 0
    assert "inactive-dropout" in listed.stdout
    entries = {entry["name"]: entry for entry in json.loads(invoke("passes", "--json").stdout)}
    assert entries["inactive-dropout"]["tier"] == "exact"
    assert entries["inactive-dropout"]["summary"].startswith("``dropout(x, p, train=False) -> x``")


@pytest.mark.parametrize("factory", ["pair", "triple", "Own", "ByName", "OneTensor", "instance"])
def test_explain_takes_every_form_of_target(file: str, factory: str) -> None:
    done = invoke("explain", f"{file}:{factory}")
    assert done.exit_code == 0, done.stderr
    assert "1 attention site: 1 rewritten" in done.stdout
    assert "1 norm site: " in done.stdout


def test_explain_takes_a_module_name(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(file).parent)
    done = invoke("explain", "my_targets:pair")
    assert (done.exit_code, "1 attention site" in done.stdout) == (0, True), done.stderr


def test_explain_json_is_the_report_alone(file: str) -> None:
    done = invoke("explain", f"{file}:pair", "--json")
    report = Report.from_json(done.stdout)
    assert (report.count("attention"), report.graphs) == (1, 1)
    assert "chatter of the module" in done.stderr


def test_explain_with_chosen_passes_runs_only_these(file: str) -> None:
    done = invoke("explain", f"{file}:pair", "--json", "--pass", "inactive-dropout")
    report = Report.from_json(done.stdout)
    assert [summary.name for summary in report.passes] == ["inactive-dropout"]
    assert report.count("attention", "kept") == 1


def test_explain_training_keeps_dropout(file: str) -> None:
    arguments = ("explain", f"{file}:pair", "--json", "--pass", "inactive-dropout")
    (evaluation,) = Report.from_json(invoke(*arguments).stdout).passes
    (training,) = Report.from_json(invoke(*arguments, "--train").stdout).passes
    assert (evaluation.rewrites, training.rewrites) == (1, 0)


def test_explain_writes_a_page(file: str, tmp_path: Path) -> None:
    page = tmp_path / "out" / "report.html"
    assert invoke("explain", f"{file}:pair", "--html", str(page)).exit_code == 0
    assert "1 attention site" in page.read_text(encoding="utf-8")
    refused = invoke("explain", f"{file}:pair", "--html", f"{file}/report.html")
    assert (refused.exit_code, "can't be written" in refused.stderr) == (2, True)


def test_dump_writes_the_steps(file: str, tmp_path: Path) -> None:
    done = invoke("dump", f"{file}:pair", str(tmp_path / "d"))
    assert (done.exit_code, done.stdout) == (0, f"{tmp_path / 'd'}\n"), done.stderr
    assert {"00-captured.py", "manifest.json", "report.txt"} <= {p.name for p in (tmp_path / "d").iterdir()}


def test_dump_into_a_foreign_directory_fails(file: str) -> None:
    done = invoke("dump", f"{file}:pair", str(Path(file).parent))
    assert done.exit_code == 1
    assert "give an empty or new directory" in done.stderr


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of torch itself, when Inductor is imported
def test_bench_times_eager_and_fxopt(file: str) -> None:
    done = invoke("bench", f"{file}:pair", "--json", "--rounds", "3")
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result["timings"]) == {"eager", "fxopt"}
    assert result["timings"]["eager"]["speedup"] == 1
    assert all(t["p10_ms"] <= t["median_ms"] <= t["p90_ms"] for t in result["timings"].values())


@pytest.mark.parametrize(
    ("target", "code", "message"),
    [
        ("nothing", 2, "write module:factory or path/to/file.py:factory"),
        ("{folder}/absent.py:pair", 2, "there is no file"),
        ("absent_module:pair", 2, "there is no module called 'absent_module'"),
        ("not a module:pair", 2, "neither the name of a module nor the path of a .py file"),
        ("{file}:absent", 2, "there is no 'absent' in"),
        ("{file}:number", 2, "is a int; it must be a factory"),
        ("{file}:no_inputs", 2, "without example_inputs"),
        ("{file}:wrong_type", 2, "returned a int"),
        ("{file}:wrong_length", 2, "returned a tuple of 1"),
        ("{file}:wrong_model", 2, "as the model"),
        ("{file}:wrong_args", 2, "write (model, (input,))"),
        ("{file}:wrong_kwargs", 2, "must map names to values"),
        ("{file}:raises", 1, "raised ValueError: no weights here"),
        ("{file}:leaves", 1, "raised SystemExit"),
        ("{folder}/broken.py:pair", 1, "No module named 'a_module_that_is_not_there'"),
        ("{file}:branching", 1, "can't be captured"),
    ],
)
def test_wrong_targets_are_explained(file: str, target: str, code: int, message: str) -> None:
    done = invoke("explain", target.format(file=file, folder=Path(file).parent))
    assert (done.exit_code, done.stdout) == (code, ""), done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_training_mode_of_a_function_is_an_error(file: str) -> None:
    done = invoke("explain", f"{file}:function", "--train")
    assert (done.exit_code, "no training mode" in done.stderr) == (2, True)


def test_unknown_pass_lists_the_passes(file: str) -> None:
    done = invoke("explain", f"{file}:pair", "--pass", "inactive-dropouts")
    assert done.exit_code == 2
    assert "did you mean 'inactive-dropout'?" in done.stderr


def test_public_functions_that_the_commands_call_exist() -> None:
    assert all(callable(getattr(fxopt, name)) for name in ("capture", "explain_program", "optimize"))
