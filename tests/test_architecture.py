"""The house rules that a machine can hold: which part may import which, what `import fxopt` costs, sizes and names."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
#: Where each installed package stands in the repository.
FOLDERS = {"fxopt.passes": ROOT / "passes", "fxopt.codegen": ROOT / "codegen", "fxopt": ROOT / "fxopt"}
SKIPPED = {".git", ".venv", "build", "out", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis", "__pycache__"}

#: Lowest first. A part may import itself and every lower layer; the parts of one layer don't know each other.
#: "driver" is every other module directly in fxopt/: the public functions, the backend, the command line.
LAYERS = (
    ("errors",),
    ("cache",),
    ("ir",),
    ("testing",),
    ("frontend", "analysis", "rewriter"),
    ("codegen",),
    ("passes", "lowering", "report"),
    ("driver",),
)
#: What lies below and is still out of bounds.
FORBIDDEN = {"passes": {"codegen"}, "errors": {"cache"}}
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}

IMPORT_SECONDS = 0.3
HEAVY = ("triton", "sympy", "networkx", "rich", "typer", "platformdirs", "transformers")

FILE_LINES = 400
FUNCTION_LINES = 60


def module_name(path: Path) -> str:
    """The dotted name under which a file of the package is imported."""
    package, folder = next((p, f) for p, f in FOLDERS.items() if path.is_relative_to(f))
    parts = path.relative_to(folder).with_suffix("").parts
    return ".".join((package, *(part for part in parts if part != "__init__")))


def part_of(module: str) -> str:
    """The part of the house that a dotted name belongs to; what is no part of its own is the driver's."""
    head = [*module.split("."), ""][1]
    return head if head in LEVEL else "driver"


