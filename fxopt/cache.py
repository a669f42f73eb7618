"""What fxopt keeps on disk between processes: generated source (``.py``) and decisions (``.json``), nothing else.

Nothing here is ever unpickled, and no entry is believed for lying in the right place: a source runs only when its bytes
have the digest they were asked for by, a decision counts only when its stored key and digest agree. The directory
belongs to the user alone (mode 0700, owner checked, no symbolic link); one that does not is left untouched, with one
`FxoptWarning`, and the process works in a private temporary directory that goes away with it.
"""

from __future__ import annotations

import atexit
import hashlib
import importlib.abc
import importlib.util
import json
import os
import re
import shutil
import stat
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from fxopt.errors import CacheError, FxoptWarning

#: Environment variable that names the cache directory (an absolute path).
VARIABLE: Final = "FXOPT_CACHE_DIR"

_KIND: Final = re.compile(r"[a-z][a-z0-9_]{0,31}")
_ENTRY: Final = re.compile(r"[0-9a-f]{64}\.(py|json)")
_UNFINISHED: Final = ".unfinished"
_WRITABLE_BY_OTHERS: Final = stat.S_IWGRP | stat.S_IWOTH

_lock: Final = threading.RLock()
_modules: Final[dict[str, ModuleType]] = {}
_warned: Final[set[str]] = set()
#: (process, refused directory) -> the temporary directory in its place; a forked child gets its own.
_substitutes: Final[dict[tuple[int, Path], Path]] = {}


def directory() -> Path:
    """The directory in use: ``$FXOPT_CACHE_DIR``, else ``fxopt`` in the user's cache home, else a temporary one.

    The temporary one replaces a directory that is unsafe or cannot be written, after one `FxoptWarning` per process.

    Raises:
        CacheError: not even a temporary directory can be made.
    """
    wanted = _configured()
    with _lock:
        substitute = _substitutes.get((os.getpid(), wanted))
        if substitute is not None:
            return substitute
        objection = _objection(wanted)
        return wanted if objection is None else _substitute(wanted, f"{wanted} is not used: {objection}")


def import_source(kind: str, text: str) -> ModuleType:
    """Import ``text``, kept as ``<cache>/<kind>/<sha256 of text>.py``, as a module; once per text and process.

    The file serves tracebacks, debuggers, ``inspect.getsource`` and Triton's compiler; what runs is the bytes whose
    digest was checked, never a compiled file beside them. A damaged file is replaced, with a warning. When nothing can
    be written the module is made from memory, and still shows its source.

    Args:
        kind: folder of the entry: lower-case letters, digits and underscores, at most 32.
        text: a Python module. It must be trusted: importing runs it.

    Returns:
        The module, whose name is ``fxopt_generated_<kind>_<digest>``.

    Raises:
        CacheError: ``kind`` is not a valid folder name.
        Exception: whatever running ``text`` raises; the module is then not kept.
    """
    _check_kind(kind)
    content = text.encode()
    name = f"fxopt_generated_{kind}_{_digest(content)}"
    with _lock:
        if name not in _modules:
            _modules[name] = _execute(name, _keep_source(kind, content), text)
        return _modules[name]


def read_json(kind: str, key: str) -> Any | None:
    """The value stored under ``key``, or None when there is none or its entry is damaged (then with a warning)."""
    path = _path(kind, f"{_digest_text(key)}.json")
    content = None if path is None else _read(path)
    if content is None:
        return None
    try:
        return _unpack(content, key)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        _warn(f"{path} is ignored: it is damaged ({type(error).__name__}: {error})")
        return None


def write_json(kind: str, key: str, value: Any) -> None:
    """Store ``value`` under ``key``, replacing what was there; a disk that cannot be written costs a warning only.

    Args:
        kind: folder of the entry, as in `import_source`.
        key: any text; its SHA-256 names the file and the text itself is stored and compared on reading.
        value: None, booleans, finite numbers, text, and lists and dictionaries of these.

    Raises:
        CacheError: ``kind`` is not a valid folder name.
        TypeError, ValueError: ``value`` is not JSON.
    """
    plain = json.loads(_canonical(value))  # what a reader will see: text keys, lists for tuples
    entry = {"key": key, "digest": _digest_text(_canonical(plain)), "value": plain}
    path = _path(kind, f"{_digest_text(key)}.json")
    if path is not None:
        _write(path, json.dumps(entry, indent=1, allow_nan=False).encode())


def clear() -> int:
    """Remove every entry, and nothing that is not an entry, from `directory`; the number removed.

    Modules already imported stay imported.
    """
    removed = 0
    for path in list(_entries(directory())):
        path.unlink(missing_ok=True)
        removed += _ENTRY.fullmatch(path.name) is not None
    return removed


def _configured() -> Path:
    value = os.environ.get(VARIABLE)
    if value:
        return Path(os.path.expanduser(value))
    import platformdirs

    return Path(platformdirs.user_cache_dir("fxopt", appauthor=False))


