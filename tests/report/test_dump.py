"""What a dump writes: files that run, and only into a folder that is its own."""

from __future__ import annotations

import ast
import hashlib
import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxopt.codegen.meanings  # noqa: F401 - the canonical operators
from fxopt.errors import DumpError
from fxopt.frontend.dynamo import from_dynamo
from fxopt.ir.program import Program
from fxopt.passes import exact_pipeline
from fxopt.passes.canonical.inactive_dropout import InactiveDropout
from fxopt.report.dump import dump
from fxopt.report.report import Report
from fxopt.rewriter.passes import Pass
from fxopt.rewriter.pipeline import run_pipeline
from tests.report.support import HOSTILE, Block, capture

x = torch.randn(2, 5, 8)


def write(program: Program, directory: Path, kernels: dict[str, str] | None = None, *passes: Pass) -> Path:
    steps: list[tuple[str, Program]] = []
    result = run_pipeline(
        program,
        passes or (InactiveDropout(), InactiveDropout()),
        observe=lambda before, after, record: steps.append((record.name, after)),
    )
    return dump(program, result, steps, directory, kernels or {}, Report.of(result))


def evaluate(file: Path, inputs: list[Any]) -> Any:
    """What the program of a dumped file gives for ``inputs``."""
    return runpy.run_path(str(file))["Program"]()(*inputs)


def random_inputs(file: Path) -> list[Any]:
    scope = runpy.run_path(str(file))
    return [scope["random_input"](*value) if isinstance(value, tuple) else value for _, value in scope["INPUTS"]]


def captured_by_dynamo(model: nn.Module, *args: Tensor) -> Program:
    programs: list[Program] = []

    def backend(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        programs.append(from_dynamo(module, inputs))
        return module.forward

    torch.compile(model, backend=backend)(*args)
    return programs[0]


def run_main(file: Path) -> None:
    runpy.run_path(str(file), run_name="__main__")


def test_dump_holds_every_changing_step_and_a_manifest(tmp_path: Path) -> None:
    folder = write(capture(Block().eval(), x), tmp_path / "a" / "b", {"attention": "print(1)\n"})
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert names == {
        "00-captured.py", "01-inactive-dropout.py", "01-inactive-dropout.diff", "kernels/attention.py",
        "report.txt", "report.json", "manifest.json",
    }  # fmt: skip
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {*manifest["files"]} == names - {"manifest.json"}
    for name, entry in manifest["files"].items():
        assert entry["sha256"] == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    first, second = manifest["passes"]
    assert (first["rewrites"], first["file"], first["diff"]) == (
        1,
        "01-inactive-dropout.py",
        "01-inactive-dropout.diff",
    )
    assert (second["changed"], "file" in second) == (False, False)
    assert manifest["versions"]["torch"] == torch.__version__
    assert Report.from_json((folder / "report.json").read_text()).count("norm", "kept") == 2


def test_diff_shows_what_the_pass_removed(tmp_path: Path) -> None:
    lines = (write(capture(Block().eval(), x), tmp_path / "d") / "01-inactive-dropout.diff").read_text().splitlines()
    assert lines[:2] == ["--- 00-captured.py", "+++ 01-inactive-dropout.py"]
    assert any(line.startswith("-") and "aten.dropout.default" in line for line in lines)
    assert not any(line.startswith("+") and "aten.dropout.default" in line for line in lines)


def test_every_step_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = sorted(write(capture(Block().eval(), x), tmp_path / "d", {}, *exact_pipeline()).glob("0*.py"))
    for file in files:
        run_main(file)
    assert len(files) > 1
    assert capsys.readouterr().out == "torch.float32 (2, 5, 8)\n" * len(files)


def test_a_step_with_canonical_operators_runs_in_a_fresh_process(tmp_path: Path) -> None:
    folder = write(capture(Block().eval(), x), tmp_path / "d", {}, *exact_pipeline())
    file = next(f for f in sorted(folder.glob("0*.py")) if "torch.ops.fxopt.attention" in f.read_text())
    command = [sys.executable, "-I", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "torch.float32 (2, 5, 8)\n"), done.stderr


def test_every_step_computes_what_the_program_computes(tmp_path: Path) -> None:
    program = capture(Block().eval(), x)
    folder = write(program, tmp_path / "d", {}, *exact_pipeline())
    inputs = random_inputs(folder / "00-captured.py")
    (expected,) = pytree.tree_leaves(program.module(*inputs))
    for file in folder.glob("0*.py"):
        (found,) = pytree.tree_leaves(evaluate(file, inputs))
        torch.testing.assert_close(found, expected)


class _WithConstants(nn.Module):
    """Constants of several dtypes, short, long and empty, and a size that is symbolic."""

    def forward(self, x: Tensor) -> Tensor:
        long = torch.tensor([[float(n), -n / 3] for n in range(100)], dtype=torch.bfloat16).sum()
        short = torch.tensor([1.5, float("inf"), float("-inf"), float("nan")]).nan_to_num().clamp(-2, 2)
        flags = torch.tensor([n % 3 == 0 for n in range(70)]).sum()
        return x * long.float() + short.sum() + flags + torch.tensor([]).sum() + x.shape[0]


def test_constants_come_back_bit_for_bit_and_symbolic_sizes_have_hints(tmp_path: Path) -> None:
    data = torch.randn(6, 4)
    torch._dynamo.mark_dynamic(data, 0)
    program = captured_by_dynamo(_WithConstants(), data)
    folder = write(program, tmp_path / "d")
    file = folder / "00-captured.py"
    assert 6 in random_inputs(file) or any(isinstance(v, Tensor) and v.shape[0] == 6 for v in random_inputs(file))
    inputs = [v if isinstance(v, int) else data for v in random_inputs(file)]
    assert len(list((folder / "constants").glob("*.bin"))) == 2
    torch.testing.assert_close(evaluate(file, inputs), program.module(*inputs), rtol=0, atol=0)
    run_main(file)


def test_regions_of_higher_order_operators_are_written_out(tmp_path: Path) -> None:
    program = capture(lambda x: torch.cond(x.sum() > 0, lambda x: x.sin() + 1, lambda x: x.cos(), (x,)), x)
    file = write(program, tmp_path / "d") / "00-captured.py"
    (found,) = pytree.tree_leaves(evaluate(file, [x]))
    torch.testing.assert_close(found, x.sin() + 1 if x.sum() > 0 else x.cos())


def test_strided_and_integer_inputs_have_their_layout(tmp_path: Path) -> None:
    table, index = torch.randn(8, 3).T, torch.ones(2, 1, dtype=torch.int32).expand(2, 5)
    file = write(capture(lambda t, i: t[i.long()], table, index), tmp_path / "d") / "00-captured.py"
    first, second = random_inputs(file)
    assert (first.shape, first.stride(), first.dtype) == (table.shape, table.stride(), torch.float32)
    assert (second.shape, second.stride(), second.dtype) == (index.shape, index.stride(), torch.int32)
    run_main(file)


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    program = capture(Block().eval(), x)
    for number, node in enumerate(program.graph.nodes):
        if node.op == "call_function":
            node.meta["stack_trace"] = f'File "{HOSTILE}", line 1, in f\n    {HOSTILE}'.replace('"c', "c")
            node.meta["nn_module_stack"] = {"k": (f"{HOSTILE}.{number}", nn.Module)}
    last = program.graph.output_node().all_input_nodes[0]
    last.name = 'x\nimport os; os.abort()  # "'
    next(iter(program.graph.nodes)).name = "class"
    assert program.signature is not None
    program.signature.bound.update(dict.fromkeys(program.signature.bound, HOSTILE))
    folder = write(program, tmp_path / "d", {HOSTILE: "", "../../up": "", "": "", "a/b": "", "a-b": ""})
    file = folder / "00-captured.py"
    assert "abort" not in {n.attr for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Attribute)}
    run_main(file)
    kernels = {p.name for p in (folder / "kernels").iterdir()}
    assert len(kernels) == 5
    assert {"up.py", "unnamed.py", "a-b.py", "a-b-2.py"} <= kernels
    assert {p.name for p in tmp_path.iterdir()} == {"d"}