def imported(tree: ast.AST, module: str, *, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and absolute name of every fxopt import in ``tree``: relative, nested and by `import_module` included."""
    for node in ast.walk(tree):
        for name in _names(node, module, is_package):
            if name.split(".")[0] == "fxopt":
                yield node.lineno, name  # type: ignore[attr-defined]


def _names(node: ast.AST, module: str, is_package: bool) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = _base(node, module, is_package)
        return [f"{base}.{alias.name}" for alias in node.names] if base == "fxopt" else [base]
    if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in {"import_module", "__import__"}:
        return [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
    return []


def _base(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    if not node.level:
        return node.module or ""
    parents = module.split(".")[: len(module.split(".")) + is_package - node.level]
    return ".".join((*parents, *((node.module,) if node.module else ())))


def wrong_arrows(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """Every import in ``source``, the text of ``module``, that points up or sideways."""
    importer = part_of(module)
    return [
        f"line {line}: {importer} imports {name}"
        for line, name in imported(ast.parse(source), module, is_package=is_package)
        if not allowed(importer, part_of(name))
    ]


def allowed(importer: str, target: str) -> bool:
    if importer == target:
        return True
    return LEVEL[target] < LEVEL[importer] and target not in FORBIDDEN.get(importer, set())


def files(*patterns: str, below: Path = ROOT) -> list[Path]:
    found = (path for pattern in patterns for path in below.rglob(pattern))
    return sorted(p for p in found if p.is_file() and not SKIPPED.intersection(p.relative_to(ROOT).parts))


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


PACKAGE_FILES = [path for folder in FOLDERS.values() for path in files("*.py", below=folder)]
PYTHON_FILES = files("*.py")
TEXT_FILES = files("*.py", "*.md", "*.toml", "*.csv", "*.cfg", "Makefile", ".ci/*", ".gitignore")


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=relative)
def test_imports_point_down(path: Path) -> None:
    assert wrong_arrows(path.read_text(), module_name(path), is_package=path.name == "__init__.py") == []


WRONG = {
    "up": ("fxopt.ir.node", "from fxopt.rewriter.rule import Rule"),
    "sideways": ("fxopt.analysis.masks", "import fxopt.rewriter.rule"),
    "pass to kernel": ("fxopt.passes.norm.fold", "from fxopt.codegen.norm import source"),
    "kernel to pass": ("fxopt.codegen.norm.triton", "import fxopt.passes.norm as norm"),
    "part from the package": ("fxopt.ir.node", "from fxopt import passes"),
    "the public functions": ("fxopt.rewriter.rule", "from fxopt import capture"),
    "the whole package": ("fxopt.passes.norm.fold", "import fxopt"),
    "relative": ("fxopt.ir.node", "from ..rewriter import rule"),
    "relative to the package": ("fxopt.ir.node", "from .. import api"),
    "in a function": ("fxopt.ir.node", "def f():\n    if True:\n        from fxopt.report import explain"),
    "for types only": ("fxopt.ir.node", "if TYPE_CHECKING:\n    from fxopt.api import optimize"),
    "by name": ("fxopt.lowering.choose", "import importlib\nimportlib.import_module('fxopt.passes.attention')"),
    "errors stand alone": ("fxopt.errors", "from fxopt.cache import directory"),
}


@pytest.mark.parametrize(("module", "source"), WRONG.values(), ids=WRONG)
def test_a_wrong_arrow_is_seen(module: str, source: str) -> None:
    assert len(wrong_arrows(source, module)) == 1


def test_dots_count_from_the_package_in_its_own_file() -> None:
    assert wrong_arrows("from . import program", "fxopt.ir", is_package=True) == []
    assert len(wrong_arrows("from .. import report", "fxopt.ir", is_package=True)) == 1


RIGHT = {
    "down": ("fxopt.passes.norm.fold", "from fxopt.rewriter.rule import Rule"),
    "kernel to engine": ("fxopt.codegen.norm.triton", "from fxopt.analysis import masks"),
    "own part": ("fxopt.ir.node", "from .program import Program"),
    "own package": ("fxopt.ir.node", "from fxopt.ir import program"),
    "errors from anywhere": ("fxopt.ir.node", "from fxopt.errors import FxoptError"),
    "cache from anywhere": ("fxopt.ir.node", "from fxopt import cache"),
    "the driver sees all": ("fxopt.api", "from fxopt.passes import attention\nfrom fxopt.codegen import norm"),
    "others' packages": ("fxopt.ir.node", "import torch.fx\nfrom collections import abc"),
}


@pytest.mark.parametrize(("module", "source"), RIGHT.values(), ids=RIGHT)
def test_a_right_arrow_is_let_through(module: str, source: str) -> None:
    assert wrong_arrows(source, module) == []


def test_every_folder_has_its_place_in_the_layers() -> None:
    folders = {path.parent.name for path in (ROOT / "fxopt").glob("*/__init__.py")}
    assert folders <= LEVEL.keys() - {"driver"}


@pytest.mark.parametrize("folder", FOLDERS.values(), ids=relative)
def test_every_folder_of_the_package_is_installed(folder: Path) -> None:
    """A folder without ``__init__.py`` would be left out of the wheel."""
    missing = {relative(p.parent) for p in files("*.py", below=folder) if not (p.parent / "__init__.py").exists()}
    assert missing == set()


MEASURE = """
import json, os, sys, time
import torch
before = set(sys.modules)

def child(pipe):
    start = time.perf_counter()
    import fxopt
    seconds = time.perf_counter() - start
    os.write(pipe, json.dumps([seconds, sorted(set(sys.modules) - before)]).encode() + b"\\n")
    os._exit(0)

results = []
for _ in range(7):
    read, write = os.pipe()
    if os.fork() == 0:
        child(write)
    os.close(write)
    with os.fdopen(read) as pipe:
        results.append(json.loads(pipe.read()))
    os.wait()
print(json.dumps([min(seconds for seconds, _ in results), results[0][1]]))
"""


@pytest.fixture(scope="module")
def fresh_import() -> tuple[float, list[str]]:
    """Seconds that ``import fxopt`` takes after ``import torch`` (best of seven), and the modules it adds."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", MEASURE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seconds, modules = json.loads(done.stdout)
    return seconds, modules


def test_import_loads_nothing_heavy(fresh_import: tuple[float, list[str]]) -> None:
    _, modules = fresh_import
    assert "fxopt" in modules
    assert [name for name in modules if name.split(".")[0] in HEAVY] == []


def test_import_costs_little_beyond_torch(fresh_import: tuple[float, list[str]]) -> None:
    seconds, _ = fresh_import
    assert seconds <= IMPORT_SECONDS


@pytest.mark.parametrize("path", PYTHON_FILES, ids=relative)
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= FILE_LINES
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {f.name: (f.end_lineno or f.lineno) - f.lineno + 1 for f in functions}
    assert {name: lines for name, lines in lengths.items() if lines > FUNCTION_LINES} == {}


#: Folders of one person's machine; joined here so that this file does not name one itself.
MACHINE_PATH = re.compile(
    r"(?<![\w.$}])/(?:" + "|".join(("work", "root", "home", "Users", "mnt", "tmp/venv")) + r")/\w"
)


@pytest.mark.parametrize("path", TEXT_FILES, ids=relative)
def test_no_file_names_a_place_on_somebodys_machine(path: Path) -> None:
    assert MACHINE_PATH.findall(path.read_text()) == []
