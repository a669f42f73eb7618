"""What the cache keeps: source and JSON come back as they were, also across processes."""

from __future__ import annotations

import hashlib
import inspect
import os
import stat
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from fxopt import cache
from fxopt.errors import FxoptWarning
from tests.cache.support import forget_imports, only_entry, source


def test_directory_is_made_private_and_follows_the_environment(folder: Path) -> None:
    assert cache.directory() == folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_directory_defaults_to_the_users_cache_home(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(cache.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home-cache"))
    assert cache.directory() == tmp_path / "home-cache" / "fxopt"


def test_imported_source_shows_its_source_and_is_stored_under_its_digest(folder: Path) -> None:
    module = cache.import_source("attention", source(42))
    digest = hashlib.sha256(source(42).encode()).hexdigest()
    assert module.answer() == 42
    assert module.__file__ == str(folder / "attention" / f"{digest}.py")
    assert Path(module.__file__).read_text() == inspect.getsource(module) == source(42)
    assert inspect.getsource(module.answer) == "def answer() -> int:\n    return 42\n"
    assert module.__name__.isidentifier() and sys.modules[module.__name__] is module
    assert [path for path in folder.rglob("*") if path.name == "__pycache__"] == []


def test_one_text_is_imported_once_per_process(folder: Path) -> None:
    first = cache.import_source("attention", source(1))
    assert cache.import_source("attention", source(1)) is first
    assert cache.import_source("attention", source(2)) is not first
    assert cache.import_source("norm", source(1)) is not first


def test_second_process_reads_the_stored_file_without_writing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Path(str(cache.import_source("attention", source(1)).__file__)).stat()
    forget_imports(monkeypatch)
    after = Path(str(cache.import_source("attention", source(1)).__file__)).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_failing_source_is_not_kept_as_a_module(folder: Path) -> None:
    text = "raise LookupError('from the generated text')\n"
    before = set(sys.modules)
    for _ in range(2):
        with pytest.raises(LookupError, match="from the generated text"):
            cache.import_source("attention", text)
    assert not [name for name in sys.modules.keys() - before if name.startswith("fxopt_generated_")]


VALUES = [None, True, 0, -7, 1e300, 0.1, "text", "\ud800 lone", [], [1, [2.5, None]], {"b": 1, "a": {"ü\n'\"": [1]}}]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_json_comes_back_equal(folder: Path, value: Any) -> None:
    cache.write_json("decisions", "the key", value)
    assert cache.read_json("decisions", "the key") == value
    assert cache.read_json("decisions", "another key") is None
    assert stat.S_IMODE(only_entry(folder).stat().st_mode) == 0o600


def test_numbers_as_dictionary_keys_come_back_as_text(folder: Path) -> None:
    cache.write_json("decisions", "key", {10: "ten", 2: ("a", "b")})
    assert cache.read_json("decisions", "key") == {"10": "ten", "2": ["a", "b"]}


def test_json_is_replaced_by_a_later_write(folder: Path) -> None:
    cache.write_json("decisions", "key", 1)
    cache.write_json("decisions", "key", 2)
    assert cache.read_json("decisions", "key") == 2
    assert only_entry(folder).name == f"{hashlib.sha256(b'key').hexdigest()}.json"


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), object(), b"bytes", {1, 2}], ids=lambda value: type(value).__name__
)
def test_value_that_is_not_json_is_the_callers_error(folder: Path, value: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        cache.write_json("decisions", "key", value)
    assert cache.read_json("decisions", "key") is None


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError])
def test_interrupted_write_leaves_the_old_entry_and_nothing_else(
    folder: Path, monkeypatch: pytest.MonkeyPatch, interruption: type[BaseException]
) -> None:
    cache.write_json("decisions", "key", "old")

    def interrupt(*_: object) -> None:
        raise interruption(28, "interrupted")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupt)
        expected = pytest.warns(FxoptWarning, match="cannot be written")
        with expected if interruption is OSError else pytest.raises(interruption):
            cache.write_json("decisions", "key", "new")
    assert only_entry(folder).name.endswith(".json")
    assert cache.read_json("decisions", "key") == "old"


def test_clear_removes_entries_only_and_keeps_imported_modules(folder: Path) -> None:
    module = cache.import_source("attention", source(3))
    cache.write_json("decisions", "key", 1)
    users_own = folder / "decisions" / "notes.txt"
    users_own.write_text("mine")
    (folder / "thesis.tex").write_text("mine too")
    assert cache.clear() == 2
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == ["notes.txt", "thesis.tex"]
    assert cache.read_json("decisions", "key") is None
    assert cache.import_source("attention", source(3)) is module
    assert inspect.getsource(module.answer).endswith("return 3\n")


WORKER = """
import sys
from fxopt import cache
name = sys.argv[1]
for step in range(150):
    cache.write_json("decisions", "shared", {"writer": name, "padding": name * 20_000})
    value = cache.read_json("decisions", "shared")
    assert value is not None and value["padding"] == value["writer"] * 20_000, value
    module = cache.import_source("attention", f"STEP = {step}\\n")
    assert module.STEP == step
print("done", name)
"""


def test_two_processes_share_one_directory_without_seeing_half_an_entry(folder: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", WORKER]
    workers = [
        subprocess.Popen([*command, name], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for name in ("a", "b")
    ]
    for worker, name in zip(workers, ("a", "b"), strict=True):
        output, errors = worker.communicate(timeout=120)
        assert (worker.returncode, output, errors) == (0, f"done {name}\n", "")
    assert len(list(folder.rglob("*.py"))) == 150
    assert [path for path in folder.rglob("*") if path.name.startswith(".")] == []


def test_no_warning_in_ordinary_use(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.write_json("decisions", "key", 1)
        cache.read_json("decisions", "key")
        cache.import_source("attention", source(8))
        cache.clear()