def _objection(path: Path) -> str | None:
    """Why ``path`` can't be trusted as a private directory, or None; creates it when it is missing."""
    if not path.is_absolute():
        return "it is not an absolute path"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.lstat()
        exposed = [parent for parent in path.resolve().parents if _replaceable(parent)]
    except OSError as error:
        return f"it cannot be created ({error.strerror})"
    if not stat.S_ISDIR(status.st_mode):
        return "it is a symbolic link"
    if status.st_uid != os.geteuid():
        return f"it belongs to user {status.st_uid}, not to you ({os.geteuid()})"
    if status.st_mode & _WRITABLE_BY_OTHERS:
        return f"others can write to it (mode {stat.S_IMODE(status.st_mode):04o}; chmod 700 it)"
    if exposed:
        return f"anyone can replace it through {exposed[0]} (writable by all, not sticky)"
    return None if os.access(path, os.W_OK | os.X_OK) else "it cannot be written"


def _replaceable(folder: Path) -> bool:
    mode = folder.stat().st_mode
    return bool(mode & stat.S_IWOTH) and not mode & stat.S_ISVTX


def _substitute(refused: Path, reason: str) -> Path:
    try:
        path = Path(tempfile.mkdtemp(prefix="fxopt-"))
    except OSError as error:
        raise CacheError(f"{reason}; and no temporary directory can be made ({error}). Set {VARIABLE}") from error
    owner = os.getpid()
    _substitutes[owner, refused] = path
    atexit.register(_remove, path, owner)
    _warn(f"{reason}. This process keeps its generated code in {path}; set {VARIABLE} to a directory of your own")
    return path


def _remove(path: Path, owner: int) -> None:
    # A forked child inherits the exit handler, but the directory is still its parent's.
    if os.getpid() == owner:
        shutil.rmtree(path, ignore_errors=True)


def _path(kind: str, name: str) -> Path | None:
    """Where entry ``name`` of ``kind`` lies, in a folder that exists and was checked; None when nothing can be kept."""
    _check_kind(kind)
    try:
        root = directory()
    except CacheError as error:
        _warn(str(error))
        return None
    objection = _objection(root / kind)
    if objection is None:
        return root / kind / name
    _warn(f"{root / kind} is not used: {objection}. Its entries are neither read nor kept")
    return None


def _check_kind(kind: str) -> None:
    if not _KIND.fullmatch(kind):
        raise CacheError(
            f"{kind!r} cannot name a cache folder: use up to 32 of a-z, 0-9 and _, beginning with a letter"
        )


def _unpack(content: bytes, key: str) -> Any:
    entry = json.loads(content)
    if entry["key"] != key or entry["digest"] != _digest_text(_canonical(entry["value"])):
        raise ValueError("its content does not match its key and digest")
    return entry["value"]


def _keep_source(kind: str, content: bytes) -> Path:
    """The file that holds exactly ``content``, written unless it was there; a name for it if nothing can be kept."""
    name = f"{_digest(content)}.py"
    path = _path(kind, name)
    if path is None:
        return Path(f"<fxopt {kind}>", name)
    found = _read(path)
    if found is not None and _digest(found) == _digest(content):
        return path
    if found is not None:
        _warn(f"{path} was damaged (its digest is not its name); it was not run, and is written anew")
    _write(path, content)
    return path


def _execute(name: str, path: Path, text: str) -> ModuleType:
    loader = _VerifiedSource(path, text)
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    if spec is None:
        raise CacheError(f"{path} cannot be imported as {name}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


class _VerifiedSource(importlib.abc.ExecutionLoader):
    """Runs the checked text itself: the standard loader would prefer an unchecked ``__pycache__`` file."""

    def __init__(self, path: Path, text: str) -> None:
        self._path, self._text = path, text

    def get_filename(self, fullname: str) -> str:
        return str(self._path)

    def get_source(self, fullname: str) -> str:
        return self._text

    def is_package(self, fullname: str) -> bool:
        return False


def _read(path: Path) -> bytes | None:
    """The bytes of a regular file that only its owner, this user, can write; None when missing or not such a file."""
    try:
        # O_NONBLOCK: a named pipe in the place of an entry must not hang the process.
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        _warn(f"{path} is ignored: it cannot be read as a plain file ({error.strerror})")
        return None
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & _WRITABLE_BY_OTHERS:
        os.close(handle)
        _warn(f"{path} is ignored: it is not a plain file that only you can write")
        return None
    with os.fdopen(handle, "rb") as file:
        return file.read()


def _write(path: Path, content: bytes) -> None:
    """Put ``content`` at ``path`` in one step, so that no reader and no interruption ever sees a part of it."""
    unfinished: str | None = None
    try:
        handle, unfinished = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=_UNFINISHED)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(unfinished, path)
    except OSError as error:
        _warn(f"{path} cannot be written ({error.strerror}); it is not kept for the next process")
    finally:
        if unfinished is not None:
            Path(unfinished).unlink(missing_ok=True)


def _entries(root: Path) -> Iterator[Path]:
    for folder in root.iterdir():
        if _KIND.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink():
            yield from (path for path in folder.iterdir() if _ENTRY.fullmatch(path.name) or path.suffix == _UNFINISHED)


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _digest_text(text: str) -> str:
    # Names in a model may hold lone surrogates, which plain UTF-8 refuses.
    return _digest(text.encode("utf-8", "surrogatepass"))


def _warn(message: str) -> None:
    if message in _warned:
        return
    _warned.add(message)
    warnings.warn(message, FxoptWarning, stacklevel=3)
