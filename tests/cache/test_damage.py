"""A damaged or hostile entry is never believed and never run."""

from __future__ import annotations

import hashlib
import json
import os
import py_compile
import sys
from pathlib import Path
from typing import Any

import pytest

from fxopt import cache
from fxopt.errors import CacheError, FxoptWarning
from tests.cache.support import forget_imports, only_entry, source


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
