"""Compiling the kernels of generated modules without running them, several at once.

Triton's passes, LLVM and the assembler run without Python's lock, so threads are enough: a tenth of the time that a
kernel takes is Python.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field
from types import FunctionType, ModuleType
from typing import Any, Final

from fxopt.codegen.compile_client import compile_there, processors

_LOG = logging.getLogger(__name__)
_PARSER = threading.RLock()
_only_compiled: ContextVar[bool] = ContextVar("fxopt_only_compiled", default=False)
_elsewhere: ContextVar[bool] = ContextVar("fxopt_elsewhere", default=False)


@dataclass
class _Parsing:
    """Triton's own way to parse a kernel, and how many blocks want kernels parsed one at a time."""

    usual: Callable[[Any], Any] = field(default=lambda kernel: None)
    blocks: int = 0


_PARSING: Final = _Parsing()


def only_compiles() -> bool:
    """Whether launchers only compile: within `compile_together`."""
    return _only_compiled.get()


def launcher(module: ModuleType, name: str = "launch") -> Callable[..., Any]:
    """The function ``name`` of a generated module, which within `compile_together` compiles its kernels instead of
    running them: results are then allocated as ever, and hold anything.
    """
    launch: Callable[..., Any] = getattr(module, name)
    return _compiling(module, name) if only_compiles() else launch


def compile_together(calls: Iterable[Callable[[], object]], beside: bool = False) -> None:
    """Make ``calls``, whose launchers only compile, and compile what they ask for in as many threads as there are
    processors. Compilation goes on while later calls run. ``beside`` tells that other threads have Python to run
    meanwhile: kernels are then compiled in another process where there can be one.

    Nothing is raised: a kernel that can't be compiled is compiled again by whoever launches it, who learns why. What
    went wrong here is logged (DEBUG).
    """
    # In a context of its own, Triton's mode ends with it, even when interrupted.
    with _logged():
        copy_context().run(_compile_together, calls, beside)


def _compile_together(calls: Iterable[Callable[[], object]], beside: bool) -> None:
    import triton

    _only_compiled.set(True)
    _elsewhere.set(beside)
    with _parsing_alone(), _Pool(processors()) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        for call in calls:
            with _logged():
                call()


@contextmanager
def _parsing_alone() -> Iterator[None]:
    """Inside, Triton parses one kernel at a time.

    CPython's parser is not safe in threads (3.11: "AST constructor recursion depth mismatch"), and Triton keeps a
    placeholder as the key of a kernel whose parsing failed, under which it might find another one's code.
    """
    from triton.runtime.jit import JITFunction

    with _PARSER:
        # Blocks of several threads overlap: the first puts it there, the last takes it away.
        if not _PARSING.blocks:
            _PARSING.usual, JITFunction.parse = JITFunction.parse, _parse_alone
        _PARSING.blocks += 1
    try:
        yield
    finally:
        with _PARSER:
            _PARSING.blocks -= 1
            if not _PARSING.blocks:
                JITFunction.parse = _PARSING.usual


def _parse_alone(kernel: Any) -> Any:
    with _PARSER:
        return _PARSING.usual(kernel)


@contextmanager
def _logged() -> Iterator[None]:
    """What is raised inside ends there, and is logged."""
    try:
        yield
    except Exception:  # noqa: BLE001 - whoever launches the kernel meets it again
        _LOG.debug("a kernel was not compiled with the others", exc_info=True)


class _Pool(ThreadPoolExecutor):
    """Threads that log what is raised in them; Triton looks at it no more."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        asked = copy_context()

        def told() -> Any:
            try:
                compiled = asked.run(fn, *args, **kwargs)
            except Exception:
                _LOG.debug("a kernel was not compiled", exc_info=True)
                raise
            with _logged():
                _build_launcher(compiled)
            return compiled

        return super().submit(told)


def _build_launcher(compiled: Any) -> None:
    """Have the C compiler build what calls a kernel with arguments of these types: Triton does so at the first launch,
    for as long as the assembler takes, and keeps the result on disk.
    """
    from triton.runtime import driver

    driver.active.launcher_cls(compiled.src, compiled.metadata)


def _compiling(module: ModuleType, wanted: str) -> Callable[..., Any]:
    """The module's function ``wanted`` in a namespace whose kernels only compile; so are functions it calls."""
    from triton.runtime.jit import JITFunction

    names = dict(vars(module))
    for name, value in vars(module).items():
        if isinstance(value, JITFunction):
            names[name] = _Compiled(value)
        elif isinstance(value, FunctionType) and value.__module__ == module.__name__:
            names[name] = FunctionType(value.__code__, names, name, value.__defaults__)
            names[name].__kwdefaults__ = value.__kwdefaults__
    launch: Callable[..., Any] = names[wanted]
    return launch


class _Compiled:
    """A kernel that is compiled for the arguments it is launched with, and not launched."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: object) -> Callable[..., object]:
        from triton.runtime import driver

        # Triton gives a kernel its compiler when it first meets a device.
        _ = self._kernel.device_caches[driver.active.get_current_device()]
        if not isinstance(self._kernel.compile, _Compiler):
            self._kernel.compile = _Compiler(self._kernel.compile)
        return lambda *arguments, **options: self._kernel.warmup(*arguments, grid=grid, **options)


class _Compiler:
    """Triton's compiler, which finds in its cache what another process has compiled, where that is wanted."""

    def __init__(self, usual: Callable[..., Any]) -> None:
        self._usual = usual

    def __call__(self, source: Any, *, target: Any, options: dict[str, Any], **others: Any) -> Any:
        if _elsewhere.get():
            compile_there(source, target, options)
        return self._usual(source, target=target, options=options, **others)
