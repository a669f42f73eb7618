"""The process that compiles kernels for others: ``python compile_server.py``, run by `fxopt.codegen.compile_client`.

It reads jobs from its standard input, each a pickled `Job` as a tuple behind its length, compiles each in a child of
its own, and answers on standard output with lines of the job's number and 1 or 0. What a job leaves is in Triton's
cache. PyTorch is not imported, which takes seconds: generated modules need it to launch kernels, not to compile them.
"""

from __future__ import annotations

import os
import pickle
import select
import struct
import sys
import time
from contextlib import suppress
from types import ModuleType
from typing import Any, BinaryIO, Final, NamedTuple

#: The length in front of a job, in bytes.
LENGTH: Final = struct.Struct("!Q")
#: Seconds without a job after which the process ends.
_IDLE: Final = 120.0
#: Seconds between two looks at children.
_LOOK: Final = 0.005


class Job(NamedTuple):
    """One kernel to compile.

    Attributes:
        number: what the answer names.
        module: name of the generated module.
        path: its file, which Triton names in what it compiles.
        text: its source.
        kernel: name of the kernel in it.
        source: class of Triton's description of what is compiled, by module and name.
        description: its signature, constants and attributes.
        target: what Triton compiles for.
        options: Triton's options, all of them.
        cache: the folder of Triton's cache.
    """

    number: int
    module: str
    path: str
    text: str
    kernel: str
    source: tuple[str, str]
    description: tuple[Any, Any, Any]
    target: Any
    options: dict[str, Any]
    cache: str


class _Source:
    """What gives a module's source to `inspect`, from memory."""

    def __init__(self, text: str) -> None:
        self._text = text

    def get_source(self, fullname: str) -> str:
        return self._text


def _compile(job: Job) -> None:
    import importlib

    import triton

    os.environ["TRITON_CACHE_DIR"] = job.cache
    module = ModuleType(job.module)
    vars(module).update(__file__=job.path, __loader__=_Source(job.text))
    sys.modules[job.module] = module
    sys.modules.setdefault("torch", ModuleType("torch"))
    exec(compile(job.text, job.path, "exec"), vars(module))  # noqa: S102 - fxopt generated it
    folder, name = job.source
    described = getattr(importlib.import_module(folder), name)(getattr(module, job.kernel), *job.description)
    triton.compile(described, target=job.target, options=job.options)


def _child(job: Job) -> None:
    try:
        _compile(job)
    except BaseException:  # noqa: BLE001 - a child never returns
        os._exit(1)
    os._exit(0)


def _read(jobs: BinaryIO) -> Job | None:
    """The next job; ``None`` at the end of all."""
    head = _exactly(jobs, LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    body = _exactly(jobs, LENGTH.unpack(head)[0])
    return Job(*pickle.loads(body))  # noqa: S301 - only who started this process writes here


def _exactly(jobs: BinaryIO, size: int) -> bytes:
    """``size`` bytes, fewer only at the end of all: a pipe gives what it holds."""
    found = b""
    while len(found) < size and (more := jobs.read(size - len(found))):
        found += more
    return found


def _answer(children: dict[int, int], answers: int) -> None:
    """Say of every child that has ended whether it compiled its kernel."""
    while children:
        child, status = os.waitpid(-1, os.WNOHANG)
        if not child:
            return
        os.write(answers, f"{children.pop(child)} {int(status == 0)}\n".encode())


def serve(jobs: BinaryIO, answers: int, at_once: int) -> None:
    """Compile what comes from ``jobs``, at most ``at_once`` kernels at the same time, and answer to ``answers``."""
    import triton.compiler.code_generator

    with suppress(ImportError):  # an older Triton has no Gluon
        import triton.experimental.gluon  # noqa: F401 - for the children

    children: dict[int, int] = {}
    last = time.monotonic()
    while children or time.monotonic() < last + _IDLE:
        _answer(children, answers)
        if len(children) >= at_once or not select.select([jobs], [], [], _LOOK if children else 1.0)[0]:
            time.sleep(_LOOK if len(children) >= at_once else 0.0)
            continue
        last = time.monotonic()
        job = _read(jobs)
        if job is None:
            return
        child = os.fork()
        if not child:
            _child(job)
        children[child] = job.number


def main() -> None:
    """Serve standard input and output, until it closes; what compilers print goes nowhere."""
    answers = os.dup(1)
    os.dup2(2, 1)
    # Unbuffered: what is read ahead can't be waited for.
    with open(0, "rb", buffering=0) as jobs:
        serve(jobs, answers, int(sys.argv[1]))


if __name__ == "__main__":
    main()
