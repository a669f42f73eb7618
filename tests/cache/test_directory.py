"""Which directory is used: an unsafe one is left alone, and the process goes on with one of its own."""

from __future__ import annotations

import inspect
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from fxopt import cache
from fxopt.errors import CacheError, FxoptWarning
from tests.cache.support import make_file, source, use


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


def test_temporary_directory_goes_away_with_its_process(folder: Path) -> None:
    make_file(folder)
    program = "from fxopt import cache; cache.write_json('decisions', 'key', 1); print(cache.directory())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "FxoptWarning" in done.stderr
    assert not Path(done.stdout.strip()).exists()
