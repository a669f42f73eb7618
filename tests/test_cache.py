"""The cache on disk: what it keeps, what it refuses, and that a damaged or hostile entry is never believed or run."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import py_compile
import stat
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fxopt import cache
from fxopt.errors import CacheError, FxoptWarning

SOURCE = '"""A generated module."""\n\n\ndef answer() -> int:\n    return {value}\n'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache directory of the test's own, and a process that has warned of nothing and imported nothing."""
    path = tmp_path / "cache"
    use(path, monkeypatch)
    for name, fresh in (("_warned", set[str]()), ("_modules", {}), ("_substitutes", {})):
        monkeypatch.setattr(cache, name, fresh)
    yield path
    for name in [name for name in sys.modules if name.startswith("fxopt_generated_")]:
        del sys.modules[name]


def use(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache.VARIABLE, str(path))


def forget_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a second process would know."""
    monkeypatch.setattr(cache, "_modules", {})


def only_entry(folder: Path) -> Path:
    (entry,) = (path for path in folder.rglob("*") if path.is_file())
    return entry


def source(value: int) -> str:
    return SOURCE.format(value=value)


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
    for _ in range(2):
        with pytest.raises(LookupError, match="from the generated text"):
            cache.import_source("attention", text)
    assert not [name for name in sys.modules if name.startswith("fxopt_generated_")]


@pytest.mark.parametrize("damage", [b"", b"raise SystemExit('run!')\n", source(1).encode()[:-3], b"\xff\xfe\x00"])
def test_damaged_source_is_replaced_and_never_run(folder: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes) -> None:
    entry = Path(str(cache.import_source("attention", source(1)).__file__))
    entry.write_bytes(damage)
    forget_imports(monkeypatch)
    with pytest.warns(FxoptWarning, match=r"was damaged .* it was not run"):
        module = cache.import_source("attention", source(1))
    assert module.answer() == 1
    assert entry.read_text() == source(1)


def test_compiled_file_planted_beside_a_source_is_not_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = Path(str(cache.import_source("attention", source(1)).__file__))
    hostile = tmp_path / "hostile.py"
    hostile.write_text("raise SystemExit('run!')\n")
    planted = entry.parent / "__pycache__" / f"{entry.stem}.{sys.implementation.cache_tag}.pyc"
    planted.parent.mkdir()
    py_compile.compile(
        str(hostile), str(planted), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH, doraise=True
    )
    forget_imports(monkeypatch)
    assert cache.import_source("attention", source(1)).answer() == 1


def test_symbolic_link_in_place_of_a_source_is_replaced_and_its_target_left_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = Path(str(cache.import_source("attention", source(1)).__file__))
    target = tmp_path / "target.py"
    target.write_text(source(1))
    entry.unlink()
    entry.symlink_to(target)
    forget_imports(monkeypatch)
    with pytest.warns(FxoptWarning, match="cannot be read as a plain file"):
        assert cache.import_source("attention", source(1)).answer() == 1
    assert not entry.is_symlink() and entry.read_text() == source(1)
    assert target.read_text() == source(1)


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), os.mkfifo], ids=["directory", "named pipe"])
def test_entry_that_is_no_file_is_ignored_without_hanging(folder: Path, make: Any) -> None:
    cache.write_json("decisions", "key", 1)
    entry = only_entry(folder)
    entry.unlink()
    make(entry)
    with pytest.warns(FxoptWarning, match="not a plain file"):
        assert cache.read_json("decisions", "key") is None


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


@pytest.mark.parametrize("key", ["", "../../escape", "/etc/passwd", "a\x00b", "'; import os #", "\ud800", "x" * 10_000])
def test_hostile_keys_stay_inside_the_directory(folder: Path, key: str) -> None:
    cache.write_json("decisions", key, "kept")
    assert cache.read_json("decisions", key) == "kept"
    assert only_entry(folder).parent == folder / "decisions"


@pytest.mark.parametrize("kind", ["", "..", "a/b", "/tmp", "Attention", "a b", "ä", "1st", "a" * 33, "a\n"])
def test_kind_must_be_a_plain_folder_name(folder: Path, kind: str) -> None:
    with pytest.raises(CacheError, match="cannot name a cache folder"):
        cache.read_json(kind, "key")
    with pytest.raises(CacheError, match="cannot name a cache folder"):
        cache.write_json(kind, "key", 1)
    with pytest.raises(CacheError, match="cannot name a cache folder"):
        cache.import_source(kind, source(1))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), b"bytes", {1, 2}], ids=repr)
def test_value_that_is_not_json_is_the_callers_error(folder: Path, value: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        cache.write_json("decisions", "key", value)
    assert cache.read_json("decisions", "key") is None


def entry_text(key: str, value: Any, digest_of: Any) -> bytes:
    digest = hashlib.sha256(json.dumps(digest_of, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    return json.dumps({"key": key, "digest": digest, "value": value}).encode()


DAMAGED = {
    "empty": b"",
    "truncated": entry_text("key", {"a": 1}, {"a": 1})[:-2],
    "not text": b"\x80\x04\x95pickle",
    "not an entry": b"[1, 2]",
    "no fields": b"{}",
    "other key": entry_text("other", 1, 1),
    "changed value": entry_text("key", 2, 1),
    "number as text": b"7",
    "deep": b"[" * 100_000,
    "not finite": b'{"key": "key", "digest": "", "value": NaN}',
    "long number": b'{"key": "key", "digest": "", "value": ' + b"9" * 10_000 + b"}",
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged_json_is_ignored_with_one_warning(folder: Path, content: bytes) -> None:
    cache.write_json("decisions", "key", {"a": 1})
    only_entry(folder).write_bytes(content)
    with pytest.warns(FxoptWarning, match="is damaged") as caught:
        assert cache.read_json("decisions", "key") is None
        assert cache.read_json("decisions", "key") is None
    assert len(caught) == 1
    cache.write_json("decisions", "key", 3)
    assert cache.read_json("decisions", "key") == 3


def test_entry_that_others_can_write_is_ignored(folder: Path) -> None:
    cache.write_json("decisions", "key", 1)
    only_entry(folder).chmod(0o666)
    with pytest.warns(FxoptWarning, match="only you can write"):
        assert cache.read_json("decisions", "key") is None


def make_link(path: Path) -> None:
    (path.parent / "elsewhere").mkdir()
    path.symlink_to(path.parent / "elsewhere")


def make_dangling_link(path: Path) -> None:
    path.symlink_to(path.parent / "nowhere")


def make_open(path: Path) -> None:
    path.mkdir()
    path.chmod(0o777)


def make_group_writable(path: Path) -> None:
    path.mkdir()
    path.chmod(0o770)


def make_file(path: Path) -> None:
    path.write_text("not a directory")


def make_parent_open(path: Path) -> None:
    path.parent.chmod(0o777)


UNSAFE = {
    make_link: "symbolic link",
    make_dangling_link: "cannot be created",
    make_open: "others can write",
    make_group_writable: "others can write",
    make_file: "cannot be created",
    make_parent_open: "anyone can replace it",
}


@pytest.mark.parametrize(("make", "reason"), UNSAFE.items(), ids=lambda item: getattr(item, "__name__", ""))
def test_unsafe_directory_is_left_alone_and_a_private_one_used(folder: Path, make: Any, reason: str) -> None:
    make(folder)
    with pytest.warns(FxoptWarning, match=reason) as caught:
        used = cache.directory()
        assert cache.import_source("attention", source(5)).answer() == 5
        cache.write_json("decisions", "key", 1)
        assert cache.read_json("decisions", "key") == 1
    assert len(caught) == 1
    assert used != folder and stat.S_IMODE(used.stat().st_mode) == 0o700
    assert not folder.is_dir() or list(folder.iterdir()) == []


def test_directory_of_another_user_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(mode=0o700)
    own = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    with pytest.warns(FxoptWarning, match=f"belongs to user {own}, not to you"):
        assert cache.directory() != folder


@pytest.mark.parametrize("path", ["relative/path", "/proc/fxopt", "/dev/null/fxopt"])
def test_directory_that_cannot_be_made_is_replaced(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    use(Path(path), monkeypatch)
    with pytest.warns(FxoptWarning, match="is not used"):
        cache.write_json("decisions", "key", 1)
    assert cache.read_json("decisions", "key") == 1
    assert list(tmp_path.iterdir()) == []


def test_folder_of_a_kind_that_is_a_link_is_neither_read_nor_written(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    folder.mkdir(mode=0o700)
    (folder / "decisions").symlink_to(elsewhere)
    with pytest.warns(FxoptWarning, match="symbolic link") as caught:
        cache.write_json("decisions", "key", 1)
        assert cache.read_json("decisions", "key") is None
    assert len(caught) == 1
    assert list(elsewhere.iterdir()) == []


def test_nothing_can_be_kept_and_generated_code_still_runs_and_shows_its_source(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_file(folder)

    def refuse(**_: object) -> str:
        raise OSError("no temporary directory")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(CacheError, match=cache.VARIABLE):
        cache.directory()
    with pytest.warns(FxoptWarning, match="no temporary directory can be made"):
        module = cache.import_source("attention", source(9))
    assert module.answer() == 9
    assert inspect.getsource(module.answer).endswith("return 9\n")
    cache.write_json("decisions", "key", 1)
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


def test_temporary_directory_goes_away_with_its_process(folder: Path) -> None:
    make_file(folder)
    program = "from fxopt import cache; cache.write_json('decisions', 'key', 1); print(cache.directory())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "FxoptWarning" in done.stderr
    assert not Path(done.stdout.strip()).exists()


def test_no_warning_in_ordinary_use(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.write_json("decisions", "key", 1)
        cache.read_json("decisions", "key")
        cache.import_source("attention", source(8))
        cache.clear()
