"""Writing a folder of files that is wholly ours, so that an interruption shows and nobody's work is overwritten."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from fxopt.errors import DumpError

MANIFEST: Final = "manifest.json"
SCHEMA: Final = "fxopt.dump"
#: Stands in the folder while it is being written, and lists what is: whoever finds it knows the dump is incomplete.
UNFINISHED: Final = "UNFINISHED"


def write_folder(directory: Path, files: Mapping[str, bytes], facts: Mapping[str, Any]) -> Path:
    """Write ``files`` (relative path to content) and, last, a manifest of ``facts`` and digests; return the folder.

    An earlier dump in its place is replaced.

    Raises:
        DumpError: the folder holds files that no dump wrote, or that were edited since; or it can't be written.
    """
    try:
        replaced = _replaceable(directory)
        directory.mkdir(parents=True, exist_ok=True)
        _write(directory / UNFINISHED, json.dumps(sorted(files)).encode())
        for name in replaced - {UNFINISHED}:
            (directory / name).unlink()
        for name, content in files.items():
            _write(directory / name, content)
        _write(directory / MANIFEST, _manifest(files, facts))
        (directory / UNFINISHED).unlink()
    except DumpError:
        raise
    except OSError as error:
        raise DumpError(f"{directory} can't be written: {error}; give another directory") from error
    return directory


def _manifest(files: Mapping[str, bytes], facts: Mapping[str, Any]) -> bytes:
    digests = {name: {"sha256": _digest(content), "bytes": len(content)} for name, content in sorted(files.items())}
    document = {"schema": SCHEMA, "version": 1, **facts, "files": digests}
    return (json.dumps(document, indent=2) + "\n").encode()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with path.open("xb") as file:
        file.write(content)


def _replaceable(directory: Path) -> frozenset[str]:
    """What stands in ``directory``, all of it written by an earlier dump; raises `DumpError` when any of it is not."""
    if directory.exists() and not directory.is_dir():
        raise DumpError(f"{directory} is a file; give a directory")
    present = frozenset(_present(directory))
    digests = _recorded(directory)
    foreign = sorted(name for name in present if not _is_ours(directory / name, digests.get(name)))
    if foreign:
        shown = ", ".join(map(repr, foreign[:5])) + (f" and {len(foreign) - 5} more" if len(foreign) > 5 else "")
        raise DumpError(
            f"{directory} holds what no dump wrote, or what was edited since: {shown}; "
            "give an empty or new directory, or move these away"
        )
    return present


def _present(directory: Path) -> Iterator[str]:
    """Files and links below ``directory``; compiled files that Python leaves beside a program are nobody's work."""
    for folder, folders, names in os.walk(directory):
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        folders[:] = [name for name in folders if name not in (*links, "__pycache__")]
        yield from (str((Path(folder) / name).relative_to(directory)) for name in (*names, *links))


def _recorded(directory: Path) -> dict[str, str]:
    """The digests of an earlier dump; ``""`` for a file whose content is not known."""
    digests = {MANIFEST: "", UNFINISHED: ""}
    manifest, pending = _read(directory / MANIFEST), _read(directory / UNFINISHED)
    if isinstance(pending, list):
        digests |= {str(name): "" for name in pending}
    elif not (isinstance(manifest, dict) and manifest.get("schema") == SCHEMA):
        return {}
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if isinstance(files, dict):
        digests |= {name: str(entry.get("sha256")) for name, entry in files.items() if isinstance(entry, dict)}
    return digests


def _read(path: Path) -> Any:
    if path.is_symlink() or not path.is_file():
        return None
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return None


def _is_ours(path: Path, digest: str | None) -> bool:
    if digest is None or path.is_symlink():
        return False
    return digest == "" or _digest(path.read_bytes()) == digest
