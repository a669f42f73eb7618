"""Kernels compiled in another process, where Python's lock is free: Triton reads a kernel's text in Python.

Nobody depends on it. A kernel that is not in Triton's cache afterwards is compiled as ever, by whoever asked.
"""

from __future__ import annotations

import atexit
import logging
import os
import pickle
import subprocess
import sys
import threading
from contextlib import suppress
from functools import cache, partial
from itertools import count
from typing import IO, Any, Final

from fxopt.codegen import compile_server
from fxopt.codegen.compile_server import LENGTH, Job

_LOG = logging.getLogger(__name__)
_LOCK: Final = threading.Lock()
_NUMBERS: Final = count()
#: The variable that tells Triton where its assembler is.
_ASSEMBLER: Final = "TRITON_PTXAS_PATH"


@cache
def note_assembler() -> str | None:
    """Have Triton ask its assembler for its version, once for the process; where the user says that it is.

    The version stands in the keys of Triton's cache. Inductor puts PyTorch's assembler in its place when it compiles
    before its own processes are there, which is in time for the first launch where all else is in caches: kernels would
    be compiled again, by another assembler than when they were measured.
    """
    place = os.environ.get(_ASSEMBLER)
    try:
        from triton.compiler import make_backend
        from triton.runtime import driver

        make_backend(driver.active.get_current_target()).hash()
    except Exception:  # noqa: BLE001 - whoever compiles a kernel meets it again
        _LOG.debug("there is no assembler of Triton's", exc_info=True)
    return place


class _Server:
    """A process that compiles, and who waits for it."""

    def __init__(self) -> None:
        # A file, not a module of the package, which would import more than it needs. Its folder is not looked into.
        options = ["-P"] if sys.version_info >= (3, 11) else []
        command = [sys.executable, *options, compile_server.__file__, str(processors())]
        places = os.pathsep.join(place for place in sys.path if place)
        assembler = note_assembler()
        others = {name: value for name, value in os.environ.items() if name != _ASSEMBLER}
        self._process = subprocess.Popen(  # noqa: S603 - Python itself, and a file of fxopt's
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**others, **({_ASSEMBLER: assembler} if assembler else {}), "PYTHONPATH": places},
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._jobs = self._process.stdin
        self._writing = threading.Lock()
        self._waiting: dict[int, tuple[threading.Event, list[bool]]] = {}
        listen = partial(self._listen, self._process.stdout)
        threading.Thread(target=listen, name="fxopt-compile-client", daemon=True).start()

    @property
    def runs(self) -> bool:
        return self._process.poll() is None

    def ask(self, job: Job) -> bool:
        """Have ``job`` done; whether it was."""
        done, answer = threading.Event(), [False]
        body = pickle.dumps(tuple(job))
        with self._writing:
            self._waiting[job.number] = (done, answer)
            self._jobs.write(LENGTH.pack(len(body)) + body)
            self._jobs.flush()
        done.wait()
        return answer[0]

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        with self._writing, suppress(OSError):
            self._jobs.close()

    def _listen(self, answers: IO[bytes]) -> None:
        with answers:
            for line in answers:
                number, success = map(int, line.split())
                done, answer = self._waiting.pop(number)
                answer[0] = bool(success)
                done.set()
        with self._writing:
            for done, _ in self._waiting.values():
                done.set()


_SERVERS: Final[list[_Server]] = []


def processors() -> int:
    """Those that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def start() -> bool:
    """Start the process, unless it runs; whether it does. Where there is one processor, it would gain nothing."""
    if os.name != "posix" or not sys.executable or processors() < 2:
        return False
    with _LOCK:
        if _SERVERS and _SERVERS[-1].runs:
            return True
        while _SERVERS:
            _SERVERS.pop().stop()
        try:
            _SERVERS.append(_Server())
        except OSError:
            _LOG.debug("no process to compile kernels in", exc_info=True)
            return False
    return True


@atexit.register
def stop() -> None:
    """End the process, if there is one."""
    with _LOCK:
        while _SERVERS:
            _SERVERS.pop().stop()


def compile_there(source: Any, target: Any, options: dict[str, Any]) -> bool:
    """Compile the kernel that Triton's ``source`` describes into Triton's cache; whether that was done."""
    from triton import knobs

    try:
        module = sys.modules[source.fn.__module__]
        text = module.__loader__.get_source(module.__name__)  # type: ignore[union-attr]
        kind = type(source)
        job = Job(
            next(_NUMBERS),
            module.__name__,
            str(module.__file__),
            text,
            source.fn.__name__,
            (kind.__module__, kind.__qualname__),
            (source.signature, source.constants, source.attrs),
            target,
            dict(options),
            knobs.cache.dir,
        )
        return start() and _SERVERS[-1].ask(job)
    except Exception:  # noqa: BLE001 - it is compiled here then
        _LOG.debug("a kernel was not compiled in the other process", exc_info=True)
        return False