class _Odd(nn.Module):
    """Submodules and parameters with names that are no identifiers."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("class", 'we\'ird "one"', "line\nbreak", "naïve ∑"):
            self.add_module(name, nn.Linear(8, 8))
        self.register_parameter('im"port\nos', nn.Parameter(torch.ones(8)))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
        result: Tensor = x * getattr(self, 'im"port\nos')
        return result


def test_modules_with_odd_names_are_dumped(tmp_path: Path) -> None:
    file = write(capture(_Odd(), x), tmp_path / "d") / "00-captured.py"
    run_main(file)
    assert 'im"port os' in file.read_text()


def test_what_has_no_name_fails_only_when_run(tmp_path: Path) -> None:
    program = capture(lambda x: x.sin(), x)
    (sine,) = program.graph.find_nodes(op="call_function", target=torch.ops.aten.sin.default)
    sine.target = lambda value: value
    file = write(program, tmp_path / "d") / "00-captured.py"
    with pytest.raises(NotImplementedError, match="function '<lambda>' has no name that a file can import"):
        run_main(file)


def test_an_earlier_dump_is_replaced(tmp_path: Path) -> None:
    write(capture(Block().eval(), x), tmp_path / "d", {"old": ""})
    (tmp_path / "d" / "__pycache__").mkdir()
    (tmp_path / "d" / "__pycache__" / "left.pyc").touch()
    folder = write(capture(lambda x: x + 1, x), tmp_path / "d", {"new": ""})
    assert [p.name for p in (folder / "kernels").iterdir()] == ["new.py"]
    assert not list(folder.glob("01-*"))


def _foreign(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")


def _edited(folder: Path) -> None:
    (folder / "00-captured.py").write_text("print('mine')\n")


def _linked(folder: Path) -> None:
    (folder / "report.txt").unlink()
    (folder / "report.txt").symlink_to(folder / "report.json")


def _without_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def _other_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("{}")


@pytest.mark.parametrize("change", [_foreign, _edited, _linked, _without_manifest, _other_manifest])
def test_foreign_files_are_not_overwritten(tmp_path: Path, change: Any) -> None:
    program = capture(lambda x: x + 1, x)
    folder = write(program, tmp_path / "d")
    change(folder)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(DumpError, match=r"give an empty or new directory"):
        write(program, folder)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_a_file_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d").write_text("")
    with pytest.raises(DumpError, match="is a file; give a directory"):
        write(capture(lambda x: x + 1, x), tmp_path / "d")
    with pytest.raises(DumpError, match="can't be written"):
        write(capture(lambda x: x + 1, x), tmp_path / "d" / "deeper")


def test_an_interrupted_dump_shows_and_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, written = capture(lambda x: x + 1, x), Path.open

    def interrupted(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.name == "report.txt":
            raise KeyboardInterrupt
        return written(path, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "open", interrupted)
        write(program, tmp_path / "d")
    assert (tmp_path / "d" / "UNFINISHED").exists()
    assert not (tmp_path / "d" / "manifest.json").exists()
    folder = write(program, tmp_path / "d")
    assert (folder / "manifest.json").exists()
    assert not (folder / "UNFINISHED").exists()
